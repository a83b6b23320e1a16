"""Pools on a real engine: nothing leaks, orphans are found, a crash of the engine is survived."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.docker_engine import PrivateEngine, census, my_containers
from turnwise.config.containers import ContainersConfig
from turnwise.containers import Box, ContainerGone, Ending, EngineDown, ImageMissing, Pool, PoolBusy, make_pool
from turnwise.containers.recipes import recipes


def use(pool: Pool, rounds: int) -> None:
    for number in range(rounds):
        with pool.lease("busybox", files={"number": str(number)}) as box:
            assert box.run("cat number").output == str(number)
            assert box.read("/home/agent/number") == str(number).encode()
            if number % 4 == 0:
                assert box.run("sleep 9", timeout_s=0.05).ending is Ending.TIMEOUT


def test_many_leases_leave_no_container_socket_file_or_thread(config: ContainersConfig, api: Any):
    before = len(my_containers(api))
    with make_pool(config.model_copy(update={"warm": 2}), run="leaks") as pool:
        use(pool, 4)  # connections that are kept are made
        after_few = census()
        threads = [threading.Thread(target=use, args=(pool, 6)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert pool.state.leased == 0
        while pool.state.ready < 2:
            time.sleep(0.05)
        grown = {name: count - after_few[name] for name, count in census().items()}
        assert len(my_containers(api)) == before + 2
    assert grown["threads"] == 0
    assert grown["files"] <= 4 + 2 * 2 * 2, grown  # idle connections, and the two streams of each box that stands ready
    left = census()
    assert left["threads"] == after_few["threads"] - 1
    assert left["sockets"] <= after_few["sockets"]
    assert len(my_containers(api)) == before


def test_a_ready_container_is_leased_at_once_and_never_twice(config: ContainersConfig):
    with make_pool(config.model_copy(update={"warm": 1}), run="warm") as pool:
        with pool.lease("busybox") as box:
            box.run("touch trace")
        while not pool.state.ready:
            time.sleep(0.02)
        with pool.lease("busybox") as box:
            assert pool.state.ready == 0
            assert box.run("ls").output == ""


def test_a_lease_waits_for_a_place_and_says_so_when_none_comes(config: ContainersConfig):
    small = config.model_copy(update={"hosts": [config.hosts[0].model_copy(update={"max_containers": 1})], "wait_s": 0.5})
    with make_pool(small, run="small") as pool, pool.lease("busybox"):  # noqa: SIM117 - what raises is named
        with pytest.raises(PoolBusy, match="1 are leased"):
            pool.lease("busybox").__enter__()


def test_an_image_that_nobody_has_is_named_and_never_pulled(pool: Pool):
    with pytest.raises(ImageMissing, match="docker pull no/such:image"):
        pool.lease("no/such:image").__enter__()
    assert pool.state.down == {}


ORPHAN = """
import os, sys
from turnwise.config.containers import ContainersConfig
from turnwise.containers import make_pool
config = ContainersConfig.model_validate({"hosts": [{"url": sys.argv[1]}], "warm": 0})
pool = make_pool(config, run="dead").__enter__()
with pool.lease("busybox") as box:
    print(box._cell.id, flush=True)
    sys.stdin.read(1)
    os.kill(os.getpid(), 9)
"""


def test_containers_of_a_dead_process_end_by_themselves_and_are_removed_at_the_next_start(
    config: ContainersConfig, engine_url: str, api: Any
):
    process = subprocess.Popen(
        [sys.executable, "-c", ORPHAN, engine_url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    container = process.stdout.readline().strip()

    def there() -> bool:
        return any(found["Id"] == container for found in api.containers(all=True))

    with make_pool(config, run="living"):
        assert api.inspect_container(container)["State"]["Running"]  # its owner lives
    process.stdin.write("x")
    process.stdin.close()
    assert process.wait(30) == -9
    process.stdout.close()
    deadline = time.monotonic() + 20
    while api.inspect_container(container)["State"]["Running"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not api.inspect_container(container)["State"]["Running"]  # the engine closed its input
    stranger = api.create_container(
        f"turnwise/busybox:{recipes()['busybox'].hash}", ["/bin/true"], labels={"turnwise.run": "somebody"}
    )["Id"]
    try:
        with make_pool(config, run="next"):
            assert not there()
        assert api.inspect_container(stranger)
    finally:
        api.remove_container(stranger)


@pytest.fixture
def private() -> Iterator[PrivateEngine]:
    engine = PrivateEngine(Path(f"/tmp/tw-private-{time.monotonic_ns()}"))
    yield engine
    engine.remove()


def test_an_engine_that_is_killed_and_comes_back(config: ContainersConfig, private: PrivateEngine):
    host = config.hosts[0].model_copy(update={"url": private.start()})
    told: list[str | None] = []
    waited = config.model_copy(update={"hosts": [host], "wait_s": 60.0, "failures": 2})
    with make_pool(waited, run="crash", listener=lambda name, reason: told.append(reason)) as pool:
        errors: list[Exception] = []

        def play() -> None:
            try:
                with pool.lease("busybox") as box:
                    box.run("sleep 30")
            except (EngineDown, ContainerGone) as error:
                errors.append(error)

        players = [threading.Thread(target=play) for _ in range(2)]
        for player in players:
            player.start()
        while pool.state.leased < 2:
            time.sleep(0.02)
        time.sleep(0.3)
        private.kill()
        for player in players:
            player.join(60)
        assert [type(error) for error in errors] == [EngineDown, EngineDown]
        assert len(pool.state.down) == 1
        boxes: list[Box] = []
        waiter = threading.Thread(target=lambda: boxes.append(lease_once(pool)))
        waiter.start()
        time.sleep(0.5)
        assert not boxes  # it waits
        private.start()
        waiter.join(60)
        assert len(boxes) == 1
        deadline = time.monotonic() + 20
        while pool.state.unburied and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (pool.state.unburied, pool.state.down) == (0, {})
        assert told[0] is not None
        assert told[-1] is None


def lease_once(pool: Pool) -> Box:
    with pool.lease("busybox") as box:
        assert box.run("echo back").output == "back\n"
        return box
