"""When the policy is evaluated: before the first step, at the interval, and always at the end; beside training."""

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack

from turnwise.config import EvalConfig
from turnwise.monitor import Verdict
from turnwise.orchestrator.evaluate import Evaluator
from turnwise.orchestrator.record import Recorder, say
from turnwise.orchestrator.weights import Policy

SHARE = 4  # an evaluation beside training gets one in so many of the rollouts in flight
PROGRESS_S = 15.0  # between two lines about an evaluation under way
MOST_OPEN = 2  # evaluations under way or waiting, each with a pinned version; training waits beyond


class Evaluations:
    """Runs evaluations one after the other in a task group.

    Args:
        max_inflight: rollouts in flight that the engines are meant for.
        last: the last version of the run.
        heed: what to do about the verdict on an evaluation's metrics.
        changed: called when an evaluation has ended.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        policy: Policy,
        recorder: Recorder,
        group: asyncio.TaskGroup,
        *,
        max_inflight: int,
        last: int,
        heed: Callable[[Verdict | None], None],
        changed: Callable[[], None],
    ) -> None:
        self.settings: EvalConfig = evaluator.config
        self.evaluator, self.policy, self.recorder = evaluator, policy, recorder
        self.max_inflight, self.last = max_inflight, last
        self.open = 0
        self._started: set[int] = set()
        self._group, self._heed, self._changed = group, heed, changed
        self._newest: asyncio.Task[None] | None = None

    @property
    def training_waits(self) -> bool:
        """Whether so many evaluations are behind that their pinned versions would fill the engines' adapter slots; with noise,
        whether any is, since it needs norms without."""
        return self.open >= (1 if self._always_alone else MOST_OPEN)

    @property
    def _always_alone(self) -> bool:
        return self.policy.noise is not None

    def due(self, version: int) -> bool:
        """Whether a version is to be evaluated and has not been (a resumed run keeps what it knew)."""
        interval = self.settings.interval
        at_interval = interval is not None and version > 0 and version % interval == 0
        wanted = (version == 0 and self.settings.at_start) or at_interval or version == self.last
        return wanted and not self.known(version)

    def known(self, version: int) -> bool:
        """Whether a version has been evaluated or is about to be."""
        return version in self._started or self.recorder.has_evaluated(version)

    def start(self, version: int, *, alone: bool) -> None:
        """Evaluate a served version after the evaluations before it; it stays pinned from now on.

        Args:
            alone: training does not need the engines meanwhile.
        """
        pin = ExitStack()
        pin.enter_context(self.policy.pinned(version))
        self.open += 1
        self._started.add(version)
        self._newest = self._group.create_task(self._run(version, pin, self._newest, alone))

    async def finished(self) -> None:
        """Wait for all that were started."""
        if self._newest is not None:
            await asyncio.wait([self._newest])

    async def _run(self, version: int, pin: ExitStack, before: "asyncio.Task[None] | None", alone: bool) -> None:
        with pin:
            if before is not None:
                await asyncio.wait([before])
            share = max(1, self.max_inflight // (1 if alone or self._always_alone else SHARE))
            say(f"evaluating policy v{version}: {len(self.evaluator.specs())} held-out rollouts, {share} at a time")
            async with self.policy.without_noise():
                result = await self.evaluator.run(self.policy, version, concurrency=share, progress=_told_now_and_then())
        self.open -= 1
        self._heed(self.recorder.evaluated(result))
        self._changed()


def _told_now_and_then() -> Callable[[int, int], None]:
    """A progress function that says a line at most every `PROGRESS_S`."""
    told = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > PROGRESS_S:
            told = time.monotonic()
            say(f"evaluation: {done} of {total} rollouts")

    return progress
