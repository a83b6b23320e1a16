"""Pools of these tests look after themselves often, so that nobody waits."""

import pytest


@pytest.fixture(autouse=True)
def quick_keeper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turnwise.containers.pool.KEEPER_TICK_S", 0.005)
