"""Environment calls on daemon threads: limits, growth, and a clean way out."""

import asyncio
import subprocess
import sys
import threading
import time

import pytest

from turnwise.orchestrator.env_threads import EnvThreads, EnvTimeout


@pytest.fixture
async def threads():
    pool = EnvThreads()
    yield pool
    pool.close()


async def test_a_call_returns_what_the_function_returns(threads: EnvThreads):
    assert await threads.call(lambda: 6 * 7, timeout_s=5) == 42


async def test_an_exception_arrives_as_it_was_raised(threads: EnvThreads):
    def fail() -> None:
        raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"):
        await threads.call(fail, timeout_s=5)


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, StopIteration])
async def test_exceptions_that_would_end_more_than_the_call_are_wrapped(threads: EnvThreads, kind: type[BaseException]):
    def fail() -> None:
        raise kind

    with pytest.raises(RuntimeError, match=kind.__name__):
        await threads.call(fail, timeout_s=5)
    assert await threads.call(lambda: 1, timeout_s=5) == 1


async def test_a_call_beyond_its_limit_is_given_up_and_others_go_on(threads: EnvThreads):
    release = threading.Event()
    with pytest.raises(EnvTimeout, match=r"0\.05 s"):
        await threads.call(lambda: release.wait(20), timeout_s=0.05)
    assert threads.lost == 1
    assert await threads.call(lambda: "still works", timeout_s=5) == "still works"
    release.set()


async def test_many_hanging_calls_do_not_keep_a_good_one_waiting(threads: EnvThreads):
    release = threading.Event()
    hanging = [asyncio.create_task(threads.call(lambda: release.wait(20), timeout_s=10)) for _ in range(40)]
    await asyncio.sleep(0)
    assert await threads.call(lambda: "in time", timeout_s=8) == "in time"
    release.set()
    assert all(await asyncio.gather(*hanging))


async def test_slow_calls_run_side_by_side(threads: EnvThreads):
    barrier = threading.Barrier(16, timeout=10)  # broken unless all sixteen are inside at once
    assert len(await asyncio.gather(*(threads.call(barrier.wait, timeout_s=10) for _ in range(16)))) == 16


async def test_fast_calls_share_few_threads(threads: EnvThreads):
    names: set[str] = set()
    for _ in range(20):
        await asyncio.gather(*(threads.call(lambda: names.add(threading.current_thread().name), timeout_s=5) for _ in range(50)))
    assert len(names) <= 64


async def test_no_thread_is_added_while_idle_ones_have_not_got_to_the_interpreter(threads: EnvThreads):
    barrier = threading.Barrier(8, timeout=10)
    await asyncio.gather(*(threads.call(barrier.wait, timeout_s=10) for _ in range(8)))
    there, interval = threads._threads, sys.getswitchinterval()
    calls = [asyncio.create_task(threads.call(lambda: 1, timeout_s=10)) for _ in range(8)]
    sys.setswitchinterval(10)  # as on a machine whose cores are all busy
    try:
        await asyncio.sleep(0)
        threads._grow(asyncio.get_running_loop(), threads._resolved)
    finally:
        sys.setswitchinterval(interval)
    assert threads._threads == there
    assert await asyncio.gather(*calls) == [1] * 8


async def test_a_cancelled_call_leaves_the_pool_usable(threads: EnvThreads):
    task = asyncio.create_task(threads.call(lambda: time.sleep(0.05), timeout_s=5))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await threads.call(lambda: 2, timeout_s=5) == 2


async def test_a_failing_call_that_nobody_waits_for_becomes_a_warning(threads: EnvThreads, caplog: pytest.LogCaptureFixture):
    threads.submit(lambda: 1 / 0, timeout_s=5)
    for _ in range(100):
        await asyncio.sleep(0.01)
        if caplog.records:
            break
    assert "ZeroDivisionError" in caplog.text


def test_a_hanging_call_does_not_keep_the_process_from_ending():
    code = """
import asyncio, time
from turnwise.orchestrator.env_threads import EnvThreads, EnvTimeout
async def main():
    threads = EnvThreads()
    try:
        await threads.call(lambda: time.sleep(60), timeout_s=0.05)
    except EnvTimeout:
        print("given up")
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == "given up"
