"""Memory and speed: verdicts from measured numbers, and how these are scaled to a run."""

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.planted_checks import tables
from support.probed import SETTING as FLOAT32
from support.rollouts import ECHO, make_group
from turnwise.config import AdvantageConfig, RLConfig, StopConfig
from turnwise.diagnose.context import Context
from turnwise.diagnose.core import Verdict
from turnwise.diagnose.engine_checks import MEMORY, SPEED, judge_memory, judge_speed, would_hold
from turnwise.diagnose.footprint import Footprint, cache_tokens, footprint
from turnwise.diagnose.pace import Pace, Played, evaluation_count, pace_of, signal_share, works_beside
from turnwise.diagnose.probe_report import Cost, Gradient, Memory, ProbeReport, Published, Rehearsal
from turnwise.diagnose.served import Swapped
from turnwise.launch.gpus import Gpu, Machine
from turnwise.launch.memory import GIB
from turnwise.orchestrator.filters import Fate, JudgedGroup, judge
from turnwise.transport import Batch, Progress, WeightsReady

SETTING = msgspec.structs.replace(
    FLOAT32, samples=8, given_samples=16, temperature=1.0, dtype="bfloat16", published_dtype="bfloat16"
)
NO_ENGINE = Footprint(ram=0, gpus={}, cache_tokens=None)
READY = WeightsReady(version=1, kind="lora", path="/w/v1", digest="d" * 64)


def report(*, ranks: int = 1, seconds: float = 2.0, **changes: Any) -> ProbeReport:
    """2,000 of a batch's 4,000 tokens, forward and backward in 2 s, an update in 0.5 s."""
    gradient = Gradient(expected=1, frozen=[], unexpected=[], unheld=[], norms={"w": 1.0}, norm=1.0, seconds=seconds)
    told: dict[str, Any] = {
        "setting": msgspec.structs.replace(SETTING, ranks=ranks),
        "gradient": gradient,
        "published": Published(READY, 1.0, 0.25),
        "cost": Cost(tokens=2000, batch_tokens=4000, load_s=3.0, update_s=0.5, memory=[Memory(2.0, 8.0)] * ranks),
        "rehearsal": Rehearsal(2048, 0.0, [Memory(3.0, 8.0)] * ranks),
    }
    return ProbeReport(**{**told, **changes})


def config(**tables: Any) -> RLConfig:
    settings = {"batch_size": 32, "rollouts_per_example": 8, **tables.pop("orchestrator", {})}
    return RLConfig.model_validate({"max_steps": 100, "orchestrator": settings, **tables})


GPUS = {"gpus": {"inference": [0], "trainer": [1]}}
SHARED = {"gpus": {"inference": [0], "trainer": [0], "share": True, "inference_memory": 0.5}}


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(told: ProbeReport, engines: Footprint = NO_ENGINE, ram_gib: float = 8.0, **tables: Any) -> Any:
    settings = config(**tables)
    return judge_memory(told, engines, settings, rollout_tokens=500.0, ram=int(ram_gib * GIB), estimate_gib=2.5)


@pytest.mark.parametrize(
    ("ram_gib", "expected", "words"),
    [(8.0, Verdict.PASS, ""), (5.6, Verdict.WARN, "hardly any"), (5.4, Verdict.FAIL, "the processes of a run need 3.0 GiB")],
)
def test_on_a_cpu_all_processes_of_a_run_must_fit_into_the_memory(ram_gib: float, expected: Verdict, words: str):
    """3 GiB of the trainer, 2 of the engine, 0.44 of the helpers."""
    found = memory(report(), Footprint(2 * GIB, {}, None), ram_gib)
    assert found.verdict is expected
    assert words in found.evidence
    assert ("trainer.micro_batch_tokens" in found.remedy) == (expected is not Verdict.PASS)
    assert f"of {ram_gib:.1f} GiB of RAM" in found.evidence


@pytest.mark.parametrize(
    ("peak", "tables", "expected"),
    [
        (70.0, GPUS, Verdict.PASS),
        (76.0, GPUS, Verdict.WARN),  # of 80 less the context
        (30.0, SHARED, Verdict.PASS),
        (38.0, SHARED, Verdict.WARN),  # of the trainer's half, less what is kept free
    ],
)
def test_on_a_gpu_the_peak_is_held_against_what_a_trainer_process_may_have(peak: float, tables: Any, expected: Verdict):
    told = report(rehearsal=Rehearsal(2048, 1.0, [Memory(peak, 80.0)]))
    found = memory(told, **tables)
    assert found.verdict is expected
    assert f"{peak:.1f} GiB of the" in found.evidence


