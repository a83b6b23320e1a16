"""Groups -> batches: fates, places, rounds, admission; and the metrics of what came out."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.rollouts import echo_setup, make_config, make_group, make_rollout
from turnwise.config import AdvantageConfig
from turnwise.orchestrator.batches import BatchBuilder
from turnwise.orchestrator.buffer import GroupTask
from turnwise.orchestrator.filters import Fate, FinishedGroup, NoSignal, judge
from turnwise.orchestrator.metrics import batch_metrics, mean_by_name
from turnwise.transport import Progress


def _builder(step: int = 1, **orchestrator: object) -> BatchBuilder:
    return BatchBuilder(make_config(**orchestrator), step)


def test_fates():
    config = AdvantageConfig()
    assert judge(make_group([0.0, 1.0]), config, oldest_allowed=0).fate is Fate.SIGNAL
    assert judge(make_group([0.5, 0.5]), config, oldest_allowed=0).fate is Fate.EQUAL
    assert judge(make_group([0.5, None]), config, oldest_allowed=0).fate is Fate.ERRORED
    assert judge(make_group([0.0, 1.0, None]), config, oldest_allowed=0).fate is Fate.SIGNAL
    assert judge(make_group([0.0, 1.0], version=2), config, oldest_allowed=3).fate is Fate.STALE
    assert judge(make_group([0.0, 1.0], version=3), config, oldest_allowed=3).fate is Fate.SIGNAL


def test_turns_that_differ_carry_signal_per_turn_though_totals_tie():
    setup = echo_setup()
    rollouts = (make_rollout(turn_rewards=[1.0, 0.0], index=0), make_rollout(turn_rewards=[0.0, 1.0], index=1))
    group = FinishedGroup(0, GroupTask(setup, 0, setup.tasks[0], 0), rollouts)
    assert judge(group, AdvantageConfig(), oldest_allowed=0).fate is Fate.EQUAL
    per_turn = judge(group, AdvantageConfig(per_turn=True), oldest_allowed=0)
    assert per_turn.fate is Fate.SIGNAL
    assert [a.tolist() for a in per_turn.advantages] == [[0.0, -1.0], [0.0, 1.0]]


def test_a_batch_is_complete_when_its_places_are_taken_and_equal_groups_take_one():
    builder = _builder()
    builder.add(make_group([0.5, 0.5], number=0))
    assert not builder.complete
    builder.add(make_group([0.0, 1.0], number=1))
    assert builder.complete
    batch = builder.build(builder.samples(), Progress(2), {})
    assert {s.rollout_id for s in batch.samples} == {"g1-0", "g1-1"}
    assert batch.rollout_ids == ["g0-0", "g0-1", "g1-0", "g1-1"]
    assert (batch.num_rollouts, batch.step, batch.temperature) == (2, 1, 1.0)
    assert [s.advantages[-1] for s in batch.samples] == pytest.approx([-0.70710, 0.70710], abs=1e-4)


def test_without_the_filter_equal_groups_stay_in_the_batch():
    builder = _builder(filters={"zero_variance": False})
    builder.add(make_group([0.5, 0.5], number=0))
    builder.add(make_group([0.0, 1.0], number=1))
    assert builder.build(builder.samples(), Progress(), {}).num_rollouts == 4


def test_errored_and_stale_groups_take_no_place():
    builder = _builder(step=3)  # max_staleness = 1: version 1 or newer
    builder.add(make_group([0.0, 1.0], number=0, version=0))
    builder.add(make_group([0.0, None], number=1, version=2))
    assert (len(builder.taken), builder.free_places) == (0, 2)
    builder.add(make_group([0.0, 1.0], number=3, version=2))
    builder.add(make_group([0.0, 1.0], number=2, version=1))
    batch = builder.build(builder.samples(), Progress(), {})
    assert [s.group_id for s in batch.samples] == [2, 2, 3, 3]  # by number, not by who was done first
    assert batch.rollout_ids == [f"g{g}-{i}" for g in range(4) for i in range(2)]
    assert all(batch.step - 1 - sample.oldest_version <= 1 for sample in batch.samples)


def test_errored_rollouts_of_a_good_group_make_no_sample():
    builder = _builder(batch_size=3, rollouts_per_example=3)
    builder.add(make_group([0.0, 1.0, None]))
    assert {s.rollout_id for s in builder.samples()} == {"g0-0", "g0-1"}


def test_a_batch_in_which_nothing_carries_signal_is_filled_again():
    builder = _builder(filters={"max_rounds": 3})
    for number in range(4):
        builder.add(make_group([0.5, 0.5], number=number))
        assert not builder.complete
    builder.add(make_group([0.0, 1.0], number=4))
    builder.add(make_group([1.0, 1.0], number=5))
    assert builder.complete
    assert builder.rounds == 3
    assert len(builder.build(builder.samples(), Progress(), {}).rollout_ids) == 12  # all are accounted for


def test_round_after_round_of_equal_groups_ends_with_an_explanation():
    builder = _builder(filters={"max_rounds": 2})
    for number in range(3):
        builder.add(make_group([0.25, 0.25], number=number))
    with pytest.raises(NoSignal) as caught:
        builder.add(make_group([0.5, 0.5], number=3))
    text = str(caught.value)
    assert "0 groups of 4 carried signal and 1 are needed" in text
    assert "Rewards: 0.25 (6 rollouts), 0.5 (2 rollouts)" in text
    assert "Mean components: length 0.312" in text
    assert "Distinct replies: 1 of 8" in text
    assert "orchestrator.filters.max_rounds = 2" in text
    assert "rollouts_per_example" in text


def test_dynamic_sampling_replaces_equal_groups_until_the_batch_is_full():
    builder = _builder(filters={"dynamic_sampling": True, "max_rounds": 3})
    for number, rewards in enumerate([[0.5, 0.5], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]]):
        assert not builder.complete
        builder.add(make_group(rewards, number=number))
    assert builder.complete
    assert builder.build(builder.samples(), Progress(), {}).num_rollouts == 4


def test_dynamic_sampling_gives_up_after_max_rounds_even_with_some_signal():
    builder = _builder(filters={"dynamic_sampling": True, "max_rounds": 2})
    builder.add(make_group([0.0, 1.0], number=0))
    for number in (1, 2):
        builder.add(make_group([0.5, 0.5], number=number))
    with pytest.raises(NoSignal, match="1 groups of 4 carried signal and 2 are needed"):
        builder.add(make_group([0.5, 0.5], number=3))


@given(st.integers(0, 4), st.integers(1, 20), st.integers(-1, 25), st.integers(0, 2))
@settings(deadline=None)
def test_no_group_is_admitted_that_would_be_too_old_when_trained_on(staleness: int, step: int, served: int, taken: int):
    """Whatever is admitted with version v fits, in order, into batches b with (b - 1) - v <= max_staleness."""
    builder = _builder(step=step, max_staleness=staleness)
    for number in range(taken):
        builder.taken.append(judge(make_group([0.0, 1.0], number=number), AdvantageConfig(), oldest_allowed=0))
    capacity = builder.capacity(served, max_steps=15)
    if capacity > 0:
        last_batch = step + (taken + capacity - 1) // builder.groups_per_batch
        assert last_batch - 1 - served <= staleness
        assert last_batch <= 15


def test_with_no_staleness_generation_and_training_alternate():
    builder = _builder(step=1, max_staleness=0)
    assert builder.capacity(0, 10) == 2
    after = builder.next()
    assert after.capacity(0, 10) == 0  # batch 1 is being trained on
    assert after.capacity(1, 10) == 2


def test_max_completion_tokens_is_what_a_rollout_may_sample():
    builder = _builder(sampling={"max_tokens": 100})
    builder.add(make_group([0.0, 1.0], number=0))
    builder.add(make_group([0.0, 1.0], number=1))
    assert builder.build(builder.samples(), Progress(), {}).max_completion_tokens == 300  # three turns of Echo


def test_metrics_tell_of_everything_that_was_judged_and_not_only_of_what_was_kept():
    builder = _builder(step=3)
    builder.add(make_group([0.0, 1.0], number=0, version=0))  # stale
    builder.add(make_group([0.5, 0.5], number=1, version=1))
    builder.add(make_group([0.0, None], number=2, version=2))
    builder.add(make_group([0.0, 2.0], number=3, version=1))
    metrics = batch_metrics(builder, builder.samples(), seconds=2.0, served=1)
    assert metrics["critic/reward/mean"] == pytest.approx(3.0 / 4)
    assert (metrics["critic/reward/min"], metrics["critic/reward/max"]) == (0.0, 2.0)
    assert metrics["groups/equal_reward/share"] == 0.5
    assert metrics["groups/dropped/count"] == 3.0
    assert (metrics["groups/stale/count"], metrics["groups/errored/count"]) == (1.0, 1.0)
    assert metrics["rollouts/errored/count"] == 1.0
    assert (metrics["stop_reason/terminated/count"], metrics["stop_reason/error/count"]) == (7.0, 1.0)
    assert (metrics["staleness/mean"], metrics["staleness/max"], metrics["staleness/lag"]) == (1.0, 1.0, 1.0)
    assert metrics["reward/length/mean"] == pytest.approx(0.75)
    assert metrics["env/turns_seen/mean"] == 1.0
    assert (metrics["response_length/mean"], metrics["prompt_length/mean"], metrics["num_turns/mean"]) == (3.0, 3.0, 1.0)
    assert metrics["throughput/tokens_per_s"] == 8 * 3 / 2.0
    assert metrics["critic/advantages/mean"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["critic/advantages_abs/mean"] == pytest.approx(0.5**0.5, abs=1e-4)
    assert metrics["critic/advantages_abs/max"] == pytest.approx(0.5**0.5, abs=1e-4)
    assert metrics["rollouts/common_reply/share"] == 1.0
    assert all(isinstance(value, float) for value in metrics.values())


def test_the_commonest_reply_is_told_by_its_tokens():
    builder = _builder(step=1)
    said = make_group([0.0, 1.0, 0.5, 0.2], number=1)
    other = replace(said.rollouts[0], turns=(replace(said.rollouts[0].turns[0], sampled_ids=[1, 2, 3]),))
    builder.add(replace(said, rollouts=(other, *said.rollouts[1:])))
    metrics = batch_metrics(builder, builder.samples(), seconds=1.0, served=0)
    assert metrics["rollouts/common_reply/share"] == 0.75


def test_a_missing_component_counts_as_zero_and_a_missing_metric_not_at_all():
    records = [{"win": 1.0}, {}, {"win": 0.5}]
    assert mean_by_name("reward", records, missing=0.0) == {"reward/win/mean": 0.5}
    assert mean_by_name("env", records) == {"env/win/mean": 0.75}
