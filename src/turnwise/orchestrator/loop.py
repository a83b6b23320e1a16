"""The orchestrator's life: serve each version as it comes, keep rollouts going, write batches, evaluate."""

import asyncio
import time
from typing import Any

from turnwise.config import RLConfig
from turnwise.inference.client import InferenceClient
from turnwise.monitor import Verdict
from turnwise.orchestrator.batches import BatchBuilder
from turnwise.orchestrator.buffer import TaskBuffer
from turnwise.orchestrator.chat import load_chat
from turnwise.orchestrator.console import batch_line, pick_samples, render_rollout
from turnwise.orchestrator.env_threads import EnvThreads
from turnwise.orchestrator.environments import load_setups
from turnwise.orchestrator.evaluate import Evaluator
from turnwise.orchestrator.evaluations import Evaluations
from turnwise.orchestrator.filters import Fate
from turnwise.orchestrator.metrics import batch_metrics
from turnwise.orchestrator.record import Recorder, say
from turnwise.orchestrator.rollout import Player, RolloutSpec
from turnwise.orchestrator.scheduler import Scheduler
from turnwise.orchestrator.status import Pulse
from turnwise.orchestrator.trajectories import write_trajectories
from turnwise.orchestrator.types import Rollout
from turnwise.orchestrator.weights import Policy
from turnwise.transport import BatchLog, Control, Progress, RunDir, StopRequest, WeightsReady, WeightsStore

POLL_S = 0.02  # a stat() of a missing file costs about 2 us
STOP_POLL_S = 0.25
PATIENCE_LOG_S = 15.0  # between two lines that say what is being waited for


class StopRun(Exception):
    """The run is to end."""

    def __init__(self, request: StopRequest) -> None:
        super().__init__(request.reason)
        self.request = request


class TrainerSilent(Exception):
    """The trainer did not publish what was due."""


