"""Keeps rollouts going: groups in order, at most `max_inflight` rollouts, bounded retries, and no more groups than allowed."""

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from statistics import median

from turnwise.config import OrchestratorConfig
from turnwise.orchestrator.buffer import GroupTask, TaskBuffer
from turnwise.orchestrator.filters import FinishedGroup
from turnwise.orchestrator.rollout import RolloutSpec, derive_seed
from turnwise.orchestrator.types import Rollout, StopReason
from turnwise.orchestrator.waits import Blocked, StateClock
from turnwise.transport import Progress

Play = Callable[[RolloutSpec], Awaitable[Rollout]]

ERROR_WINDOW_BATCHES = 4  # batches' worth of attempts over which the share of errors is taken
FEWEST_ATTEMPTS = 8  # before the share of errors is judged
REASONS_SHOWN = 3
RECENT_GROUPS = 64  # over which the median duration is taken
FEWEST_GROUPS = 8  # before any is called late
LATE_SHARE = 4  # at most one in so many groups of a batch counts as late: when all are slow, it is not they that lag behind


class TooManyErrors(Exception):
    """Most rollouts end with an error; the text holds the reasons."""


@dataclass
class OpenGroup:
    """A group in progress."""

    id: int
    task: GroupTask
    rollouts: list[Rollout | None]
    failed: list[Rollout] = field(default_factory=list[Rollout])
    oldest_version: int | None = None  # served when its first rollout began
    began: float = 0.0  # when that was
    tasks: set["asyncio.Task[None]"] = field(default_factory=set["asyncio.Task[None]"])
    broken_off: bool = False

    @property
    def finished(self) -> bool:
        """Whether every rollout is there. The task of the last one may still be about to end."""
        return all(rollout is not None for rollout in self.rollouts)


