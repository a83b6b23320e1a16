"""Evaluation: means and standard errors by hand, diversity, and evaluation of a checkpoint."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from support.fake_trainer import publish
from support.rollouts import ECHO, make_rollout, make_turn
from support.scripted_engine import ScriptedEngine
from turnwise.config import RLConfig
from turnwise.inference.client import InferenceClient
from turnwise.orchestrator.env_threads import EnvThreads
from turnwise.orchestrator.evaluate import EvalResult, eval_metrics, evaluate_checkpoint, load_evaluator
from turnwise.transport import WeightsStore


def _config(model: Path, out: Path, **settings: object) -> RLConfig:
    orchestrator = {"env": [{"id": ECHO}], "batch_size": 4, "rollouts_per_example": 2, "sampling": {"max_tokens": 8}, **settings}
    return RLConfig.model_validate(
        {"output_dir": out, "model": {"name": str(model)}, "orchestrator": orchestrator, "max_steps": 1}
    )


def test_standard_errors_come_from_task_means():
    rollouts = [make_rollout(value, task=task) for task, value in [("a", 0.0), ("a", 1.0), ("b", 1.0), ("b", 1.0), ("c", 0.0)]]
    metrics = eval_metrics("echo", rollouts)
    assert metrics["val-core/echo/reward/mean"] == pytest.approx(0.6)
    means = [0.5, 1.0, 0.0]
    spread = math.sqrt(sum((m - 0.5) ** 2 for m in means) / 2)
    assert metrics["val-core/echo/reward/stderr"] == pytest.approx(spread / math.sqrt(3))
    assert metrics["val-aux/echo/length/mean"] == pytest.approx(0.6)
    assert metrics["val-aux/echo/turns_seen/mean"] == 1.0
    assert metrics["val-aux/echo/response_length/mean"] == 3.0


def test_errored_rollouts_are_counted_and_enter_no_mean():
    metrics = eval_metrics("echo", [make_rollout(1.0), make_rollout(0.0, error="boom")])
    assert metrics["val-core/echo/reward/mean"] == 1.0
    assert (metrics["val-aux/echo/errored/count"], metrics["val-aux/echo/rollouts/count"]) == (1.0, 1.0)
    assert eval_metrics("echo", [make_rollout(error="boom")])["val-aux/echo/rollouts/count"] == 0.0


def test_a_component_that_was_not_earned_counts_as_nothing_and_a_metric_that_was_not_told_is_left_out():
    earned = [{"citation": 0.5}, {}, {}, {}]
    told = [{"guesses": 4.0}, {"guesses": 2.0}, {}, {}]
    rollouts = [
        replace(make_rollout(task=str(i)), turns=(make_turn([1], [2], components=components),), metrics=metrics)
        for i, (components, metrics) in enumerate(zip(earned, told, strict=True))
    ]
    metrics = eval_metrics("echo", rollouts)
    assert metrics["val-aux/echo/citation/mean"] == 0.125
    assert metrics["val-aux/echo/guesses/mean"] == 3.0


def test_accuracy_is_a_core_metric():
    rollouts = [replace(make_rollout(-1.0), metrics={"acc": 1.0}), replace(make_rollout(-2.0), metrics={"acc": 0.0})]
    metrics = eval_metrics("gsm8k", rollouts)
    assert metrics["val-core/gsm8k/acc/mean"] == 0.5
    assert "val-aux/gsm8k/acc/mean" not in metrics


def test_diversity_tells_a_constant_from_varied_replies():
    constant = eval_metrics("echo", [make_rollout(turn_rewards=[0.0, 0.0], reply="crane", task=str(i)) for i in range(4)])
    assert constant["val-aux/echo/distinct_replies/share"] == 1 / 8
    assert constant["val-aux/echo/reply_entropy/mean"] == 0.0
    varied = eval_metrics("echo", [make_rollout(reply=word, task=word) for word in ("crane", "slate", "about", "crane")])
    assert varied["val-aux/echo/distinct_replies/share"] == 0.75
    assert varied["val-aux/echo/reply_entropy/mean"] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4))


def test_the_tasks_and_seeds_are_the_same_at_every_version(tiny_model: Path, tmp_path: Path):
    config = _config(tiny_model, tmp_path, eval={"num_examples": 3, "rollouts_per_example": 2})
    evaluator = load_evaluator(config, EnvThreads())
    specs = evaluator.specs()
    assert [spec.rollout_id for spec in specs] == [f"eval-Echo-{i}-{k}" for i in range(3) for k in range(2)]
    assert [spec.task["id"] for spec in specs[::2]] == [f"validation-{i}" for i in range(3)]
    assert len({spec.sampling_seed for spec in specs}) == 6
    assert [spec.sampling_seed for spec in evaluator.specs()] == [spec.sampling_seed for spec in specs]


def test_own_environments_of_the_evaluation_replace_those_of_the_training(tiny_model: Path, tmp_path: Path):
    envs = [
        {"id": ECHO, "args": {"tasks": 2}},
        {"id": ECHO, "args": {"tasks": 1}},
        {"id": ECHO, "name": "own", "args": {"tasks": 1}},
    ]
    config = _config(tiny_model, tmp_path, eval_env=envs)
    evaluator = load_evaluator(config, EnvThreads())
    assert [(s.env.name, s.task["id"]) for s in evaluator.specs()] == [
        ("Echo", "validation-0"),
        ("Echo", "validation-1"),
        ("Echo-2", "validation-0"),
        ("own", "validation-0"),
    ]


@pytest.mark.parametrize("kind", ["adapter", "model", "as it is"])
async def test_a_checkpoint_is_evaluated_with_engines_that_run_already(tiny_model: Path, tmp_path: Path, kind: str):
    config = _config(tiny_model, tmp_path, eval={"num_examples": 3, "temperature": 0.0})
    publish(WeightsStore(tmp_path / "weights"), 7)
    folder = {"adapter": tmp_path / "weights" / "v7", "model": tiny_model, "as it is": None}[kind]
    engine = ScriptedEngine()
    async with engine, InferenceClient([engine.url], model="base", request_timeout_s=5, max_retries=0) as client:
        seen: list[tuple[int, int]] = []
        result = await evaluate_checkpoint(config, folder, 7, client, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert (result["step"], result["version"], len(result["rollouts"])) == (7, 7, 3)
    assert result["metrics"]["val-aux/Echo/rollouts/count"] == 3.0
    assert {body["model"] for body in engine.requests} == {"v7" if kind == "adapter" else "base"}
    assert {body["temperature"] for body in engine.requests} == {0.0}
    expected = {"adapter": ["load v7", "unload v7"], "model": ["pause abort", "reload_weights", "reset_prefix_cache", "resume"]}
    assert engine.admin == expected.get(kind, [])


def test_results_are_written_as_one_file_a_step(tmp_path: Path):
    EvalResult(4, 4, {"val-core/echo/reward/mean": 0.5}, [make_rollout(0.5).summary()]).write(tmp_path)
    content = json.loads((tmp_path / "step_4.json").read_text())
    assert content["metrics"] == {"val-core/echo/reward/mean": 0.5}
    assert content["rollouts"][0]["messages"][1] == {"role": "assistant", "content": "word"}