class Orchestrator:
    """One run, from the first version to the last evaluation.

    Args:
        config: resolved: `max_steps` is set, paths are absolute.
        client: open.
        resume_step: the step whose checkpoint the trainer starts from; 0 for a fresh run.
        progress: where the orchestrator stands, from the newest batch or the checkpoint.
        next_batch: the first batch to make.

    Raises:
        ValueError: `max_steps` is not set, or an environment or the model's chat template cannot be used.
    """

    def __init__(
        self, config: RLConfig, client: InferenceClient, *, resume_step: int, progress: Progress, next_batch: int
    ) -> None:
        if config.max_steps is None:
            raise ValueError("max_steps is not set; the orchestrator reads the resolved config.toml that `rl` writes")
        settings, run_dir = config.orchestrator, RunDir(config.output_dir)
        self.config, self.client, self.first_version, self.max_steps = config, client, resume_step, config.max_steps
        self.trajectories = config.trajectories_dir or run_dir.root / "trajectories"
        self.status_file, self.control = run_dir.status, Control(run_dir.root)
        self.log, self.store = BatchLog(run_dir.batches), WeightsStore(run_dir.weights)
        self.recorder = Recorder(config)
        self.group = asyncio.TaskGroup()
        self.threads = EnvThreads()
        chat = load_chat(config.model.name, chat_template=config.model.chat_template)
        self.player = Player(chat, self.threads, config.seq_len, settings.sampling.max_tokens, settings.straggler_timeout_s)
        self.policy = Policy(client, self.store, stop_ids=chat.stop_ids, max_loaded=config.adapter_slots)
        self.buffer = TaskBuffer(load_setups(settings.env, "train"), settings.buffer, config.seed)
        self.buffer.restore(progress.state.get("buffer", {}))
        self.scheduler = Scheduler(
            settings, self.buffer, self._play, self.group, seed=config.seed, version=lambda: self.policy.version
        )
        self.scheduler.restore(progress)
        self.builder = BatchBuilder(config, next_batch)
        self.evaluator = Evaluator(config, self.player, load_setups(settings.eval_env or settings.env, settings.eval.split))
        self.evaluations = Evaluations(
            self.evaluator,
            self.policy,
            self.recorder,
            self.group,
            max_inflight=self.scheduler.max_inflight,
            last=self.max_steps,
            heed=self._heed,
            changed=self._admit,
        )
        self.pulse = Pulse(tokens=lambda: self.policy.sampled_tokens, requests=lambda: self.policy.requests)
        self.phase = "waiting for weights"
        self.ending: StopRequest | None = None  # a verdict of our own that ends the run after a last evaluation
        self._batch_clock = time.monotonic()

    async def run(self) -> StopRequest | None:
        """Run to the last step; returns the request that ended it earlier.

        Raises:
            ExceptionGroup: of what went wrong in the parts that run side by side.
        """
        ended: StopRequest | None = None
        try:
            async with self.group:
                helpers = [self.group.create_task(self._watch_stop()), self.group.create_task(self._beat())]
                await self._serve_first()
                batches = self.group.create_task(self._make_batches())
                await self._follow_versions()
                batches.cancel()
                await self._end()
                for helper in helpers:
                    helper.cancel()
                ended = self.ending
        except* StopRun as stopped:
            ended = next(error.request for error in stopped.exceptions if isinstance(error, StopRun))
        finally:
            self.recorder.close()
            await self.policy.close()
            await self.threads.drain()
        return ended

    async def _play(self, spec: RolloutSpec) -> Rollout:
        temperature = self.config.orchestrator.sampling.temperature
        return await self.player.play(spec, self.policy.generator(temperature=temperature, affinity=spec.rollout_id))

    # --- versions -----------------------------------------------------------------------------------------------------

    async def _serve_first(self) -> None:
        waiting = self.group.create_task(_say_again(f"waiting for {len(self.client.replicas.all)} engine(s)"))
        await self.client.wait_healthy(self.config.inference.startup_timeout_s)
        waiting.cancel()
        waiting = self.group.create_task(_say_again(f"waiting for the trainer to publish policy v{self.first_version}"))
        ready = await self._await_version(self.first_version)
        waiting.cancel()
        assert ready is not None, "a verdict before the first version"
        await self.policy.swap(ready)
        say(f"policy v{ready.version} is served ({ready.kind}, digest {ready.digest[:12]} on every engine)")
        self._batch_clock = time.monotonic()

    async def _follow_versions(self) -> None:
        """Serve and record each version until the last, or until a verdict ends the run."""
        self._evaluate_if_due(self.first_version)
        for version in range(self.first_version + 1, self.max_steps + 1):
            self._admit()
            ready = await self._await_version(version)
            if ready is None:
                return
            newest = self.store.poll(version + 1) is None
            if newest or self.evaluations.due(version):
                await self.policy.swap(ready)
            self._heed(self.recorder.trained(ready, {"timing/swap_s": self.policy.swap_s, **self.pulse.take()}))
            self._evaluate_if_due(version)

    async def _await_version(self, version: int) -> WeightsReady | None:
        """Poll for a version; None when a verdict ends the run before it comes.

        Raises:
            TrainerSilent: it did not come within `trainer.timeout_s` seconds after the trainer had what it needs to make it.
        """
        limit, due_since = self.config.trainer.timeout_s, None
        while (ready := self.store.poll(version)) is None:
            now = time.monotonic()
            first = version == self.first_version
            if self.ending is not None and not first:
                return None
            if due_since is None and (first or version < self.builder.step):
                due_since = now
            if due_since is not None and now - due_since > limit:
                raise TrainerSilent(f"no policy v{version} within trainer.timeout_s = {limit:g} s; see logs/trainer.stdout")
            await asyncio.sleep(POLL_S)
        return ready

    def _heed(self, verdict: Verdict | None) -> None:
        """Act on a verdict about the run."""
        if verdict is None:
            return
        say(f"{verdict.kind}: {verdict.reason}")
        if verdict.kind == "abort":
            self.control.request_stop("abort", verdict.reason)
            raise StopRun(StopRequest("abort", verdict.reason))
        if self.config.stop.stop_on_success:
            self.ending = StopRequest("success", verdict.reason)

    def _evaluate_if_due(self, version: int) -> None:
        if self.evaluations.due(version):
            self.evaluations.start(version, alone=version in (self.first_version, self.max_steps))

    async def _end(self) -> None:
        """After the last step, or a verdict: the last evaluation, and then the word to the others."""
        self.phase = "evaluating"
        self.scheduler.close()
        version = self.policy.version
        if self.ending is not None and not self.evaluations.known(version):
            self.evaluations.start(version, alone=True)
        await self.evaluations.finished()
        if self.ending is not None:
            self.control.request_stop(self.ending.kind, self.ending.reason)
        self.phase = "done"
        self.pulse.write(self.status_file, self._status())

    # --- batches ------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Tell the scheduler how many groups may be open."""
        hold = self.ending is not None or self.evaluations.training_waits
        self.scheduler.set_capacity(0 if hold else self.builder.capacity(self.policy.version, self.max_steps))

    async def _make_batches(self) -> None:
        while self.builder.step <= self.max_steps:
            group = await self.scheduler.finished.get()
            self.scheduler.settle(group)
            rounds = self.builder.rounds
            self.builder.add(group)
            self._admit()  # before anything else gets to run: a settled group frees no place beyond this batch's
            if self.builder.rounds > rounds:
                most = self.config.orchestrator.filters.max_rounds
                say(f"batch {self.builder.step}: no group of round {rounds} of at most {most} carries signal; again")
            if self.builder.complete:
                await self._emit()

    async def _emit(self) -> None:
        """Write the batch that is complete and begin the next."""
        builder, now = self.builder, time.monotonic()
        for judged in builder.in_order():
            known = judged.fate in (Fate.SIGNAL, Fate.EQUAL)
            self.buffer.observe(judged.group.id, judged.group.task, [r.reward for r in judged.group.valid] if known else [])
        progress = Progress(self.scheduler.next_group, self.scheduler.pending, {"buffer": self.buffer.state()})
        seconds, self._batch_clock = now - self._batch_clock, now
        metrics = await asyncio.to_thread(self._write, builder, progress, seconds)
        self.recorder.batch_written(builder.step, metrics)
        say(batch_line(builder.step, self.max_steps, builder.in_order(), metrics))
        for rollout in pick_samples(builder.in_order(), self.config.monitor.log_samples):
            print(render_rollout(rollout), flush=True)
        self.builder = builder.next()
        for stale in self.scheduler.drop_older_than(self.builder.oldest_allowed):
            self.scheduler.settle(stale)
            self.builder.drop_stale(stale)
        self._admit()

    def _write(self, builder: BatchBuilder, progress: Progress, seconds: float) -> dict[str, float]:
        """Write a batch with its trajectories, off the event loop, and return its metrics."""
        samples = builder.samples()
        metrics = batch_metrics(builder, samples, seconds=seconds)
        write_trajectories(self.trajectories, builder)
        self.log.write(builder.build(samples, progress, metrics))
        return metrics

    # --- beside the work ----------------------------------------------------------------------------------------------

    async def _watch_stop(self) -> None:
        while True:  # the request is a file, which nothing announces
            request = self.control.stop_request()
            if request is not None and self.ending is None:
                raise StopRun(request)
            await asyncio.sleep(STOP_POLL_S)

    async def _beat(self) -> None:
        await self.pulse.beat(self.status_file, self._status)

    def _status(self) -> dict[str, Any]:
        version = max(self.policy.version, 0)
        return {
            "phase": self._phase_now(),
            "step": min(self.builder.step, self.max_steps),
            "filled": self.builder.rollouts,
            "batch_size": self.config.orchestrator.batch_size,
            "inflight": self.scheduler.inflight,
            "version": version,
            "lag": max(0, self.builder.step - 1 - version),
            "eval_done": self.evaluator.done,
            "eval_total": self.evaluator.total,
        }

    def _phase_now(self) -> str:
        if self.policy.version < 0 or self.phase in ("evaluating", "done"):
            return self.phase
        if self.scheduler.inflight:
            return "rollouts"
        return "evaluating" if self.evaluator.total else "waiting for trainer"


async def _say_again(text: str) -> None:
    """Say what is being waited for, now and then, until cancelled."""
    began = time.monotonic()
    while True:
        say(f"{text} ({time.monotonic() - began:.0f} s)")
        await asyncio.sleep(PATIENCE_LOG_S)
