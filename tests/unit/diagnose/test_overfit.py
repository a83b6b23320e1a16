"""The short run on one task: what it is told, what its rewards say, and how a real process is followed and ended."""

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from support import fake_short_rl
from support.planted_checks import tables
from support.rollouts import echo_setup, make_config, make_group
from turnwise.config import AdvantageConfig, RLConfig
from turnwise.diagnose.context import Context
from turnwise.diagnose.core import CheckFailed, Finding, Verdict
from turnwise.diagnose.overfit import (
    OVERFIT,
    bold_learning_rate,
    clearly_risen,
    hardest_contrast,
    judge_run,
    movement,
    short_config,
    trained_parameters,
)
from turnwise.diagnose.overfit_run import ShortRun, play
from turnwise.launch.shape import ModelShape
from turnwise.launch.survivors import processes_of
from turnwise.orchestrator.filters import JudgedGroup, judge

STEPS = 8
SMOLLM2 = ModelShape(30, 576, 1536, 9, 3, 64, 49152, tied=True, dtype="bfloat16")
LEARNED = [[-1.6, -1.8], [-1.2, -1.17], [0.57, 0.47], [0.38, 2.46], [2.3, 2.74], [0.81, 2.41], [2.79, 3.07], [3.07, 3.03]]
"""Mean rewards of groups as a real run with the 135M model had them."""


def judged(rewards: Sequence[float | None], number: int, **settings: Any) -> JudgedGroup:
    group = make_group(rewards, number=number, setup=echo_setup(**settings))
    task = group.task.env.tasks[number]
    played = type(group.task)(group.task.env, number, task, 0)
    return judge(type(group)(number, played, group.rollouts), AdvantageConfig(), oldest_allowed=0)


def verdict(run: ShortRun, **told: Any) -> Finding:
    defaults: dict[str, Any] = {"lr": 1e-3, "own_lr": 1e-3, "task": "t0", "max_steps": 24, "look_further": "rl @ FILE"}
    return judge_run(run, **{**defaults, **told})


def noise(seed: int) -> list[list[float]]:
    rng = Random(seed)
    return [[rng.gauss(0.0, 1.0) for _ in range(4)] for _ in range(STEPS)]


# --- what is played ---------------------------------------------------------------------------------------------------


def test_the_task_with_the_most_different_rewards_is_played():
    groups = [judged([0.0, 0.1], 0), judged([0.0, 1.0], 1), judged([1.0, 1.0], 2), judged([5.0, None], 3)]
    assert hardest_contrast(groups) == "train-1"


def test_a_task_of_several_environments_is_named_with_its_own():
    groups = [judged([0.0, 0.1], 0, name="easy"), judged([0.0, 1.0], 1, name="hard")]
    assert hardest_contrast(groups) == "hard/train-1"


def test_without_any_difference_there_is_no_task_to_play():
    with pytest.raises(CheckFailed, match="no group had rollouts of different rewards"):
        hardest_contrast([judged([1.0, 1.0], 0)])


def short(group: int = 8, batch: int = 64, **tables: Any) -> RLConfig:
    settings = {"batch_size": batch, "rollouts_per_example": group, "env": [{"id": "wordle"}], "max_staleness": 2}
    own = {
        "max_steps": 500,
        "output_dir": "/somewhere",
        "orchestrator": settings,
        "inference": {"noise": {}, "port": 8000},
        "stop": {
            "success_when": "running_mean(total_reward) > 1",
            "stop_on_success": True,
            "abort_when": "latest(step_time) > 1",
        },
        "ckpt": {"interval": 1},
        "wandb": {"project": "mine"},
        "trainer": {
            "optim": {"lr": 1e-6, "schedule": "cosine", "warmup_steps": 50, "betas": [0.8, 0.9]},
            "loss": {"kl_beta": 0.04},
        },
    }
    return short_config(RLConfig.model_validate({**own, **tables}), "wordle/crane", 1e-3)