def test_the_rank_with_the_least_room_decides():
    told = report(rehearsal=Rehearsal(2048, 1.0, [Memory(10.0, 80.0), Memory(79.0, 80.0)]))
    found = memory(told, gpus={"inference": [0], "trainer": [1, 2]})
    assert found.verdict is Verdict.WARN
    assert found.data["trainer_gib"] == [10.0, 79.0]


def test_a_rehearsal_that_ran_out_of_memory_fails_with_its_own_remedies():
    out = "out of memory in the rehearsal of a micro-batch of 8,192 tokens: all is full. What helps: trainer.model.shard = true."
    found = memory(report(failure=out, stage="rehearsal", rehearsal=None, tail=["[rank 0] error"]))
    assert found.verdict is Verdict.FAIL
    assert found.evidence == "out of memory in the rehearsal of a micro-batch of 8,192 tokens: all is full."
    assert found.remedy == "trainer.model.shard = true."
    assert found.lines == ("[rank 0] error",)


def test_what_failed_before_is_the_fault_of_another_check():
    found = memory(report(failure="the loss raised", stage="gradient", rehearsal=None))
    assert found.verdict is Verdict.SKIPPED
    assert "while gradient was measured" in found.evidence


def test_a_longest_batch_that_was_not_tried_is_estimated():
    found = memory(report(rehearsal=Rehearsal(2048, skipped="2 micro-batches would take 90 s")))
    assert found.verdict is Verdict.PASS
    assert "it was not tried: 2 micro-batches would take 90 s" in found.evidence
    assert found.data["trainer_gib"] == [2.5]  # the estimate is more than what the batch took


@pytest.mark.parametrize(("cache", "expected"), [(40_000, Verdict.PASS), (20_000, Verdict.WARN), (None, Verdict.PASS)])
def test_rollouts_in_flight_that_no_cache_holds_are_a_warning(cache: int | None, expected: Verdict):
    """64 rollouts of 500 tokens."""
    found = memory(report(), Footprint(0, {0: 70 * GIB}, cache), orchestrator={"max_inflight": 64})
    assert found.verdict is expected
    assert ("needs 32,000 tokens" in found.evidence) == (expected is Verdict.WARN)
    assert ("orchestrator.max_inflight" in found.remedy) == (expected is Verdict.WARN)


def test_every_engine_has_its_share_of_the_rollouts_in_flight():
    tables: dict[str, Any] = {"orchestrator": {"max_inflight": 64}, "gpus": {"inference": [0, 1], "trainer": [2]}}
    engines = Footprint(0, {}, 20_000)
    told = report(rehearsal=Rehearsal(2048, 1.0, [Memory(10.0, 80.0)]))
    assert memory(told, engines, **tables).verdict is Verdict.PASS


PAGE = """# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
vllm:num_requests_running{engine="0"} 3.0
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0",num_gpu_blocks="661",swap_space="4"} 1.0
"""


@pytest.mark.parametrize(
    ("page", "tokens"),
    [(PAGE, 10_576), (PAGE.replace('"661"', '"None"'), None), ("vllm:num_requests_running 0.0\n", None), ("", None)],
)
def test_the_size_of_the_cache_is_read_from_the_engines_page(page: str, tokens: int | None):
    assert cache_tokens(page) == tokens


def test_an_engine_that_tells_nothing_still_has_a_footprint():
    machine = Machine((Gpu("0", used=5 * GIB), Gpu("1")))
    found = footprint("no such run", ["http://127.0.0.1:9"], machine, [0, 1, 2])
    assert found == Footprint(0, {0: 5 * GIB}, None)


# --- speed ------------------------------------------------------------------------------------------------------------


def judged(rewards: list[float], number: int, *, started: float = 0.0, seconds: float = 2.0) -> JudgedGroup:
    group = make_group(rewards, number=number)
    timing = {"started": started, "total_s": seconds, "engine_s": 1.0, "env_s": 0.0}
    rollouts = tuple(dataclasses.replace(rollout, timing=timing) for rollout in group.rollouts)
    return judge(dataclasses.replace(group, rollouts=rollouts), AdvantageConfig(), oldest_allowed=0)


