"""A real engine, and a pool on it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from support.docker_engine import shared_engine
from turnwise.config.containers import ContainersConfig, HostConfig
from turnwise.containers import Box, Pool, make_pool

SMALL = {"memory_mib": 192, "home_mib": 48, "tmp_mib": 16, "data_mib": 16, "shm_mib": 4, "pids": 64}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("docker")


@pytest.fixture(scope="session")
def engine_url() -> str:
    return shared_engine()


@pytest.fixture(scope="session")
def api(engine_url: str) -> Iterator[Any]:
    client = docker.APIClient(engine_url, version="auto")
    yield client
    client.close()


@pytest.fixture(scope="session")
def config(engine_url: str) -> ContainersConfig:
    host = HostConfig(url=engine_url, max_containers=12)
    return ContainersConfig.model_validate(
        {"hosts": [host.model_dump()], "limits": SMALL, "warm": 0, "wait_s": 60, "command_timeout_s": 20, "pause_s": 0.2}
    )


@pytest.fixture(scope="session")
def pool(config: ContainersConfig) -> Iterator[Pool]:
    with make_pool(config, run="tests") as pool:
        yield pool


@pytest.fixture
def box(pool: Pool) -> Iterator[Box]:
    with pool.lease("busybox") as box:
        yield box