def test_the_short_run_is_small_on_one_task_and_in_a_folder_of_its_own():
    config = short()
    assert config.orchestrator.buffer.tasks == ["wordle/crane"]
    assert (config.max_steps, config.output_dir, config.orchestrator.max_staleness) == (STEPS, Path("/somewhere/overfit"), 0)
    assert (config.wandb, config.inference.noise, config.inference.port, config.ckpt.interval) == (None, None, None, None)
    assert not config.orchestrator.eval.at_start
    assert config.orchestrator.eval.interval is None
    assert config.stop.abort_when is config.stop.success_when is None
    optim = config.trainer.optim
    assert (optim.lr, optim.schedule, optim.warmup_steps) == (1e-3, "constant", 0)


def test_what_the_user_learns_with_stays_as_it_is():
    config = short()
    assert config.trainer.loss.kl_beta == 0.04
    assert config.trainer.optim.betas == (0.8, 0.9)


@pytest.mark.parametrize(
    ("group", "gpus", "expected"),
    [
        (2, {}, (16, 2)),
        (3, {}, (15, 3)),
        (8, {}, (16, 4)),
        (64, {}, (16, 4)),
        (8, {"inference": [0], "trainer": [1]}, (32, 8)),
        (16, {"inference": [0], "trainer": [1]}, (32, 8)),
    ],
)
def test_a_step_has_several_groups_and_few_rollouts(group: int, gpus: dict[str, list[int]], expected: tuple[int, int]):
    engine = {"inference": {"engine": "vllm" if gpus else "embedded"}}
    settings = short(group, batch=2 * group, gpus=gpus, **engine).orchestrator
    assert (settings.batch_size, settings.rollouts_per_example) == expected


@pytest.mark.parametrize(
    ("trained", "lora", "own", "expected"),
    [
        (4_884_480, True, 1e-6, 9.05e-4),
        (40_000_000, True, 1e-5, 3.16e-4),
        (7_000_000_000, False, 1e-6, 2.39e-5),
        (4_884_480, True, 2e-3, 2e-3),  # the user's own is bolder
        (None, True, 1e-6, 3e-4),
        (None, False, 1e-6, 2e-5),
    ],
)
def test_the_learning_rate_is_bold_for_the_number_of_trained_parameters(
    trained: int | None, lora: bool, own: float, expected: float
):
    assert bold_learning_rate(own, trained, lora=lora) == pytest.approx(expected, rel=0.01)


def test_trained_parameters_are_those_of_the_adapter_or_of_the_model():
    adapter = RLConfig.model_validate({"trainer": {"model": {"lora": {"rank": 16}}}})
    assert trained_parameters(adapter, SMOLLM2) == 4_884_480  # as peft counts them
    assert trained_parameters(RLConfig.model_validate({"trainer": {"model": {"lora": None}}}), SMOLLM2) == 134_515_008
    assert trained_parameters(adapter, "its config.json is not at hand") is None


# --- what its rewards say ---------------------------------------------------------------------------------------------


def test_what_is_learned_step_by_step_shows_between_the_first_and_the_last_third():
    thirds, _ = movement([[0.0, 2.0], [1.0, 1.0], [2.0, 3.0], [3.0, 2.0], [4.0, 4.0], [3.0, 5.0]])
    assert (thirds.before, thirds.after, thirds.steps) == (1.0, 4.0, 2)
    assert thirds.error == pytest.approx(math.sqrt(2 / 3 / 4 + 2 / 3 / 4))  # both: squares of 2, 3 degrees of freedom
    assert thirds.errors == pytest.approx(3 / thirds.error)


def test_what_is_learned_at_once_shows_between_the_first_step_and_all_others():
    rewards = [[-2.0, -1.5], [0.7, 1.1], [1.4, 1.5], [0.1, 0.6], [1.0, 1.3], [1.2, 1.3], [0.4, 1.3], [0.9, 1.0]]
    thirds, start = movement(rewards)
    assert (start.before, start.steps) == (-1.75, 1)
    assert thirds.errors < 3 < 5 < start.errors


def test_a_policy_that_became_certain_does_not_vouch_for_the_one_that_was_not():
    """Rewards that no longer differ make no small standard error of those that did."""
    for moved in movement([[-1.0, 1.2], [0.3, 0.3], [0.3, 0.3], [0.3, 0.3], [0.3, 0.3], [0.3, 0.3]]):
        assert abs(moved.errors) < 0.5


@pytest.mark.parametrize("rewards", [[], [[1.0, 2.0]], [[1.0], [2.0]]])
def test_too_few_groups_compare_with_nothing(rewards: list[list[float]]):
    assert movement(rewards) == []


