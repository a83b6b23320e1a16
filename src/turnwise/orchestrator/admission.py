"""How many rollouts may be in flight, by what the engines say of their load."""

import math
from collections.abc import Sequence

from turnwise.inference.load import EngineLoad

FULL_CACHE = 0.95  # share of key-value blocks in use from which a preemption means that there are too many requests
CALM_SHARE = 0.5  # of the allowed queue: below it more rollouts may begin, above it things stay as they are


class Admission:
    """A limit on rollouts in flight that exists only while the engines are saturated.

    Saturated means: more requests wait in the engines' queues than `max_waiting_share` of those that run, or an engine preempts
    requests while its key-value cache is full. The limit is then the rollouts in flight less what is too much: none begins until
    so many have ended, while those in progress play on. When the queue has drained to half of what is allowed, and no cache is
    full, the limit rises by what is free. So the queue settles between a half and the whole of its share, instead of swinging
    between empty and full as it would behind a gate that opens and shuts.

    A queue counts when two reports in a row show it, and then with the shorter of the two: requests that arrive together wait
    for a moment in any engine.

    Nothing can be stuck behind it: with no rollout in flight one may always begin, and an engine that does not tell its load
    lifts the limit.

    Args:
        max_waiting_share: requests in the queues, as a share of those that run; infinite for no limit at all.
        most: rollouts in flight beyond which the scheduler never goes; a limit that would be above it is none.
    """

    def __init__(self, *, max_waiting_share: float, most: int) -> None:
        self.max_waiting_share, self.most = max_waiting_share, most
        self.limit: int | None = None
        self._excess = 0  # requests too many at the last update
        self._preemptions: list[float] | None = None  # of each engine then

    def allows(self, inflight: int) -> bool:
        """Whether another rollout may begin beside `inflight`."""
        return self.limit is None or inflight == 0 or inflight < self.limit

    def update(self, loads: Sequence[EngineLoad | None], inflight: int) -> None:
        """Take in the newest load of every engine, None for one that did not tell it."""
        known = [load for load in loads if load is not None]
        if len(known) < len(loads) or math.isinf(self.max_waiting_share):
            self.limit, self._excess, self._preemptions = None, 0, None
            return
        allowed = self.max_waiting_share * sum(load.running for load in known)
        waiting = sum(load.waiting for load in known)
        before, self._excess = self._excess, max(0, math.ceil(max(waiting - allowed, self._preempted(known))))
        if excess := min(before, self._excess):
            self.limit = max(0, inflight - excess)
        elif self.limit is not None and waiting <= CALM_SHARE * allowed and not any(_full(load) for load in known):
            raised = max(self.limit, inflight) + max(1, math.floor(allowed - waiting))
            self.limit = raised if raised < self.most else None

    def _preempted(self, loads: Sequence[EngineLoad]) -> float:
        """Requests preempted since the last update by engines whose cache is full."""
        before, self._preemptions = self._preemptions, [load.preemptions for load in loads]
        if before is None or len(before) != len(loads):
            return 0.0
        pairs = zip(loads, before, strict=True)
        return sum(max(0.0, load.preemptions - past) for load, past in pairs if _full(load))


def _full(load: EngineLoad) -> bool:
    return load.kv_cache_usage >= FULL_CACHE
