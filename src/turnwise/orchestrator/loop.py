"""The orchestrator's life: serve each version as it comes, keep rollouts going, write batches, evaluate."""

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

from turnwise.config import RLConfig
from turnwise.inference.client import InferenceClient
from turnwise.inference.load import LoadWatch
from turnwise.monitor import Verdict
from turnwise.orchestrator.admission import Admission
from turnwise.orchestrator.balance import Balance
from turnwise.orchestrator.batch_maker import BatchMaker
from turnwise.orchestrator.buffer import TaskBuffer, only_tasks
from turnwise.orchestrator.canary import CanaryWatch
from turnwise.orchestrator.chat import load_chat
from turnwise.orchestrator.env_threads import EnvThreads
from turnwise.orchestrator.environments import load_setups
from turnwise.orchestrator.evaluate import Evaluator
from turnwise.orchestrator.evaluations import Evaluations
from turnwise.orchestrator.noise import EngineNoise
from turnwise.orchestrator.record import Recorder, say, say_again
from turnwise.orchestrator.rollout import Player, RolloutSpec
from turnwise.orchestrator.scheduler import Scheduler
from turnwise.orchestrator.status import Pulse
from turnwise.orchestrator.stopping import StopRun, watch_stop
from turnwise.orchestrator.types import Rollout
from turnwise.orchestrator.versions import await_version
from turnwise.orchestrator.waits import Blocked
from turnwise.orchestrator.weights import Policy
from turnwise.transport import Control, Progress, RunDir, StopRequest, WeightsReady, WeightsStore

if TYPE_CHECKING:
    from turnwise.envs.base import Pools


