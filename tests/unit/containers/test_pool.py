"""The pool, on hosts that can be made to fail."""

import threading
import time
from collections.abc import Callable

import pytest

from support.fake_cells import FakeHost, quick_config
from turnwise.config.containers import LimitsConfig
from turnwise.containers import ContainerGone, EngineDown, Pool, PoolBusy


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)


def test_a_lease_starts_a_container_and_its_end_removes_it():
    host = FakeHost()
    with Pool([host], quick_config()) as pool:
        with pool.lease("x") as box:
            assert box.run("true").exit_code == 0
            assert (pool.state.leased, len(host.living)) == (1, 1)
        assert (pool.state.leased, len(host.living)) == (0, 0)


def test_an_exception_in_the_block_removes_it_as_well():
    host = FakeHost()
    with Pool([host], quick_config()) as pool:
        with pytest.raises(KeyError), pool.lease("x"):
            raise KeyError
        assert host.living == []
    assert host.breaker.reason is None


def test_the_cap_holds_and_everybody_gets_a_turn():
    host = FakeHost(capacity=3)
    played: list[int] = []

    def play(number: int) -> None:
        with pool.lease("x"):
            time.sleep(0.002)
            played.append(number)

    with Pool([host], quick_config(wait_s=20, warm=2)) as pool:
        threads = [threading.Thread(target=play, args=(number,)) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert sorted(played) == list(range(20))
    assert host.most <= 3
    assert host.living == []


def test_nobody_waits_forever_for_a_place():
    with Pool([FakeHost(capacity=1)], quick_config(wait_s=0.02)) as pool, pool.lease("x"):  # noqa: SIM117 - what raises is named
        with pytest.raises(PoolBusy, match="max_containers"):
            pool.lease("x").__enter__()


def test_ready_containers_are_fresh_alike_and_make_room_for_others():
    host = FakeHost(capacity=2)
    with Pool([host], quick_config(warm=2)) as pool:
        with pool.lease("x"):
            pass
        until(lambda: pool.state.ready == 2)
        ready = list(host.living)
        with pool.lease("x") as box:
            assert box._cell in ready
        until(lambda: pool.state.ready == 2)
        with pool.lease("x", limits=LimitsConfig(pids=9)) as box:
            assert box.spec.limits.pids == 9
            assert len(host.living) <= 2


def test_a_ready_container_that_died_is_not_leased():
    host = FakeHost(capacity=2)
    with Pool([host], quick_config(warm=1)) as pool:
        with pool.lease("x"):
            pass
        until(lambda: pool.state.ready == 1)
        (ready,) = host.living
        ready.dead = True
        with pool.lease("x") as box:
            assert box._cell is not ready
            assert box.run("true").exit_code == 0


def test_leases_wait_while_the_engine_is_down_and_go_on_by_themselves():
    told: list[str | None] = []
    host = FakeHost(listener=lambda name, reason: told.append(reason), down=True)
    boxes: list[object] = []

    def play() -> None:
        with pool.lease("x") as box:
            boxes.append(box)

    with Pool([host], quick_config(wait_s=20)) as pool:
        thread = threading.Thread(target=play)
        thread.start()
        until(lambda: "fake" in pool.state.down)
        assert boxes == []
        host.down = False
        thread.join(20)
        assert len(boxes) == 1
        assert pool.state.down == {}
    assert told == ["planted: the engine is down", None]


def test_an_engine_that_stays_down_is_named_in_the_end():
    with Pool([FakeHost(down=True)], quick_config(wait_s=0.05)) as pool, pytest.raises(EngineDown, match=r"0\.05 s.*planted"):
        pool.lease("x").__enter__()


def test_containers_that_die_as_they_start_count_as_a_failing_engine():
    host = FakeHost(stillborn=True)
    with Pool([host], quick_config(wait_s=0.1)) as pool:
        with pytest.raises(EngineDown, match="gone"):
            pool.lease("x").__enter__()
        assert "fake" in pool.state.down
        assert len(host.started) < 20  # trials have pauses
        assert host.living == []


def test_one_container_that_is_gone_says_nothing_about_its_engine():
    host = FakeHost(failures=1)
    with Pool([host], quick_config()) as pool:
        with pool.lease("x") as box:
            host.living[0].dead = True
            with pytest.raises(ContainerGone):
                box.run("true")
        assert pool.state.down == {}
        assert host.living == []


def fails(pool: Pool, host: FakeHost, gpus: int) -> Exception | None:
    """What comes out of a lease whose engine goes down in mid-use."""
    try:
        with pool.lease("x", gpus=gpus) as box:
            host.down = True
            box.run("true")
    except EngineDown as error:
        return error
    return None


def test_an_engine_that_fails_in_mid_use_counts():
    host = FakeHost(failures=1)
    with Pool([host], quick_config()) as pool:
        assert isinstance(fails(pool, host, 0), EngineDown)
        assert "fake" in pool.state.down
        host.down = False


def test_gpus_come_back_only_when_their_container_is_certainly_gone():
    host = FakeHost(failures=99)
    with Pool([host], quick_config(wait_s=0.05), gpus=["5"]) as pool:
        assert isinstance(fails(pool, host, 1), EngineDown)
        assert pool.state.unburied == 1
        with pytest.raises(PoolBusy, match="GPU"):
            pool.lease("x", gpus=1).__enter__()
        host.down = False
        until(lambda: pool.state.unburied == 0)
        with pool.lease("x", gpus=1) as box:
            assert box.gpus == ("5",)


def test_gpus_come_back_when_a_start_fails():
    host = FakeHost(failures=10**9, stillborn=True)
    with Pool([host], quick_config(wait_s=0.1), gpus=["5"]) as pool:
        with pytest.raises((EngineDown, PoolBusy)):
            pool.lease("x", gpus=1).__enter__()
        host.stillborn = False
        with pool.lease("x", gpus=1) as box:
            assert box.gpus == ("5",)


def test_gpus_are_only_on_hosts_that_have_them():
    hosts = [FakeHost("far", has_gpus=False), FakeHost("near", capacity=2)]
    with Pool(hosts, quick_config(), gpus=["0", "1"]) as pool, pool.lease("x", gpus=1), pool.lease("x", gpus=1):
        assert [cell.host.name for cell in hosts[1].living] == ["near", "near"]
        assert hosts[0].living == []


def test_load_is_spread_over_hosts_and_a_host_that_is_down_is_left_out():
    hosts = [FakeHost("a"), FakeHost("b", failures=1)]
    with Pool(hosts, quick_config()) as pool:
        with pool.lease("x"), pool.lease("x"):
            assert [len(host.living) for host in hosts] == [1, 1]
        hosts[1].down = True
        with pool.lease("x"), pool.lease("x"):
            assert [len(host.living) for host in hosts] == [2, 0]
        assert list(pool.state.down) == ["b"]


def test_closing_ends_boxes_in_use_and_refuses_new_ones():
    host = FakeHost()
    pool = Pool([host], quick_config()).__enter__()
    lease = pool.lease("x")
    box = lease.__enter__()
    pool.close()
    with pytest.raises(ContainerGone):
        box.run("true")
    with pytest.raises(ContainerGone, match="closed"):
        pool.lease("x").__enter__()
    lease.__exit__(None, None, None)
    assert host.living == []
    pool.close()


def test_an_engine_whose_places_are_all_taken_is_tried_with_a_question():
    host = FakeHost(capacity=1, failures=1)
    with Pool([host], quick_config(wait_s=10)) as pool, pool.lease("x") as box:
        host.breaker.failure("planted")
        until(lambda: pool.state.down == {})
        assert box.run("true").exit_code == 0


def test_an_engine_all_of_whose_places_wait_for_removals_counts_as_down_until_it_removes_them():
    host = FakeHost(capacity=1, failures=3)
    with Pool([host], quick_config(wait_s=10)) as pool:
        lease = pool.lease("x")
        lease.__enter__()
        host.down = True
        lease.__exit__(None, None, None)  # whoever held it saw no error; no lease can call the engine now
        until(lambda: "fake" in pool.state.down)
        host.down = False
        with pool.lease("x") as box:
            assert box.run("true").exit_code == 0
        assert pool.state.unburied == 0


def test_a_caller_who_evicts_a_ready_container_has_its_place():
    host = FakeHost(capacity=1)
    with Pool([host], quick_config(warm=1)) as pool:
        with pool.lease("x"):
            pass
        until(lambda: pool.state.ready == 1)
        host.living[0].destroyed = True  # as `destroy` would, so that only the pool's own count is left
        host.living.clear()
        with pool.lease("y") as box:
            assert box.spec.image == "y"
            assert len(host.living) == 1
