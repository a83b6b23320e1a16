"""Evaluation on held-out tasks, with one pinned policy version, beside training."""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from turnwise.config import EvalConfig, RLConfig
from turnwise.envs.containers import containers_of
from turnwise.inference.client import InferenceClient
from turnwise.monitor.estimate import over_tasks
from turnwise.orchestrator.chat import load_chat
from turnwise.orchestrator.env_threads import EnvThreads
from turnwise.orchestrator.environments import EnvSetup, load_setups
from turnwise.orchestrator.rollout import Player, RolloutSpec, derive_seed
from turnwise.orchestrator.types import Rollout
from turnwise.orchestrator.weights import Policy
from turnwise.transport import RunDir, WeightsStore, write_atomic

if TYPE_CHECKING:
    from turnwise.envs.base import Pools

Metrics = dict[str, float]


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found; `metrics` under the names of docs/metrics.md."""

    step: int
    version: int
    metrics: Metrics
    rollouts: list[dict[str, Any]]

    def write(self, folder: Path) -> None:
        """Write `step_N.json`. Raises OSError when the file system refuses."""
        content = {"step": self.step, "version": self.version, "metrics": self.metrics, "rollouts": self.rollouts}
        write_atomic(folder / f"step_{self.step}.json", msgspec.json.format(msgspec.json.encode(content), indent=1))


class Evaluator:
    """Plays the held-out tasks. The same tasks and seeds at every version, so that two evaluations differ by policy alone."""

    def __init__(self, config: RLConfig, player: Player, setups: Sequence[EnvSetup]) -> None:
        self.config: EvalConfig = config.orchestrator.eval
        self.seed, self.retries = config.seed, config.orchestrator.max_error_retries
        self.player, self.setups = player, setups
        player.offer_tools(setups)
        self.done = self.total = 0
        self._progress: Callable[[int, int], None] | None = None

    def specs(self) -> list[RolloutSpec]:
        return [
            RolloutSpec(
                rollout_id=f"eval-{env.name}-{index}-{copy}",
                group_id=index,
                env=env,
                task=env.tasks[index],
                env_seed=derive_seed(self.seed, "eval env", env.name, index) % 2**31,
                sampling_seed=derive_seed(self.seed, "eval", env.name, index, copy),
            )
            for env in self.setups
            for index in range(min(len(env.tasks), self.config.num_examples or len(env.tasks)))
            for copy in range(self.config.rollouts_per_example)
        ]

    async def run(
        self, policy: Policy, version: int, *, concurrency: int, progress: Callable[[int, int], None] | None = None
    ) -> EvalResult:
        """Evaluate a served version with at most `concurrency` rollouts at a time; `progress(done, total)` after each."""
        specs = self.specs()
        self.done, self.total, self._progress = 0, len(specs), progress
        share = asyncio.Semaphore(concurrency)
        with policy.pinned(version):
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._play(spec, policy, version, share)) for spec in specs]
        rollouts = [task.result() for task in tasks]
        metrics: Metrics = {}
        for env in self.setups:
            metrics |= eval_metrics(env.name, [rollout for rollout in rollouts if rollout.env == env.name])
        self.done = self.total = 0
        return EvalResult(version, version, metrics, [rollout.summary() for rollout in rollouts])

    async def _play(self, spec: RolloutSpec, policy: Policy, version: int, share: asyncio.Semaphore) -> Rollout:
        async with share:
            generate = policy.generator(temperature=self.config.temperature, affinity=spec.rollout_id, version=version)
            rollout = await self.player.play(spec, generate)
            for attempt in range(1, self.retries + 1):
                if rollout.ok:
                    break
                again = replace(spec, attempt=attempt, sampling_seed=derive_seed(spec.sampling_seed, attempt))
                rollout = await self.player.play(again, generate)
        self.done += 1
        if self._progress is not None:
            self._progress(self.done, self.total)
        return rollout


def eval_metrics(env: str, rollouts: Sequence[Rollout]) -> Metrics:
    """Means with standard errors over tasks; errored rollouts are counted and enter no mean.

    A reward component that a rollout did not earn is 0 there, as in training; a metric that it does not report is left out.
    """
    valid = [rollout for rollout in rollouts if rollout.ok]
    core, aux = f"val-core/{env}", f"val-aux/{env}"
    metrics: Metrics = {f"{aux}/errored/count": float(len(rollouts) - len(valid)), f"{aux}/rollouts/count": float(len(valid))}
    if not valid:
        return metrics
    metrics |= _estimate(f"{core}/reward", valid, [rollout.reward for rollout in valid])
    components = {name for rollout in valid for name in rollout.components}
    for name in sorted(components.union(*(rollout.metrics for rollout in valid))):
        absent = 0.0 if name in components else None
        told = [(r, r.metrics[name] if name in r.metrics else r.components.get(name, absent)) for r in valid]
        known = [(rollout, value) for rollout, value in told if value is not None]
        place = f"{core}/acc" if name == "acc" else f"{aux}/{name}"
        metrics |= _estimate(place, [rollout for rollout, _ in known], [value for _, value in known])
    metrics |= _estimate(f"{aux}/reward_dense", valid, [rollout.reward_dense for rollout in valid])
    metrics |= _estimate(f"{aux}/reward_sparse", valid, [rollout.reward_sparse for rollout in valid])
    metrics |= _estimate(f"{aux}/response_length", valid, [float(rollout.sampled_tokens) for rollout in valid])
    metrics |= _estimate(f"{aux}/num_turns", valid, [float(len(rollout.turns)) for rollout in valid])
    return metrics | _diversity(aux, valid)


def _estimate(name: str, rollouts: Sequence[Rollout], values: Sequence[float]) -> Metrics:
    mean, error = over_tasks((rollout.task_id, value) for rollout, value in zip(rollouts, values, strict=True))
    return {f"{name}/mean": mean} | ({} if error is None else {f"{name}/stderr": error})


def _diversity(area: str, rollouts: Sequence[Rollout]) -> Metrics:
    """How varied the replies are; a policy that always says the same has entropy 0 and one distinct reply."""
    replies = [reply.strip() for rollout in rollouts for reply in rollout.replies()]
    first = Counter(rollout.replies()[0].strip() for rollout in rollouts if rollout.replies())
    total = sum(first.values())
    if not total:
        return {}
    entropy = -sum(count / total * math.log(count / total) for count in first.values())
    return {
        f"{area}/distinct_replies/share": len(set(replies)) / len(replies),
        f"{area}/distinct_replies/count": float(len(set(replies))),
        f"{area}/reply_entropy/mean": entropy + 0.0,
    }


def load_evaluator(config: RLConfig, threads: EnvThreads, containers: "Pools | None" = None) -> Evaluator:
    """The evaluator of a config: its held-out tasks and its chat.

    Raises:
        ValueError: an environment or the model's chat template cannot be used.
    """
    settings = config.orchestrator
    chat = load_chat(config.model.name, chat_template=config.model.chat_template, tool_format=config.model.tool_format)
    player = Player.of(config, chat, threads)
    envs, wait_s = settings.eval_env or settings.env, config.containers.wait_s
    return Evaluator(config, player, load_setups(envs, settings.eval.split, containers=containers, wait_s=wait_s))


async def evaluate_checkpoint(
    config: RLConfig,
    adapter_or_model_dir: Path | None,
    version: int,
    client: InferenceClient,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint with engines that run already, as `turnwise eval` does.

    Args:
        adapter_or_model_dir: a PEFT adapter folder is loaded beside the base model, a model folder replaces its weights,
            None takes the engine as it is.
        version: number under which the checkpoint is served and reported.
        client: open, engines healthy.
        progress: called with (rollouts done, rollouts in all) after each.

    Returns:
        {"step", "version", "metrics", "rollouts"}, as in evals/step_N.json.
    """
    with containers_of(config) as containers:
        threads = EnvThreads()
        evaluator = load_evaluator(config, threads, containers)
        return await _evaluated(config, evaluator, adapter_or_model_dir, version, client, progress)


async def _evaluated(
    config: RLConfig,
    evaluator: Evaluator,
    folder: Path | None,
    version: int,
    client: InferenceClient,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    policy = Policy(client, WeightsStore(RunDir(config.output_dir).weights), stop_ids=evaluator.player.chat.stop_ids)
    policy.kind = "lora" if folder is not None and (folder / "adapter_config.json").is_file() else "full"
    if folder is not None:
        await _serve(client, folder, version, policy.kind)
    client.set_served(version)
    concurrency = config.orchestrator.inflight_limit
    try:
        result = await evaluator.run(policy, version, concurrency=concurrency, progress=progress)
    finally:
        await evaluator.player.threads.drain()
        if policy.kind == "lora":
            await client.unload_adapter(version)
    return {"step": result.step, "version": result.version, "metrics": result.metrics, "rollouts": result.rollouts}


async def _serve(client: InferenceClient, folder: Path, version: int, kind: str) -> None:
    """Put a checkpoint into the engines: an adapter beside the base model, or a model in its place."""
    if kind == "lora":
        await client.load_adapter(version, str(folder))
        return
    await client.pause()
    await client.reload_weights(str(folder))
    await client.resume()
