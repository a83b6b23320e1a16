"""Without a connection to the hub its clients are told at once; with one, or a proxy, nothing changes."""

import socket
from collections.abc import Iterator

import pytest

from turnwise.launch.hub import go_offline_without_hub


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.getproxies", dict)


@pytest.fixture
def listening() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_hub_that_answers_is_asked(listening: str) -> None:
    environment = {"HF_ENDPOINT": listening}
    assert go_offline_without_hub(environment) == ()
    assert environment == {"HF_ENDPOINT": listening}


def test_a_hub_that_does_not_answer_is_not_asked_again_and_the_user_is_told(closed: str) -> None:
    environment = {"HF_ENDPOINT": closed}
    (told,) = go_offline_without_hub(environment)
    assert told.startswith("127.0.0.1 cannot be reached (")
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_who_chose_to_be_offline_is_told_nothing(closed: str) -> None:
    assert go_offline_without_hub({"HF_ENDPOINT": closed, "HF_HUB_OFFLINE": "1"}) == ()


def test_behind_a_proxy_nothing_is_tried(closed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy:3128"})
    environment = {"HF_ENDPOINT": closed}
    assert go_offline_without_hub(environment) == ()
    assert "HF_HUB_OFFLINE" not in environment