class Scheduler:
    """Issues groups and collects them when all their rollouts are done, whichever is done first.

    `capacity` is how many groups may be open: in progress, or finished and not yet taken. Whoever assembles batches sets it
    so that no group begins whose samples would be too old when their batch is trained on. `admits` says whether the engines can
    take one more rollout beside so many. `waits` counts, for each reason, the seconds for which it kept places of `max_inflight`
    empty, a second with half of them empty as half a second.
    """

    def __init__(
        self,
        config: OrchestratorConfig,
        buffer: TaskBuffer,
        play: Play,
        spawn: asyncio.TaskGroup,
        *,
        seed: int,
        version: Callable[[], int],
        admits: Callable[[int], bool] = lambda inflight: True,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config, self.buffer, self.play, self.seed = config, buffer, play, seed
        self.capacity = 0
        self.waits = StateClock(Blocked.END)
        self.max_inflight = config.inflight_limit
        self.inflight = 0
        self.finished: asyncio.Queue[FinishedGroup] = asyncio.Queue()
        self.open: dict[int, OpenGroup] = {}
        self.next_group = 0
        self._again: deque[int] = deque()  # groups of an interrupted run, issued first
        self._waiting: deque[tuple[OpenGroup, int]] = deque()
        self._closed = False
        self._spawn, self._version, self._admits, self.now = spawn, version, admits, now
        self._durations: deque[float] = deque(maxlen=RECENT_GROUPS)  # seconds of recent groups
        self._late_after: float | None = None  # seconds
        self._capacity_from = Blocked.END  # what the capacity is owed to
        window = ERROR_WINDOW_BATCHES * config.batch_size
        self._outcomes: deque[str | None] = deque(maxlen=window)  # error text, or None, of recent attempts

    def restore(self, progress: Progress) -> None:
        self.next_group = progress.next_group
        self._again = deque(sorted(progress.pending))

    @property
    def pending(self) -> list[int]:
        """Groups issued whose fate is not settled, and groups of the interrupted run that wait to be issued again."""
        return sorted([*self.open, *self._again])

    def set_capacity(self, groups: int, why: Blocked = Blocked.STALENESS) -> None:
        """Allow so many open groups; `why` not more."""
        self.capacity, self._capacity_from = groups, why
        self.pump()

    def settle(self, group: FinishedGroup) -> None:
        """The group is in a batch or dropped: its place is free."""
        del self.open[group.id]

    def pump(self) -> None:
        """Start rollouts while there is room, oldest groups first."""
        while (blocked := self._blocked()) is None:
            group, index = self._waiting.popleft()
            if group.oldest_version is None:
                group.oldest_version, group.began = self._version(), self.now()
            self.inflight += 1
            task = self._spawn.create_task(self._run(group, index))
            group.tasks.add(task)
            task.add_done_callback(lambda done, group=group: self._ended(group, done))
        self.waits.enter(blocked, weight=1 - self.inflight / self.max_inflight)

    def drop_older_than(self, version: int) -> list[FinishedGroup]:
        """Break off groups in progress that began with a policy older than `version`: nobody could train on them any more."""
        stale = [g for g in self.open.values() if not g.finished and g.oldest_version is not None and g.oldest_version < version]
        for group in stale:
            group.broken_off = True
            for task in list(group.tasks):
                task.cancel()
            self._waiting = deque(job for job in self._waiting if job[0] is not group)
        return [_finish(group) for group in stale]

    def close(self) -> None:
        """Begin nothing more and break off what is in progress."""
        self._closed = True
        for group in self.open.values():
            for task in group.tasks:
                task.cancel()

    def _blocked(self) -> Blocked | None:
        """What keeps the next rollout from beginning; None when it stands in line, from a group that may be opened here."""
        if self._closed:
            return Blocked.END
        if not self._waiting and len(self.open) - self._late() >= self.capacity:
            return self._capacity_from
        if self.inflight >= self.max_inflight:
            return Blocked.INFLIGHT
        if not self._admits(self.inflight):
            return Blocked.LOAD
        if not self._waiting:
            self._issue()
        return None

    def _issue(self) -> None:
        """Open the next group."""
        number = self._again.popleft() if self._again else self.next_group
        self.next_group = max(self.next_group, number + 1)
        group = OpenGroup(number, self.buffer.draw(number), [None] * self.config.rollouts_per_example)
        self.open[number] = group
        self._waiting.extend((group, index) for index in range(len(group.rollouts)))

    async def _run(self, group: OpenGroup, index: int) -> None:
        errors = 0
        for attempt in itertools.count():
            rollout = await self.play(self._spec(group, index, attempt))
            if rollout.stop_reason is not StopReason.OUTAGE:  # its next attempt waits until what is down works again
                self._note(rollout)
                errors += not rollout.ok
                if rollout.ok or rollout.stop_reason is StopReason.STRAGGLER or errors > self.config.max_error_retries:
                    group.rollouts[index] = rollout
                    break
            group.failed.append(rollout)
        if group.finished:
            self._took(self.now() - group.began)
            self.finished.put_nowait(_finish(group))

    def _took(self, seconds: float) -> None:
        """Remember how long a group took."""
        self._durations.append(seconds)
        factor = self.config.straggler_factor
        if factor is not None and self.config.max_staleness and len(self._durations) >= FEWEST_GROUPS:
            self._late_after = factor * median(self._durations)

    def _late(self) -> int:
        """Groups in progress that do not hold a place any more."""
        if self._late_after is None:
            return 0
        since = self.now() - self._late_after
        late = sum(not group.finished and group.began < since for group in self.open.values() if group.tasks)
        return min(late, max(1, self.config.batch_size // self.config.rollouts_per_example // LATE_SHARE))

    def _ended(self, group: OpenGroup, task: "asyncio.Task[None]") -> None:
        self.inflight -= 1
        group.tasks.discard(task)
        failed = task.cancelled() or task.exception() is not None
        if failed and not group.broken_off:
            self._closed = True  # the run ends
        self.pump()

    def _spec(self, group: OpenGroup, index: int, attempt: int) -> RolloutSpec:
        return RolloutSpec(
            rollout_id=f"g{group.id}-{index}",
            group_id=group.id,
            env=group.task.env,
            task=group.task.task,
            env_seed=group.task.env_seed,
            sampling_seed=derive_seed(self.seed, "rollout", group.id, index, attempt),
            attempt=attempt,
        )

    def _note(self, rollout: Rollout) -> None:
        """Remember how an attempt ended; raises TooManyErrors when most do so badly."""
        self._outcomes.append(rollout.error)
        errors = [error for error in self._outcomes if error is not None]
        share = len(errors) / len(self._outcomes)
        enough = len(self._outcomes) >= max(FEWEST_ATTEMPTS, self.config.batch_size)
        if rollout.ok or not enough or share <= self.config.max_error_share or self._closed:
            return
        self._closed = True
        reasons = list(dict.fromkeys(reversed(errors)))[:REASONS_SHOWN]
        raise TooManyErrors(
            f"{len(errors)} of the last {len(self._outcomes)} rollouts ended with an error, more than "
            f"orchestrator.max_error_share = {self.config.max_error_share:g} allows. Reasons: " + " | ".join(reasons)
        )


def _finish(group: OpenGroup) -> FinishedGroup:
    done = tuple(rollout for rollout in group.rollouts if rollout is not None)
    return FinishedGroup(group.id, group.task, done, tuple(group.failed))
