"""Waiting for a version that the trainer is to publish."""

import asyncio
import time
from collections.abc import Callable

from turnwise.transport import WeightsReady, WeightsStore

POLL_S = 0.005  # a stat() of a missing file costs about 2 us, and a step without staleness waits for this


class TrainerSilent(Exception):
    """The trainer did not publish what was due."""


async def await_version(
    store: WeightsStore, version: int, *, due: Callable[[], bool], over: Callable[[], bool], timeout_s: float
) -> WeightsReady | None:
    """Poll for a version; None when `over` says so before it comes.

    Args:
        due: whether the trainer has all that it needs to make the version; the time limit runs from then on.

    Raises:
        TrainerSilent: it did not come within `timeout_s` seconds after it was due.
    """
    due_since: float | None = None
    while (ready := store.poll(version)) is None:
        now = time.monotonic()
        if over():
            return None
        if due_since is None and due():
            due_since = now
        if due_since is not None and now - due_since > timeout_s:
            raise TrainerSilent(f"no policy v{version} within trainer.timeout_s = {timeout_s:g} s; see logs/trainer.stdout")
        await asyncio.sleep(POLL_S)
    return ready
