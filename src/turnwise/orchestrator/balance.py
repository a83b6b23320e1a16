"""Who waits for whom: how engines and orchestrator spent the time between two trainer steps."""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from turnwise.inference.load import EngineLoad
from turnwise.inference.replicas import Replica
from turnwise.orchestrator.waits import Blocked, StateClock

Metrics = dict[str, float]


class Balance:
    """Measures from `begin`, when the first policy is served, to `end`, when the last batch is written.

    What comes before and after is left out: engines have nothing to do there by design, and would look idle.

    Args:
        replicas: the engines.
        waits: what kept places for rollouts empty, as the scheduler counts it.
        levels: values to be averaged, by metric name: how full each queue is.
        now: monotonic seconds.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        waits: StateClock[Blocked],
        levels: Callable[[], Mapping[str, float]],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.replicas, self._waits, self._levels, self._now = replicas, waits, levels, now
        self.measuring = False
        self._seconds = 0.0  # measured and not taken yet
        self._since = 0.0
        self._busy: list[float] = []  # of each replica at `_since`
        self._idle: list[float] = []
        self._blocked: dict[Blocked, float] = {}
        self._sampled: dict[str, list[float]] = {}
        self._loads: list[EngineLoad] = []  # of all engines together, one for each time they were asked
        self._counted: EngineLoad | None = None  # at the last `take`

    def begin(self) -> None:
        """The first policy is served: engines have work from now on."""
        self.measuring = True
        self._waits.take()
        self._mark()

    def end(self) -> None:
        """No rollout will be needed any more."""
        if self.measuring:
            self._measure()
            self.measuring = False

    def tick(self) -> None:
        """Look at the levels; to be called many times a second."""
        if self.measuring:
            for name, value in self._levels().items():
                self._sampled.setdefault(name, []).append(value)

    def loads(self, loads: Sequence[EngineLoad | None]) -> None:
        """Take in what the engines said of themselves; a round in which one was silent is left out."""
        known = [load for load in loads if load is not None]
        if self.measuring and known and len(known) == len(loads):
            self._loads.append(sum(known[1:], known[0]))

    def take(self) -> Metrics:
        """Metrics since the last call; none when nothing was measured."""
        if self.measuring:
            self._measure()
        seconds = self._seconds
        if not seconds:
            return {}
        metrics = {
            **self._idle_shares(seconds),
            "perf/held_by_staleness/share": self._blocked.get(Blocked.STALENESS, 0.0) / seconds,
            "perf/held_by_load/share": self._blocked.get(Blocked.LOAD, 0.0) / seconds,
            "perf/held_by_evaluation/share": self._blocked.get(Blocked.EVALUATION, 0.0) / seconds,
            **{name: fmean(values) for name, values in self._sampled.items()},
            **self._engine_metrics(),
        }
        self._seconds, self._idle, self._blocked, self._sampled, self._loads = 0.0, [], {}, {}, self._loads[-1:]
        return metrics

    def _idle_shares(self, seconds: float) -> Metrics:
        shares = [idle / seconds for idle in self._idle]
        each = {f"perf/engine_idle/{index}/share": share for index, share in enumerate(shares)} if len(shares) > 1 else {}
        return {"perf/engine_idle/share": fmean(shares), **each}

    def _engine_metrics(self) -> Metrics:
        if not self._loads:
            return {}
        before, after = self._counted or self._loads[0], self._loads[-1]
        self._counted = after
        queried = after.prefix_queries - before.prefix_queries
        hits = {"engine/prefix_cache_hits/share": (after.prefix_hits - before.prefix_hits) / queried} if queried > 0 else {}
        return {
            "queue/engine_running/mean": fmean(load.running for load in self._loads),
            "queue/engine_waiting/mean": fmean(load.waiting for load in self._loads),
            "engine/kv_cache_usage/max": max(load.kv_cache_usage for load in self._loads),
            "engine/preemptions/count": after.preemptions - before.preemptions,
            **hits,
        }

    def _measure(self) -> None:
        """Add what has passed since the last mark, and set the next."""
        passed = self._now() - self._since
        idle = [max(0.0, passed - (replica.busy_s() - busy)) for replica, busy in zip(self.replicas, self._busy, strict=True)]
        self._idle = [a + b for a, b in zip(self._idle or [0.0] * len(idle), idle, strict=True)]
        for reason, seconds in self._waits.take().items():
            self._blocked[reason] = self._blocked.get(reason, 0.0) + seconds
        self._seconds += passed
        self._mark()

    def _mark(self) -> None:
        self._since, self._busy = self._now(), [replica.busy_s() for replica in self.replicas]
