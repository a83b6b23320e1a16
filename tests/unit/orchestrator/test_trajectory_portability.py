"""What other frameworks promise of trajectories and of multi-turn loops, held against our rollouts and samples.

The promises are those that the test suite of verifiers checks, of both of its APIs, on its own records: tokens, masks and log
probabilities that go together, environment messages between replies, truncation, forks where a history is not continued,
stop conditions, errors. Its promises about images, expert routing and judges have no counterpart here.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.rollouts import make_turn
from turnwise.config import EnvConfig
from turnwise.envs.base import Step, Task, TextEnv
from turnwise.inference.client import Completion
from turnwise.inference.errors import EngineError
from turnwise.orchestrator.chat import TemplateChat
from turnwise.orchestrator.environments import EnvSetup, load_setups
from turnwise.orchestrator.rollout import Generate, Player, RolloutSpec
from turnwise.orchestrator.samples import to_samples
from turnwise.orchestrator.types import Rollout, StopReason, Turn
from turnwise.transport import NOT_SAMPLED, Sample

Policy = Callable[..., Generate]


class Interview(TextEnv):
    """Asks question after question; "bye" ends it, "crash" breaks it. Pays the number of the question."""

    component_names = frozenset({"answered", "win"})
    system_prompt = "Answer."
    examples = ({"role": "user", "content": "question 0"}, {"role": "assistant", "content": "an answer"})
    max_turns = 6
    asked: list[str] = []  # over all instances: what the environment was given

    def tasks(self, split: str) -> Sequence[Task]:
        return [{"id": f"{split}-{i}", "topics": ["a", "b"]} for i in range(3)]

    def begin(self, task: Task) -> str:
        return f"question 1 of {task['id']}"

    def step(self, action: str) -> Step:
        self.turn += 1
        Interview.asked.append(action)
        if action == "crash":
            raise ZeroDivisionError("planted")
        paid = {"answered": float(self.turn)}
        return (
            self.win("good bye", components=paid)
            if action == "bye"
            else self.answer(f"question {self.turn + 1}", components=paid)
        )


@pytest.fixture
def setup() -> EnvSetup:
    Interview.asked = []
    return load_setups([EnvConfig(id=f"{__name__}:Interview")], "train")[0]


@pytest.fixture
def player(player: Player) -> Player:
    return replace(player, seq_len=2048)


def spec(setup: EnvSetup, index: int = 0) -> RolloutSpec:
    return RolloutSpec(f"g0-{index}", 0, setup, setup.tasks[index], env_seed=1, sampling_seed=2 + index)


def of(*turns: Turn, rollout_id: str = "g0-0") -> Rollout:
    return Rollout(rollout_id, 0, "interview", "t", turns, (), StopReason.TERMINATED)


def sample_of(rollout: Rollout) -> Sample:
    (sample,) = to_samples(rollout, [float(i + 1) for i in range(len(rollout.turns))])
    return sample


# tokens, masks and log probabilities of single replies


def test_prompt_and_reply_are_joined_with_the_mask_on_the_reply_and_its_log_probabilities_in_place():
    sample = sample_of(of(Turn([1, 2, 3], [4, 5], [-0.1, -0.2], ((0, 2),), "stop", {}, 0.0)))
    assert sample.token_ids == [1, 2, 3, 4, 5]
    assert sample.loss_mask == [False, False, False, True, True]
    assert sample.logprobs == [0.0, 0.0, 0.0, -0.1, -0.2]


def test_rollouts_become_samples_of_their_own_under_their_own_names():
    rollouts = [of(make_turn([1, 2], [3, 4]), rollout_id="g0-0"), of(make_turn([5], [6, 7, 8]), rollout_id="g0-1")]
    samples = [sample_of(rollout) for rollout in rollouts]
    assert [(s.rollout_id, s.token_ids, s.rollout_tokens) for s in samples] == [
        ("g0-0", [1, 2, 3, 4], 2),
        ("g0-1", [5, 6, 7, 8], 3),
    ]


def test_a_reply_without_tokens_is_passed_over_and_those_after_it_are_kept():
    empty = Turn([1], [], [], (), "stop", {}, 0.0)
    sample = sample_of(of(empty, make_turn([1], [2, 3])))
    assert (sample.token_ids, sample.loss_mask) == ([1, 2, 3], [False, True, True])
    assert sample.advantages == [0.0, 2.0, 2.0]  # those of the second turn


async def test_a_reply_whose_tokens_lack_log_probabilities_is_an_error_and_never_trained_on(player: Player, setup: EnvSetup):
    async def bare(prompt: Sequence[int], max_tokens: int, seed: int) -> Completion:
        return Completion((5, 6), (-0.5,), "stop", ((0, 2),))

    rollout = await player.play(spec(setup), bare)
    assert rollout.stop_reason is StopReason.ERROR
    assert "lengths differ" in str(rollout.error)
    assert rollout.turns == ()


def test_a_sample_survives_the_wire_and_one_whose_lists_disagree_does_not():
    sample = sample_of(of(make_turn([1, 2], [3, 4], version=7)))
    packed = msgspec.msgpack.encode(sample)
    assert msgspec.msgpack.decode(packed, type=Sample) == sample
    torn = {**msgspec.to_builtins(sample), "logprobs": [0.0]}
    with pytest.raises(msgspec.ValidationError, match="per-token lists of lengths"):
        msgspec.convert(torn, Sample)


# several turns in one sample, and forks


async def test_a_conversation_only_grows_and_environment_messages_stand_between_replies_outside_the_mask(
    player: Player, policy_saying: Policy, setup: EnvSetup, tiny_chat: TemplateChat
):
    rollout = await player.play(spec(setup), policy_saying("one", "two", "bye"))
    for before, after in zip(rollout.turns, rollout.turns[1:], strict=False):
        grown = [*before.prompt_ids, *before.sampled_ids]
        assert list(after.prompt_ids[: len(grown)]) == grown
        assert len(after.prompt_ids) > len(grown)
    sample = sample_of(rollout)
    last = rollout.turns[-1]
    assert sample.token_ids == [*last.prompt_ids, *last.sampled_ids]
    trained = [token for token, mask in zip(sample.token_ids, sample.loss_mask, strict=True) if mask]
    assert trained == [token for turn in rollout.turns for token in turn.sampled_ids]
    assert tiny_chat.text(trained[:4]) == "one"
    between = sample.token_ids[len(rollout.turns[0].prompt_ids) + 4 : len(rollout.turns[1].prompt_ids)]
    assert "question 2" in tiny_chat.text(between)


async def test_each_turn_keeps_its_reward_and_its_advantage_stands_on_its_tokens_alone(
    player: Player, policy_saying: Policy, setup: EnvSetup
):
    rollout = await player.play(spec(setup), policy_saying("one", "two", "bye"))
    assert [turn.reward for turn in rollout.turns] == [1.0, 2.0, 4.0]
    sample = sample_of(rollout)
    runs = [a for a, mask in zip(sample.advantages, sample.loss_mask, strict=True) if mask]
    assert runs == [number for number, turn in enumerate(rollout.turns, 1) for _ in turn.sampled_ids]
    assert {a for a, mask in zip(sample.advantages, sample.loss_mask, strict=True) if not mask} == {0.0}


async def test_replies_of_worked_examples_are_in_the_prompt_and_are_no_turns(
    player: Player, policy_saying: Policy, setup: EnvSetup
):
    rollout = await player.play(spec(setup), policy_saying("bye"))
    assert [message["role"] for message in rollout.messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert (len(rollout.turns), rollout.replies()) == (1, ["bye"])
    assert sum(sample_of(rollout).loss_mask) == len("bye") + 1


def test_the_same_text_in_other_tokens_is_another_sample():
    """A prompt that spells the reply anew in other tokens is not what was sampled: the mask would lie about it."""
    first, second = make_turn([1, 2], [3, 4]), make_turn([1, 2, 34, 5], [6])
    samples = to_samples(of(first, second), [1.0, 1.0])
    assert [sample.token_ids for sample in samples] == [[1, 2, 3, 4], [1, 2, 34, 5, 6]]
    assert [sum(sample.loss_mask) for sample in samples] == [2, 1]
    assert {sample.rollout_tokens for sample in samples} == {3}


def test_a_history_that_is_compacted_forks_and_goes_on_growing_from_the_fork():
    turns = [make_turn([1], [2]), make_turn([1, 2, 3], [4]), make_turn([9], [5]), make_turn([9, 5, 6], [7])]
    samples = to_samples(of(*turns), [1.0, 2.0, 3.0, 4.0])
    assert [sample.token_ids for sample in samples] == [[1, 2, 3, 4], [9, 5, 6, 7]]
    assert [sample.advantages for sample in samples] == [[0.0, 1.0, 0.0, 2.0], [0.0, 3.0, 0.0, 4.0]]


def test_a_retry_of_the_same_prompt_does_not_continue_the_reply_before_it():
    samples = to_samples(of(make_turn([1, 2], [3]), make_turn([1, 2], [3, 4])), [1.0, 1.0])
    assert [sample.token_ids for sample in samples] == [[1, 2, 3], [1, 2, 3, 4]]
    assert [sample.loss_mask for sample in samples] == [[False, False, True], [False, False, True, True]]


IDS = st.lists(st.integers(0, 9), min_size=1, max_size=4)


@given(st.lists(st.tuples(IDS, IDS, st.sampled_from(["grows", "rewritten", "cut"])), min_size=1, max_size=6))
@settings(deadline=None)
def test_samples_hold_every_sampled_token_once_with_its_own_log_probability_and_version(
    parts: list[tuple[list[int], list[int], str]],
):
    turns: list[Turn] = []
    context: list[int] = []
    for number, (given_ids, sampled, how) in enumerate(parts):
        start = {"grows": context, "rewritten": [77], "cut": context[: len(context) // 2]}[how]
        prompt = [*start, *given_ids]
        logprobs = [-(number + i / 10) for i in range(len(sampled))]
        turns.append(Turn(prompt, sampled, logprobs, ((number, len(sampled)),), "stop", {}, 0.0))
        context = [*prompt, *sampled]
    samples = to_samples(of(*turns), [float(number) for number in range(len(turns))])
    columns = [(s.token_ids, s.logprobs, s.policy_versions, s.advantages, s.loss_mask) for s in samples]
    found = [entry[:4] for column in columns for entry in zip(*column, strict=True) if entry[4]]
    expected = [
        (token, logprob, number, float(number))
        for number, turn in enumerate(turns)
        for token, logprob in zip(turn.sampled_ids, turn.logprobs, strict=True)
    ]
    assert found == expected
    outside = {entry[1:4] for column in columns for entry in zip(*column, strict=True) if not entry[4]}
    assert outside <= {(0.0, NOT_SAMPLED, 0.0)}


# truncation


async def test_no_more_is_asked_for_than_fits_and_a_cut_reply_is_truncated_within_the_length(
    player: Player, policy_saying: Policy, setup: EnvSetup
):
    calls: list[tuple[list[int], int, int]] = []
    opening = await player.play(spec(setup), policy_saying("bye"))
    room = len(opening.turns[0].prompt_ids) + 2
    rollout = await replace(player, seq_len=room).play(spec(setup), policy_saying("abcdef", calls=calls))
    assert [limit for _, limit, _ in calls] == [2]
    assert (rollout.stop_reason, rollout.turns[0].finish_reason) == (StopReason.CONTEXT_FULL, "length")
    assert rollout.replies() == ["ab"]
    assert len(sample_of(rollout).token_ids) == room


async def test_a_prompt_beyond_the_length_is_an_error_before_the_model_is_asked(
    player: Player, policy_saying: Policy, setup: EnvSetup
):
    calls: list[tuple[list[int], int, int]] = []
    rollout = await replace(player, seq_len=8).play(spec(setup), policy_saying("a", calls=calls))
    assert (rollout.stop_reason, calls, rollout.turns) == (StopReason.ERROR, [], ())
    assert to_samples(rollout, []) == []


# the loop: stop conditions, what is asked when, and what is kept


async def test_an_episode_that_ends_at_its_first_reply_asks_the_model_once(
    player: Player, policy_saying: Policy, setup: EnvSetup
):
    calls: list[tuple[list[int], int, int]] = []
    rollout = await player.play(spec(setup), policy_saying("bye", calls=calls))
    assert (len(calls), len(rollout.turns), rollout.stop_reason) == (1, 1, StopReason.TERMINATED)


async def test_the_last_word_of_the_environment_is_recorded_and_not_answered(
    player: Player, policy_saying: Policy, setup: EnvSetup, tiny_chat: TemplateChat
):
    calls: list[tuple[list[int], int, int]] = []
    rollout = await player.play(spec(setup), policy_saying("one", "bye", "never said", calls=calls))
    assert rollout.messages[-1] == {"role": "user", "content": "good bye"}
    assert len(calls) == 2
    assert "good bye" not in tiny_chat.text(sample_of(rollout).token_ids)


@pytest.mark.parametrize(("limit", "turns", "reason"), [(None, 6, "truncated"), (2, 2, "max_turns"), (1, 1, "max_turns")])
async def test_the_environments_limit_holds_unless_a_lower_one_is_configured(
    player: Player, policy_saying: Policy, limit: int | None, turns: int, reason: str
):
    (setup,) = load_setups([EnvConfig(id=f"{__name__}:Interview", max_turns=limit)], "train")
    Interview.asked = []
    rollout = await player.play(spec(setup), policy_saying("on"))
    assert (len(rollout.turns), str(rollout.stop_reason), Interview.asked) == (turns, reason, ["on"] * turns)


async def test_the_reply_that_a_limit_cuts_off_is_still_played_and_paid(player: Player, policy_saying: Policy):
    (setup,) = load_setups([EnvConfig(id=f"{__name__}:Interview", max_turns=2)], "train")
    rollout = await player.play(spec(setup), policy_saying("one", "bye"))
    assert rollout.stop_reason is StopReason.TERMINATED  # its own end comes before the limit
    assert rollout.components == {"answered": 3.0, "win": 1.0}


async def test_observations_follow_the_state_of_their_own_episode(player: Player, policy_saying: Policy, setup: EnvSetup):
    first = await player.play(spec(setup, 0), policy_saying("a", "bye"))
    second = await player.play(spec(setup, 1), policy_saying("b", "bye"))
    told = [[m["content"] for m in rollout.messages if m["role"] == "user"][1:] for rollout in (first, second)]
    assert told == [[f"question 1 of train-{i}", "question 2", "good bye"] for i in (0, 1)]


async def test_playing_changes_neither_the_task_nor_the_opening(player: Player, policy_saying: Policy, setup: EnvSetup):
    before = json.dumps([dict(task) for task in setup.tasks]), json.dumps(setup.examples)
    await player.play(spec(setup), policy_saying("one", "bye"))
    assert (json.dumps([dict(task) for task in setup.tasks]), json.dumps(setup.examples)) == before


async def test_what_is_asked_of_the_model_is_the_prompt_the_limit_and_a_seed_of_its_own(
    player: Player, policy_saying: Policy, setup: EnvSetup
):
    calls: list[tuple[list[int], int, int]] = []
    rollout = await player.play(spec(setup), policy_saying("one", "two", "bye", calls=calls))
    assert [prompt for prompt, _, _ in calls] == [list(turn.prompt_ids) for turn in rollout.turns]
    assert [limit for _, limit, _ in calls] == [player.max_tokens] * 3
    assert len({seed for _, _, seed in calls}) == 3


# errors


async def test_an_error_keeps_the_turns_before_it_and_outranks_every_other_reason(
    player: Player, policy_saying: Policy, setup: EnvSetup
):
    rollout = await player.play(spec(setup), policy_saying("one", "crash"))
    assert rollout.stop_reason is StopReason.ERROR
    assert "ZeroDivisionError: planted" in str(rollout.error)
    assert [turn.reward for turn in rollout.turns] == [1.0, 0.0]
    assert rollout.replies() == ["one", "crash"]


async def test_a_failure_of_the_model_leaves_no_reply_behind(player: Player, policy_saying: Policy, setup: EnvSetup):
    good = policy_saying("one")

    async def fails(prompt: Sequence[int], max_tokens: int, seed: int) -> Completion:
        if Interview.asked:
            raise EngineError("planted")
        return await good(prompt, max_tokens, seed)

    rollout = await player.play(spec(setup), fails)
    assert (rollout.stop_reason, rollout.replies(), len(rollout.turns)) == (StopReason.ERROR, ["one"], 1)
    assert rollout.messages[-1] == {"role": "user", "content": "question 2"}  # not the reply before, said again


async def test_a_record_survives_being_written_as_json(player: Player, policy_saying: Policy, setup: EnvSetup):
    rollout = await player.play(spec(setup), policy_saying("one", "crash"))
    summary = rollout.summary()
    read: Mapping[str, Any] = json.loads(json.dumps(summary))
    assert read == summary
    assert (read["stop_reason"], read["turns"], read["error"]) == ("error", 2, rollout.error)
