"""A run folder as a finished Wordle run would leave it, with planted curves."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Curve = Callable[[float], float]  # of the share of the run that has passed, 0 to 1

CONFIG = """
run_name = "planted"
max_steps = {steps}
seed = {seed}
[model]
name = "smollm2-135m"
[orchestrator]
batch_size = 32
rollouts_per_example = 8
[[orchestrator.env]]
id = "wordle"
[trainer.optim]
lr = 2e-4
[stop]
success_when = "running_mean(total_reward) > 0.5"
window = 5
"""
COMPONENTS: dict[str, Curve] = {"format": lambda x: min(1.0, 2 * x), "feedback": lambda x: 0.4 * x, "win": lambda x: 0.0}
WORDS = [f"{a}{b}{c}{d}e" for a in "cst" for b in "lr" for c in "aio" for d in "nmtk"]


def plant_run(
    root: Path,
    *,
    steps: int = 40,
    seed: int = 0,
    components: dict[str, Curve] = COMPONENTS,
    metrics: dict[str, Curve] | None = None,
    eval_every: int = 10,
    reply: Callable[[random.Random], str] = lambda rng: rng.choice(WORDS),
) -> Path:
    """Fill `root`. `metrics` are further curves, or replace those planted here."""
    rng = random.Random(seed)
    (root / "evals").mkdir(parents=True)
    (root / "trajectories").mkdir()
    (root / "checkpoints" / f"step_{steps}").mkdir(parents=True)
    (root / "config.toml").write_text(CONFIG.format(steps=steps, seed=seed))
    curves = _curves(components) | (metrics or {})
    lines: list[dict[str, Any]] = []
    for step in range(steps + 1):
        share = step / steps
        if step % eval_every == 0 or step == steps:
            lines.append({"step": step, "time": 1.0} | _evaluate(root, step, share, components, rng, reply))
        if step:
            noise = {name: curve(share) + rng.gauss(0, 0.03) * abs(curve(share)) for name, curve in curves.items()}
            lines.append(
                {"step": step, "time": 1.0} | noise | ((metrics and {name: metrics[name](share) for name in metrics}) or {})
            )
            rollouts = [_rollout(index, share, components, rng, reply) for index in range(8)]
            (root / "trajectories" / f"step_{step}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rollouts))
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def _curves(components: dict[str, Curve]) -> dict[str, Curve]:
    return {
        "critic/reward/mean": lambda x: sum(curve(x) for curve in components.values()),
        "actor/loss": lambda x: 0.02 - 0.01 * x,
        "actor/grad_norm": lambda x: 0.4 + 0.2 * math.sin(9 * x),
        "actor/entropy": lambda x: 2.2 - 1.2 * x,
        "actor/kl": lambda x: 0.001 + 0.004 * x,
        "mismatch/kl/mean": lambda x: 1e-4,
        "mismatch/logprob_abs/mean": lambda x: 0.004,
        "groups/equal_reward/share": lambda x: 0.2 + 0.2 * x,
        "staleness/mean": lambda x: 0.8,
        "staleness/max": lambda x: 1.0,
        "response_length/mean": lambda x: 14 - 5 * x,
        "response_length/max": lambda x: 16.0,
        "response_length/min": lambda x: 5.0,
        "num_turns/mean": lambda x: 5.5,
        "env/win_rate/mean": lambda x: 0.1 * x,
        "timing/step_s": lambda x: 10.0,
        "timing/train_s": lambda x: 5.0,
        "timing/publish_s": lambda x: 0.4,
        "timing/wait_batch_s": lambda x: 4.0,
        "timing/rollout_s": lambda x: 8.5,
        "timing/swap_s": lambda x: 0.2,
        "perf/trainer_idle/share": lambda x: 0.4,
        "throughput/tokens_per_s": lambda x: 300.0,
    } | {f"reward/{name}/mean": curve for name, curve in components.items()}


def _evaluate(
    root: Path, step: int, share: float, components: dict[str, Curve], rng: random.Random, reply: Callable[[random.Random], str]
) -> dict[str, float]:
    found = {"val-core/wordle/reward": sum(curve(share) for curve in components.values()), "val-aux/wordle/win_rate": 0.1 * share}
    found |= {f"val-aux/wordle/{name}": curve(share) for name, curve in components.items()}
    metrics = {f"{name}/mean": value for name, value in found.items()} | {f"{name}/stderr": 0.03 for name in found}
    metrics |= {"val-aux/wordle/distinct_replies/share": 0.9, "val-aux/wordle/reply_entropy/mean": 3.0}
    rollouts = [_rollout(index, share, components, rng, reply) for index in range(12)]
    (root / "evals" / f"step_{step}.json").write_text(
        json.dumps({"step": step, "version": step, "metrics": metrics, "rollouts": rollouts})
    )
    return metrics


def _rollout(
    index: int, share: float, components: dict[str, Curve], rng: random.Random, reply: Callable[[random.Random], str]
) -> dict[str, Any]:
    earned = {name: round(curve(share) + rng.gauss(0, 0.1), 3) for name, curve in components.items()}
    turns = [
        m for _ in range(3) for m in ({"role": "user", "content": "Guess.\n-----"}, {"role": "assistant", "content": reply(rng)})
    ]
    return {
        "rollout_id": f"r{index}",
        "task_id": f"wordle/{index}",
        "group_id": index // 4,
        "messages": [{"role": "system", "content": "Play Wordle."}, *turns],
        "reward": sum(earned.values()),
        "components": earned,
        "metrics": {"win": 0.0},
        "stop_reason": "truncated",
        "error": None,
        "version": 0,
    }
