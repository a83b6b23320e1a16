"""From finished groups to batches that are written: what the trainer waits for."""

import asyncio
import time
from collections.abc import Callable

from turnwise.config import RLConfig
from turnwise.orchestrator.batches import BatchBuilder
from turnwise.orchestrator.buffer import TaskBuffer
from turnwise.orchestrator.console import batch_line, pick_samples, render_rollout
from turnwise.orchestrator.filters import Fate, NoSignal
from turnwise.orchestrator.metrics import batch_metrics
from turnwise.orchestrator.record import Recorder, say
from turnwise.orchestrator.scheduler import Scheduler
from turnwise.orchestrator.trajectories import write_trajectories
from turnwise.orchestrator.weights import Policy
from turnwise.transport import BatchLog, Progress, RunDir


class BatchMaker:
    """Takes groups from the scheduler until they make a batch, writes it, and begins the next one.

    Args:
        config: resolved.
        scheduler: whose finished groups are taken.
        buffer: told which rewards the groups of each task had.
        policy: which rollouts are sampled from.
        recorder: keeps each batch's metrics.
        first: number of the first batch.
        changed: called whenever groups have been settled, before anything else gets to run.
    """

    def __init__(
        self,
        config: RLConfig,
        *,
        scheduler: Scheduler,
        buffer: TaskBuffer,
        policy: Policy,
        recorder: Recorder,
        first: int,
        changed: Callable[[], None],
    ) -> None:
        run_dir = RunDir(config.output_dir)
        self.config, self.scheduler, self.buffer, self.policy, self.recorder = config, scheduler, buffer, policy, recorder
        self.builder = BatchBuilder(config, first)  # of the batch being filled
        self.log = BatchLog(run_dir.batches)
        self.trajectories = config.trajectories_dir or run_dir.root / "trajectories"
        self._changed = changed
        self._begun = time.monotonic()

    def begin(self) -> None:
        """The first rollouts begin now."""
        self._begun = time.monotonic()

    async def make(self, last: int) -> None:
        """Make all batches up to number `last`.

        Raises:
            NoSignal: group after group carries none.
        """
        while self.builder.step <= last:
            group = await self.scheduler.finished.get()
            self.scheduler.settle(group)
            rounds = self.builder.rounds
            try:
                self.builder.add(group)
            except NoSignal:
                write_trajectories(self.trajectories, self.builder)  # of a batch that never comes: to see what was all equal
                raise
            self._changed()  # before anything else gets to run: a settled group frees no place beyond this batch's
            if self.builder.rounds > rounds:
                most = self.config.orchestrator.filters.max_rounds
                say(f"batch {self.builder.step}: no group of round {rounds} of at most {most} carries signal; again")
            if self.builder.complete:
                await self._emit(last)

    async def _emit(self, last: int) -> None:
        """Write the batch that is complete and begin the next."""
        builder, now = self.builder, time.monotonic()
        for judged in builder.in_order():
            known = judged.fate in (Fate.SIGNAL, Fate.EQUAL)
            self.buffer.observe(judged.group.id, judged.group.task, [r.reward for r in judged.group.valid] if known else [])
        progress = Progress(self.scheduler.next_group, self.scheduler.pending, {"buffer": self.buffer.state()})
        seconds, self._begun = now - self._begun, now
        metrics = await asyncio.to_thread(self._write, builder, progress, seconds)
        self.recorder.batch_written(builder.step, metrics)
        say(batch_line(builder.step, last, builder.in_order(), metrics))
        for rollout in pick_samples(builder.in_order(), self.config.monitor.log_samples):
            print(render_rollout(rollout), flush=True)
        self.builder = builder.next()
        for stale in self.scheduler.drop_older_than(self.builder.oldest_allowed):
            self.scheduler.settle(stale)
            self.builder.drop_stale(stale)
        self._changed()

    def _write(self, builder: BatchBuilder, progress: Progress, seconds: float) -> dict[str, float]:
        """Write a batch with its trajectories, off the event loop, and return its metrics."""
        samples = builder.samples()
        metrics = batch_metrics(builder, samples, seconds=seconds, served=self.policy.version) | self.policy.noise_metrics()
        self.log.write(builder.build(samples, progress, metrics))  # first: the trainer may be waiting for it
        write_trajectories(self.trajectories, builder)
        return metrics