def test_a_clear_rise_needs_no_further_step():
    enough = [clearly_risen(LEARNED[:steps]) for steps in range(STEPS + 1)]
    assert enough == [False] * 5 + [True] * 4


def test_a_policy_that_does_not_learn_hardly_ever_fails_or_passes():
    found = [verdict(ShortRun(noise(seed), [1.0], [1.0], 60.0)).verdict for seed in range(400)]
    assert found.count(Verdict.FAIL) <= 2
    assert found.count(Verdict.PASS) <= 32


RISEN = ShortRun(LEARNED, [0.6] * 7, [0.1] * 7, 60.0)
FLAT = ShortRun([[0.5, 0.4], [0.3, 0.6]] * 4, [0.6] * 7, [0.1] * 7, 60.0)
CASES = [
    (RISEN, {}, Verdict.PASS, "reward -1.44 in the first 2 steps -> 2.99 in the last", ""),
    (
        RISEN,
        {"own_lr": 1e-6},
        Verdict.WARN,
        "(yours is 1e-06)",
        "need about 8,000 steps for the way of these 8, and max_steps = 24",
    ),
    (RISEN, {"own_lr": 1e-6, "max_steps": 8000}, Verdict.PASS, "(yours is 1e-06)", ""),
    (ShortRun(LEARNED[:6], [0.6], [0.1], 60.0, no_signal=True), {}, Verdict.PASS, "then all rollouts were rewarded alike", ""),
    (FLAT, {}, Verdict.WARN, "no rise beyond noise: reward 0.45 in", "this is no proof of a fault"),
    (
        ShortRun(LEARNED[::-1], [0.6], [0.1], 60.0),
        {},
        Verdict.FAIL,
        "the reward fell: reward 2.99 in the first 2 steps -> -1.44 in the last",
        "`advantages`, `mask`",
    ),
    (ShortRun(FLAT.rewards, [0.0, 0.0], [0.0, 0.0], 60.0), {}, Verdict.FAIL, "no step of 2 moved the weights", "`gradient`"),
    (ShortRun(FLAT.rewards, [math.nan] * 2, [0.0] * 2, 60.0), {}, Verdict.FAIL, "gradient norms nan, nan", "model.dtype"),
    (ShortRun(RISEN.rewards, [math.nan, 1.0], [0.0, 0.1], 60.0), {}, Verdict.PASS, "reward -1.44", ""),
    (
        ShortRun([], [], [], 9.0, failure="Failed at step 0"),
        {},
        Verdict.FAIL,
        "the short run failed: Failed at step 0",
        "its log",
    ),
    (
        ShortRun([[1.0, 2.0]], [], [], 900.0),
        {},
        Verdict.WARN,
        "too few steps to tell: 1 on t0, and that took 15 min",
        "rl @ FILE",
    ),
    (ShortRun([[1.0, 1.0]], [], [], 9.0, no_signal=True), {}, Verdict.WARN, "none carried signal any more", "rl @ FILE"),
]


@pytest.mark.parametrize(("run", "told", "expected", "evidence", "remedy"), CASES)
def test_the_verdict_follows_from_what_was_measured(
    run: ShortRun, told: dict[str, Any], expected: Verdict, evidence: str, remedy: str
):
    found = verdict(run, **told)
    assert found.verdict is expected
    assert evidence in found.evidence
    assert remedy in found.remedy
    assert bool(found.remedy) == (expected is not Verdict.PASS)


def test_a_rise_without_any_spread_is_a_rise():
    assert verdict(ShortRun([[0.0, 0.0]] * 4 + [[1.0, 1.0]] * 4, [1.0], [1.0], 60.0)).verdict is Verdict.PASS


def test_the_curve_is_drawn_and_told_as_numbers():
    found = verdict(RISEN)
    assert "▁" in found.lines[0]
    assert found.data["rewards"][0] == pytest.approx(-1.7)
    assert found.data["standard_error"] > 0


# --- the check --------------------------------------------------------------------------------------------------------


