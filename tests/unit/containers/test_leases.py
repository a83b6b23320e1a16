"""Queues and GPUs: first come, first served, and nothing lent twice."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.containers import PoolBusy
from turnwise.containers.leases import GpuLedger


def test_a_caller_who_wants_many_is_not_overtaken():
    ledger = GpuLedger(["0", "1"])
    first = ledger.acquire(1, 1)
    order: list[str] = []

    def take(name: str, count: int) -> None:
        gpus = ledger.acquire(count, 10)
        order.append(name)
        ledger.release(gpus)

    threads: list[threading.Thread] = []
    for name, count in (("two", 2), ("one", 1)):
        threads.append(threading.Thread(target=take, args=(name, count)))
        threads[-1].start()
        while ledger._queue.waiting < len(threads):
            time.sleep(0.001)
    assert order == []  # one GPU is free, and the first in the queue wants two
    ledger.release(first)
    for thread in threads:
        thread.join(10)
    assert order == ["two", "one"]
    assert ledger.free == 2


def test_one_who_gives_up_lets_the_next_through():
    ledger = GpuLedger(["0", "1"])
    held = ledger.acquire(1, 1)
    with pytest.raises(PoolBusy, match="2 of the GPUs"):
        ledger.acquire(2, 0.01)
    ledger.release(ledger.acquire(1, 1))
    ledger.release(held)


def test_more_than_there_are_is_refused_at_once():
    with pytest.raises(ValueError, match=r"asks for 2 GPUs.*has 1"):
        GpuLedger(["7"]).acquire(2, 100)


def test_a_gpu_given_back_twice_or_never_lent_is_a_fault():
    ledger = GpuLedger(["0"])
    for wrong in ("0", "3"):
        with pytest.raises(AssertionError):
            ledger.release([wrong])


@given(st.lists(st.integers(1, 3), min_size=1, max_size=6))
@settings(deadline=None, max_examples=20)
def test_no_gpu_is_ever_with_two_holders(wants: list[int]):
    ledger = GpuLedger(["a", "b", "c"])
    held: list[str] = []
    lock = threading.Lock()
    clashes: list[str] = []

    def use(count: int) -> None:
        gpus = ledger.acquire(count, 10)
        with lock:
            clashes.extend(gpu for gpu in gpus if gpu in held)
            held.extend(gpus)
        time.sleep(0.0005)
        with lock:
            for gpu in gpus:
                held.remove(gpu)
        ledger.release(gpus)

    threads = [threading.Thread(target=use, args=(count,)) for count in wants]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert (clashes, ledger.free) == ([], 3)