def test_rollouts_side_by_side_take_from_the_first_begin_to_the_last_end():
    played = Played.of([judged([0.0, 1.0], 0, started=100.0), judged([0.0, 1.0], 1, started=104.0, seconds=6.0)])
    assert (played.rollouts, played.tokens, played.seconds) == (4, 12, 10.0)
    assert played.seconds_for(32) == 80.0


GROUPS = [judged([0.0, 1.0] * 4, 0), judged([1.0] * 8, 1)]  # one of two carries signal; 16 rollouts in 2 s


def batch(*, placed: int, trained: int) -> Batch:
    ids = [str(index) for index in range(placed)]
    return Batch(step=1, samples=[], rollout_ids=ids, num_rollouts=trained, temperature=1.0, progress=Progress())


def pace(told: ProbeReport | None = None, *, placed: int = 16, trained: int = 8, **tables: Any) -> Pace:
    return pace_of(config(**tables), GROUPS, batch(placed=placed, trained=trained), told or report(), swap_s=0.1, held_out=64)


def test_a_step_is_scaled_from_what_was_measured():
    """Twice the rollouts, and twice the batch of which the probe took half: 8,000 tokens at 1,000 a second."""
    found = pace()
    assert (found.rollouts_s, found.train_s, found.publish_s, found.swap_s) == (4.0, 8.5, 0.25, 0.1)
    assert found.evaluation_s == 8.0
    assert (found.steps, found.evaluations) == (100, 2)
    assert found.step_s == pytest.approx(12.85)
    assert found.total_s == pytest.approx(1301)
    assert list(found.shares) == ["training", "rollouts", "publication", "weight swap"]


def test_dropped_groups_are_played_again_under_dynamic_sampling():
    """Half of the groups carry signal, so twice as many are played; and every rollout of a batch is trained on."""
    found = pace(trained=16, orchestrator={"filters": {"dynamic_sampling": True}})
    assert found.rollouts_s == 8.0
    assert found.train_s == 8.5


def test_several_updates_take_several_passes():
    assert pace(trainer={"updates_per_batch": 3}).train_s == pytest.approx(3 * 8.5)


def test_ranks_share_the_tokens():
    assert pace(report(ranks=4, seconds=0.5)).train_s == pytest.approx(2.0 + 0.5)


def test_the_rehearsal_tells_the_rate_where_the_first_pass_was_slow():
    """It may have compiled: 60 s for 2,000 tokens, and 1 s for 4,000 afterwards."""
    assert pace(report(seconds=60.0, rehearsal=Rehearsal(4000, 1.0, [Memory(1.0, 8.0)]))).train_s == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("tables", "beside"),
    [
        ({}, False),  # engine and trainer have the cores in common
        (GPUS, True),
        (SHARED, False),
        ({**GPUS, "orchestrator": {"max_staleness": 0}}, False),
    ],
)
def test_rollouts_are_played_beside_training_only_on_devices_of_their_own(tables: dict[str, Any], beside: bool):
    assert works_beside(config(**tables)) is beside


@pytest.mark.parametrize(
    ("interval", "at_start", "steps", "expected"),
    [(None, True, 100, 2), (None, False, 100, 1), (20, True, 100, 6), (20, True, 90, 6), (200, True, 100, 2)],
)
def test_evaluations_are_counted_as_a_run_does_them(interval: int | None, at_start: bool, steps: int, expected: int):
    assert (
        evaluation_count(config(max_steps=steps, orchestrator={"eval": {"interval": interval, "at_start": at_start}})) == expected
    )


def test_groups_without_any_signal_count_as_one_that_has():
    assert signal_share([judged([1.0, 1.0], number) for number in range(4)]) == 0.25
    assert signal_share(GROUPS) == 0.5
    assert [group.fate for group in GROUPS] == [Fate.SIGNAL, Fate.EQUAL]


SLOW = Pace(30.0, 10.0, 1.0, 2.0, beside=False, pauses=True, steps=100, evaluations=2, evaluation_s=60.0)


@pytest.mark.parametrize(
    ("beside", "pauses", "rollouts_s", "expected"),
    [(False, True, 30.0, 43.0), (True, True, 30.0, 32.0), (True, False, 30.0, 30.0), (True, True, 5.0, 11.0)],
)
def test_what_goes_on_side_by_side_takes_as_long_as_the_slower(beside: bool, pauses: bool, rollouts_s: float, expected: float):
    assert dataclasses.replace(SLOW, beside=beside, pauses=pauses, rollouts_s=rollouts_s).step_s == expected