class Planted(Context):
    """With rollouts that were played in so many seconds, and engines whose end is counted."""

    def __init__(self, folder: Path, model: Path, *, seconds: float, lr: float) -> None:
        given = {**tables(model, folder), "trainer": {"optim": {"lr": lr}}}
        super().__init__(RLConfig.model_validate(given), folder / "scratch", lambda text: None)
        groups = [judged([0.0, 1.0, 0.0, 1.0], 1)]
        timing = {"started": 0.0, "total_s": seconds, "engine_s": 0.0, "env_s": 0.0}
        rollouts = tuple(replace(rollout, timing=timing) for rollout in groups[0].group.rollouts)
        self.groups = [replace(groups[0], group=replace(groups[0].group, rollouts=rollouts))]  # pyright: ignore[reportAttributeAccessIssue]
        self.ended = 0

    def end_session(self) -> None:
        self.ended += 1


def test_a_run_that_would_take_too_long_is_left_to_the_user(tiny_model: Path, tmp_path: Path):
    context = Planted(tmp_path, tiny_model, seconds=300.0, lr=1e-5)
    found = OVERFIT.run(context)
    assert found.verdict is Verdict.SKIPPED
    assert found.evidence == "4 steps of 16 rollouts would take 80 min or more"
    assert "--orchestrator.buffer.tasks '[\"train-1\"]'" in found.remedy
    assert context.ended == 0


def test_engines_make_room_and_the_task_is_played_boldly(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    played: list[RLConfig] = []

    def instead(config: RLConfig, **options: Any) -> ShortRun:
        played.append(config)
        return RISEN

    monkeypatch.setattr("turnwise.diagnose.overfit.play", instead)
    context = Planted(tmp_path, tiny_model, seconds=1.0, lr=1e-5)
    found = OVERFIT.run(context)
    assert context.ended == 1
    assert [config.orchestrator.buffer.tasks for config in played] == [["train-1"]]
    assert played[0].trainer.optim.lr == found.data["lr"] > 100 * found.data["own_lr"]
    assert found.verdict is Verdict.WARN  # max_steps = 4 at 1e-5 go nowhere
    assert "max_steps = 4" in found.remedy


# --- a real process ---------------------------------------------------------------------------------------------------

RL = Path(fake_short_rl.__file__)


def play_fake(folder: Path, ending: str, *, enough: int = 99, limit_s: float = 60.0) -> tuple[ShortRun, list[str]]:
    config = make_config().model_copy(update={"output_dir": folder, "max_steps": 5})
    said: list[str] = []
    run = play(
        config,
        run_id=folder.name,
        enough=lambda rewards: len(rewards) == enough,
        limit_s=limit_s,
        say=said.append,
        rl=(sys.executable, str(RL), ending),
    )
    return run, said


def test_a_run_is_broken_off_at_once_when_its_last_batch_is_there(tmp_path: Path):
    """Rollouts that were not judged enter no mean."""
    run, said = play_fake(tmp_path, "goes on")
    assert run.rewards == [[n + 0.5, n + 0.5] for n in (1, 2, 3, 4, 5)]
    assert run.updates == [0.5] * 5
    assert math.isnan(run.gradients[0])
    assert run.gradients[1:] == [2.0] * 4
    assert (run.failure, run.no_signal) == ("", False)
    assert (tmp_path / "interrupted").exists()
    assert said[-1] == "overfit: step 5 of at most 5, reward 5.500"


def test_a_run_is_broken_off_when_its_rewards_settle_the_question(tmp_path: Path):
    run, _ = play_fake(tmp_path, "goes on", enough=2)
    assert run.rewards == [[1.5, 1.5], [2.5, 2.5]]


def test_a_run_that_fails_tells_why(tmp_path: Path):
    run, _ = play_fake(tmp_path, "fails")
    assert run.failure == "Failed at step 1 of 8: planted Likely cause: the moon"
    assert run.log[-1] == "Likely cause: the moon"
    assert run.rewards == [[1.5, 1.5]]


def test_a_run_without_signal_is_not_waited_for_and_has_not_failed(tmp_path: Path):
    run, _ = play_fake(tmp_path, "has no signal")
    assert (run.no_signal, run.failure) == (True, "")
    assert run.curve == [1.5, 2.5]


def test_a_run_that_takes_too_long_is_ended_with_what_there_is(tmp_path: Path):
    run, _ = play_fake(tmp_path, "goes on", limit_s=0.0)
    assert (run.rewards, run.failure) == ([], "")
    assert processes_of(tmp_path.name) == []
