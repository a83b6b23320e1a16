"""Find and end the processes of one run. They are known by an identifier in their environment, never by name."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable

import psutil

RUN_ID = "TURNWISE_RUN_ID"  # in the environment of every process of a run, and so of all that those start
POLL_S = 0.05


def processes_of(run_id: str) -> list[psutil.Process]:
    """Processes that carry the identifier, this one excepted; zombies have ended and do not count."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        # another user's process, or one that ended meanwhile, is none of ours
        with contextlib.suppress(psutil.Error, OSError):
            if (
                process.pid != os.getpid()
                and process.environ().get(RUN_ID) == run_id
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
    return found


def end_all(run_id: str, grace_s: float, *, hurry: Callable[[], bool] = lambda: False) -> list[int]:
    """SIGTERM to all processes of a run, SIGKILL to those that are left after `grace_s` seconds or once `hurry()` holds.

    Returns the ids of the processes that had to be killed.
    """
    send(processes_of(run_id), signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while processes_of(run_id) and time.monotonic() < deadline and not hurry():
        time.sleep(POLL_S)
    return kill_all(run_id)


def kill_all(run_id: str) -> list[int]:
    """SIGKILL until nothing of the run is left, also what it starts meanwhile. Returns the ids."""
    killed: list[int] = []
    while left := processes_of(run_id):
        send(left, signal.SIGKILL)
        killed += [process.pid for process in left]
        time.sleep(POLL_S)
    return killed


def send(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
