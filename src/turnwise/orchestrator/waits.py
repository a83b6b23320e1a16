"""Why no further rollout begins, and how much each reason cost."""

import time
from collections.abc import Callable, Hashable
from enum import StrEnum
from typing import Generic, TypeVar

State = TypeVar("State", bound=Hashable)


class Blocked(StrEnum):
    """What keeps the scheduler from beginning one more rollout."""

    INFLIGHT = "inflight"  # `max_inflight` are in flight
    LOAD = "load"  # the engines are saturated
    STALENESS = "staleness"  # one more would be older than `max_staleness` allows: rollouts wait for the trainer
    EVALUATION = "evaluation"  # evaluations hold the adapter slots, or, with noise, the engines
    END = "end"  # the last batches are under way, or the run ends


class StateClock(Generic[State]):
    """Adds up the seconds spent in each state, each second counted with the weight that the state has then."""

    def __init__(self, state: State, now: Callable[[], float] = time.monotonic) -> None:
        self.state, self.weight = state, 0.0
        self._now = now
        self._since = now()
        self._seconds: dict[State, float] = {}

    def enter(self, state: State, weight: float = 1.0) -> None:
        """From now on the state is this one."""
        now = self._now()
        self._seconds[self.state] = self._seconds.get(self.state, 0.0) + self.weight * (now - self._since)
        self.state, self.weight, self._since = state, weight, now

    def take(self) -> dict[State, float]:
        """Weighted seconds in each state since the last call."""
        self.enter(self.state, self.weight)
        taken, self._seconds = self._seconds, {}
        return taken