@given(st.lists(st.floats(0.001, 1e4), min_size=4, max_size=4))
def test_side_by_side_is_never_slower_and_never_faster_than_its_slowest_part(seconds: list[float]):
    alone = dataclasses.replace(SLOW, rollouts_s=seconds[0], train_s=seconds[1], publish_s=seconds[2], swap_s=seconds[3])
    beside = dataclasses.replace(alone, beside=True)
    assert max(seconds[0], seconds[1]) <= beside.step_s <= alone.step_s


def speed(found: Pace, **stop: Any) -> Any:
    return judge_speed(found, Played(16, 1600, 4.0), StopConfig.model_validate(stop))


def test_the_pace_is_told_with_what_takes_most_of_it():
    found = speed(SLOW)
    assert found.verdict is Verdict.PASS
    assert (
        "about 43 s a step (rollouts 30 s, training 10 s, weight swap 2 s, publication 1 s, one after the other" in found.evidence
    )
    assert "400 sampled tokens/s" in found.evidence
    assert "74 min for 100 steps and 2 evaluations of 60 s" in found.evidence
    assert found.data["slowest"] == "rollouts"
    assert found.data["total_s"] == 4420


@pytest.mark.parametrize(
    ("part", "key"), [("rollouts_s", "gpus.inference"), ("train_s", "gpus.trainer"), ("swap_s", "trainer.model.lora")]
)
def test_a_run_of_more_than_a_week_is_a_warning_with_what_would_be_faster(part: str, key: str):
    slow: dict[str, Any] = {part: 7000.0}
    found = speed(dataclasses.replace(SLOW, **slow))
    assert found.verdict is Verdict.WARN
    assert "8 days, mostly" in found.evidence
    assert key in found.remedy


@pytest.mark.parametrize(
    ("condition", "holds"),
    [
        ("running_mean(step_time) > 40", True),
        ("running_mean(step_time, 200) > 40", True),
        ("latest(step_time) > 80", False),
        ("running_mean(step_time) > 40 and running_mean(total_reward) < 0", False),  # depends on more
    ],
)
def test_a_run_that_its_own_condition_would_end_for_its_speed_is_a_warning(condition: str, holds: bool):
    assert would_hold(condition, SLOW.step_s, window=20) is holds
    assert (speed(SLOW, abort_when=condition).verdict is Verdict.WARN) == holds


# --- the checks -------------------------------------------------------------------------------------------------------


def planted(model: Path, folder: Path, told: ProbeReport) -> Context:
    """Everything measured, as the checks before leave it."""
    given = tables(model, folder, env=[{"id": ECHO, "args": {"tasks": 7}}], eval={"num_examples": 5, "rollouts_per_example": 2})
    context = Context(RLConfig.model_validate(given), folder / "scratch", lambda text: None)
    artefacts: dict[str, Any] = {
        "groups": GROUPS,
        "batch": batch(placed=16, trained=8),
        "probe": told,
        "footprint": Footprint(GIB, {}, None),
        "swapped": Swapped(READY, 1.0, [], [(1, 4)], 0.1),
    }
    for name, value in artefacts.items():
        setattr(context, name, value)
    return context


def test_the_checks_take_what_others_measured(tiny_model: Path, tmp_path: Path):
    """A batch of 8 is half of the 16 rollouts that took 2 s; an evaluation is 5 tasks twice."""
    context = planted(tiny_model, tmp_path, report())
    speed, memory = SPEED.run(context), MEMORY.run(context)
    assert (speed.data["rollouts_s"], speed.data["evaluation_s"], speed.data["swap_s"]) == (1.0, 1.25, 0.1)
    assert speed.data["train_s"] == pytest.approx(2.5)
    assert memory.data["engine_ram_gib"] == 1.0
    assert "a micro-batch of 2,048 tokens takes 3.0 GiB" in memory.evidence


def test_nothing_is_foreseen_from_a_probe_that_failed(tiny_model: Path, tmp_path: Path):
    told = report(gradient=None, cost=None, published=None, rehearsal=None, failure="planted", stage="gradient")
    context = planted(tiny_model, tmp_path, told)
    for check in (SPEED, MEMORY):
        found = check.run(context)
        assert found.verdict is Verdict.SKIPPED
        assert "while gradient was measured" in found.evidence
