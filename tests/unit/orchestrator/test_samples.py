"""Rollout -> samples: masks, versions, and where a rewritten history splits them."""

from hypothesis import given, settings
from hypothesis import strategies as st

from support.rollouts import make_rollout, make_turn
from turnwise.orchestrator.samples import to_samples
from turnwise.orchestrator.types import Rollout, StopReason, Turn
from turnwise.transport import NOT_SAMPLED

IDS = st.lists(st.integers(0, 50), min_size=1, max_size=6)


def _rollout(turns: list[Turn]) -> Rollout:
    return Rollout("g1-0", 1, "echo", "t", tuple(turns), (), StopReason.TERMINATED)


def test_a_conversation_that_only_grows_is_one_sample():
    turns = [make_turn([1, 2], [3, 4], version=5), make_turn([1, 2, 3, 4, 6], [7], version=6)]
    (sample,) = to_samples(_rollout(turns), [0.5, -1.0])
    assert sample.token_ids == [1, 2, 3, 4, 6, 7]
    assert sample.loss_mask == [False, False, True, True, False, True]
    assert sample.logprobs == [0.0, 0.0, -0.5, -0.5, 0.0, -0.5]
    assert sample.advantages == [0.0, 0.0, 0.5, 0.5, 0.0, -1.0]
    assert sample.policy_versions == [NOT_SAMPLED, NOT_SAMPLED, 5, 5, NOT_SAMPLED, 6]
    assert (sample.rollout_tokens, sample.oldest_version) == (3, 5)


def test_a_rewritten_history_starts_a_second_sample_of_the_same_rollout():
    turns = [make_turn([1, 2], [3, 4]), make_turn([1, 2, 9, 6], [7])]
    first, second = to_samples(_rollout(turns), [1.0, 1.0])
    assert (first.token_ids, second.token_ids) == ([1, 2, 3, 4], [1, 2, 9, 6, 7])
    assert second.loss_mask == [False] * 4 + [True]
    assert first.rollout_tokens == second.rollout_tokens == 3  # so that splitting changes no weight


def test_a_prompt_shorter_than_what_was_sampled_is_a_new_sample():
    turns = [make_turn([1, 2], [3, 4]), make_turn([1, 2], [5])]
    assert [s.token_ids for s in to_samples(_rollout(turns), [1.0, 1.0])] == [[1, 2, 3, 4], [1, 2, 5]]


def test_versions_within_a_reply_follow_its_spans():
    turn = Turn([1], [2, 3, 4], [-1.0] * 3, ((4, 1), (5, 2)), "stop", {}, 0.0)
    (sample,) = to_samples(_rollout([turn]), [1.0])
    assert sample.policy_versions == [NOT_SAMPLED, 4, 5, 5]


def test_an_empty_reply_makes_no_sample():
    assert to_samples(_rollout([Turn([1], [], [], (), "stop", {}, 0.0)]), [1.0]) == []
    assert to_samples(_rollout([]), []) == []


def test_a_turn_whose_lengths_disagree_is_refused():
    import pytest

    with pytest.raises(ValueError, match="2 tokens came with 1 logprobs"):
        Turn([1], [2, 3], [-1.0], ((0, 2),), "stop", {}, 0.0)


@given(st.lists(st.tuples(IDS, IDS, st.booleans()), min_size=1, max_size=5))
@settings(deadline=None)
def test_every_sampled_token_is_in_exactly_one_mask(conversation: list[tuple[list[int], list[int], bool]]):
    turns: list[Turn] = []
    context: list[int] = []
    for given_ids, sampled, rewritten in conversation:
        prompt = [99, *given_ids] if rewritten else [*context, *given_ids]
        turns.append(make_turn(prompt, sampled))
        context = [*prompt, *sampled]
    samples = to_samples(_rollout(turns), [1.0] * len(turns))
    chosen = [t for s in samples for t, mask in zip(s.token_ids, s.loss_mask, strict=True) if mask]
    assert chosen == [token for turn in turns for token in turn.sampled_ids]
    assert {s.rollout_tokens for s in samples} == {len(chosen)}


def test_components_are_summed_over_turns():
    rollout = make_rollout(turn_rewards=[0.5, 0.25])
    assert rollout.components == {"length": 0.75}
    assert (rollout.sampled_tokens, rollout.oldest_version) == (6, 0)