class Orchestrator:
    """One run, from the first version to the last evaluation.

    Args:
        config: resolved: `max_steps` is set, paths are absolute.
        client: open.
        resume_step: the step whose checkpoint the trainer starts from; 0 for a fresh run.
        progress: where the orchestrator stands, from the newest batch or the checkpoint.
        next_batch: the first batch to make.
        containers: for environments that work in some.

    Raises:
        ValueError: `max_steps` is not set, or an environment or the model's chat template cannot be used.
    """

    def __init__(
        self,
        config: RLConfig,
        client: InferenceClient,
        *,
        resume_step: int,
        progress: Progress,
        next_batch: int,
        containers: "Pools | None" = None,
    ) -> None:
        if config.max_steps is None:
            raise ValueError("max_steps is not set; the orchestrator reads the resolved config.toml that `rl` writes")
        settings, run_dir = config.orchestrator, RunDir(config.output_dir)
        self.config, self.client, self.first_version, self.max_steps = config, client, resume_step, config.max_steps
        self.status_file, self.control = run_dir.status, Control(run_dir.root)
        self.store = WeightsStore(run_dir.weights)
        self.recorder, self.group, self.threads = Recorder(config), asyncio.TaskGroup(), EnvThreads()
        chat = load_chat(config.model.name, chat_template=config.model.chat_template, tool_format=config.model.tool_format)
        self.player = Player.of(config, chat, self.threads)
        load = partial(load_setups, containers=containers, wait_s=config.containers.wait_s)
        setups = only_tasks(load(settings.env, "train"), settings.buffer.tasks)
        self.player.offer_tools(setups)
        noise = EngineNoise.of(config, client, examples=sum(len(env.tasks) for env in setups))
        self.policy = Policy(
            client,
            self.store,
            stop_ids=chat.stop_ids,
            max_loaded=config.adapter_slots,
            noise=noise,
            seeds=config.request_seeds,
        )
        self.canaries = CanaryWatch(self.policy, self.group)
        self.buffer = TaskBuffer(setups, settings.buffer, config.seed)
        self.buffer.restore(progress.state.get("buffer", {}))
        self.admission = Admission(max_waiting_share=config.inference.max_waiting_share, most=settings.inflight_limit)
        self.scheduler = Scheduler(
            settings,
            self.buffer,
            self._play,
            self.group,
            seed=config.seed,
            version=lambda: self.policy.version,
            admits=self.admission.allows,
        )
        self.scheduler.restore(progress)
        self.maker = BatchMaker(
            config,
            scheduler=self.scheduler,
            buffer=self.buffer,
            policy=self.policy,
            recorder=self.recorder,
            first=next_batch,
            changed=self._admit,
        )
        self.evaluator = Evaluator(config, self.player, load(settings.eval_env or settings.env, settings.eval.split))
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
        self.engines = LoadWatch(client.replicas.all)
        self.balance = Balance(client.replicas.all, self.scheduler.waits, self._levels)
        self.pulse = Pulse(tokens=lambda: self.policy.sampled_tokens, tick=self.balance.tick)
        self.trained = resume_step  # newest version that the trainer has published
        self.phase = "waiting for weights"
        self.ending: StopRequest | None = None  # a verdict of our own that ends the run after a last evaluation

    async def run(self) -> StopRequest | None:
        """Run to the last step; returns the request that ended it earlier.

        Raises:
            ExceptionGroup: of what went wrong in the parts that run side by side.
        """
        ended: StopRequest | None = None
        try:
            async with self.group:
                stopping = watch_stop(self.control, ending=lambda: self.ending is not None)
                beating = self.pulse.beat(self.status_file, self._status)
                helpers = [self.group.create_task(helper) for helper in (stopping, beating)]
                await self._serve_first()
                helpers.append(self.group.create_task(self.engines.watch(self._load_told)))
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
        waiting = self.group.create_task(say_again(f"waiting for {len(self.client.replicas.all)} engine(s)"))
        await self.client.wait_healthy(self.config.inference.startup_timeout_s)
        waiting.cancel()
        waiting = self.group.create_task(say_again(f"waiting for the trainer to publish policy v{self.first_version}"))
        ready = await self._await_version(self.first_version)
        waiting.cancel()
        assert ready is not None, "a verdict before the first version"
        await self.policy.swap(ready)
        say(f"policy v{ready.version} is served ({ready.kind}, digest {ready.digest[:12]} on every engine)")
        self.balance.begin()
        self.maker.begin()

    async def _follow_versions(self) -> None:
        """Serve and record each version until the last, or until a verdict ends the run."""
        self._evaluate_if_due(self.first_version)
        for version in range(self.first_version + 1, self.max_steps + 1):
            self._admit()
            ready = await self._await_version(version)
            if ready is None:
                return
            self.trained = version
            skippable = ready.transfer == "files" and self.store.poll(version + 1) is not None  # a broadcast waits for us
            if not skippable or self.evaluations.due(version):
                await self.policy.swap(ready)
                self.canaries.ask(ready)
                self._evaluate_if_due(version)  # before rollouts begin: with noise it has the engines to itself
                self._admit()  # at once: the engines may stand idle
            measured = {**self.pulse.take(), **self.balance.take(), **self.canaries.take()}
            self._heed(self.recorder.trained(ready, {"timing/swap_s": self.policy.swap_s, **measured}))

    async def _await_version(self, version: int) -> WeightsReady | None:
        """None when a verdict ends the run before the version comes."""
        first = version == self.first_version
        return await await_version(
            self.store,
            version,
            due=lambda: first or version < self.maker.builder.step,
            over=lambda: self.ending is not None and not first,
            timeout_s=self.config.trainer.timeout_s,
        )

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
        """Tell the scheduler how many groups may be open, and what that is owed to."""
        version, builder = self.policy.version, self.maker.builder
        if self.ending is not None:
            self.scheduler.set_capacity(0, Blocked.END)
        elif self.evaluations.training_waits:
            self.scheduler.set_capacity(0, Blocked.EVALUATION)
        else:
            why = Blocked.STALENESS if builder.newest_batch(version) < self.max_steps else Blocked.END
            self.scheduler.set_capacity(builder.capacity(version, self.max_steps), why)

    async def _make_batches(self) -> None:
        await self.maker.make(self.max_steps)
        self.balance.end()

    # --- beside the work ----------------------------------------------------------------------------------------------

    def _load_told(self) -> None:
        """The engines have said how busy they are."""
        self.balance.loads(self.engines.loads)
        self.admission.update(self.engines.loads, self.scheduler.inflight)
        self.scheduler.pump()

    def _levels(self) -> dict[str, float]:
        return {
            "queue/inflight/mean": self.scheduler.inflight,
            "queue/groups/mean": self.scheduler.finished.qsize() + len(self.maker.builder.taken),
            "queue/batches/mean": max(
                0, self.maker.builder.step - 1 - self.trained - 1
            ),  # one of those written is being trained on
            "perf/evaluation/share": float(self.evaluations.open > 0),
        }

    def _status(self) -> dict[str, Any]:
        version, builder = max(self.policy.version, 0), self.maker.builder
        return {
            "phase": self._phase_now(),
            "step": min(builder.step, self.max_steps),
            "filled": builder.rollouts,
            "batch_size": self.config.orchestrator.batch_size,
            "inflight": self.scheduler.inflight,
            "held_by": self.scheduler.waits.state if self.scheduler.waits.weight else None,
            "engines_waiting": sum(load.waiting for load in self.engines.loads if load is not None),
            "version": version,
            "lag": max(0, builder.step - 1 - version),
            "eval_done": self.evaluator.done,
            "eval_total": self.evaluator.total,
            "learning": self.recorder.learning.as_dict(),
        }

    def _phase_now(self) -> str:
        if self.policy.version < 0 or self.phase in ("evaluating", "done"):
            return self.phase
        if self.scheduler.inflight:
            return "rollouts"
        return "evaluating" if self.evaluator.total else "waiting for trainer"
