"""Do rollouts work?"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from support.hand_made import context_of
from support.rollouts import make_group, make_rollout
from turnwise.diagnose.core import Finding, Verdict
from turnwise.diagnose.text_checks.rollouts import ROLLOUTS
from turnwise.orchestrator.tokenizer import load_model_text
from turnwise.orchestrator.types import Rollout, StopReason, Turn

Judge = Callable[..., Finding]


@pytest.fixture
def judged(tiny_model: Path, tmp_path: Path) -> Judge:
    """The finding on a group of these rollouts."""

    def judge(*rollouts: Rollout, **settings: object) -> Finding:
        group = replace(make_group([0.0] * 2), rollouts=rollouts)
        context = context_of([group], tmp_path, batch=False, **settings)
        context.text = load_model_text(str(tiny_model))
        return ROLLOUTS.run(context)

    return judge


def varied(index: int, **changes: object) -> Rollout:
    """A rollout of two turns whose first reply is its own."""
    rollout = make_rollout(turn_rewards=[0.0, 1.0], index=index)
    first, second = rollout.turns
    own = replace(first, sampled_ids=[60 + index, 8, 9])
    after = replace(second, prompt_ids=[*own.prompt_ids, *own.sampled_ids, 4, 5])
    return replace(rollout, turns=(own, after), **changes)


def test_rollouts_that_only_grow_pass(judged: Judge):
    found = judged(*(varied(index) for index in range(8)))
    assert found.verdict is Verdict.PASS, found.evidence
    assert found.evidence.startswith("8 rollouts of 2.0 turns and 6 sampled tokens on average")
    assert found.lines == ("ended by terminated        8",)
    assert found.data["samples_per_rollout"] == 1


def test_few_errors_are_a_warning_and_many_a_failure_with_their_reasons(judged: Judge):
    bad = varied(9, error="EnvFailure: step raised ZeroDivisionError", stop_reason=StopReason.ERROR)
    few = judged(*(varied(index) for index in range(3)), bad)
    assert few.verdict is Verdict.WARN
    assert "1 of 4 rollouts ended with an error: 1 x EnvFailure: step raised ZeroDivisionError" in few.evidence
    many = judged(varied(0), bad, bad, bad)
    assert many.verdict is Verdict.FAIL
    assert "a run stops above orchestrator.max_error_share = 0.5" in many.evidence
    assert judged(bad, bad).verdict is Verdict.FAIL


def test_the_same_text_in_other_tokens_is_drift(judged: Judge):
    rollout = varied(0)
    # 194 alone is no whole character: what stands for it in the text has other tokens
    first = replace(rollout.turns[0], sampled_ids=[60, 129, 9])
    again = replace(rollout.turns[1], prompt_ids=[*first.prompt_ids, 60, *bytes_of("\ufffd"), 9, 4, 5])
    found = judged(replace(rollout, turns=(first, again)), varied(1))
    assert found.verdict is Verdict.FAIL
    assert "1 of 2 prompts spell the same text as before with other tokens (g0-0, turn 1: token 4 was 129" in found.evidence
    assert "Chat.next_prompt" in found.remedy


def bytes_of(text: str) -> list[int]:
    """Ids of the tiny model's tokens, whose vocabulary is the sorted byte alphabet."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return [alphabet.index(character) for piece, _ in pieces for character in piece]


def test_a_rewritten_history_is_a_warning_with_its_cost(judged: Judge):
    rollout = varied(0)
    rewritten = replace(rollout.turns[1], prompt_ids=[3, 3, 3, 4, 5])
    found = judged(replace(rollout, turns=(rollout.turns[0], rewritten)), varied(1))
    assert found.verdict is Verdict.WARN
    assert "1 of 2 prompts rewrite what was said before" in found.evidence
    assert found.data["samples_per_rollout"] == 1.5


def test_replies_cut_by_the_token_limit_are_a_warning(judged: Judge):
    def cut(turn: Turn) -> Turn:
        return replace(turn, finish_reason="length")

    found = judged(*(replace(varied(i), turns=tuple(map(cut, varied(i).turns))) for i in range(2)))
    assert found.verdict is Verdict.WARN
    assert "100% of the replies are cut by the token limit" in found.evidence


def test_full_contexts_are_a_warning(judged: Judge):
    found = judged(varied(0, stop_reason=StopReason.CONTEXT_FULL), varied(1))
    assert "50% of the rollouts end because the context is full" in found.evidence
    assert found.lines == ("ended by context_full      1", "ended by terminated        1")


def test_a_turn_beyond_the_sequence_fails(judged: Judge):
    long = make_rollout(1.0)
    found = judged(replace(long, turns=(replace(long.turns[0], prompt_ids=list(range(3000))),)), varied(1))
    assert "a turn has 3003 tokens with its prompt, more than seq_len = 2048" in found.evidence


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 0.5])
def test_what_is_no_logprob_fails(judged: Judge, value: float):
    rollout = varied(0)
    found = judged(replace(rollout, turns=(replace(rollout.turns[0], logprobs=[value, -1.0, -1.0]),)), varied(1))
    assert found.verdict is Verdict.FAIL
    assert f"1 of 9 logprobs are no logprobs, the first {value}" in found.evidence


def test_empty_replies_alone_fail(judged: Judge):
    silent = make_rollout(1.0)
    turn = replace(silent.turns[0], sampled_ids=[], logprobs=[], spans=[])
    assert "not a single token was sampled" in judged(replace(silent, turns=(turn,))).evidence


def test_a_policy_that_says_one_thing_is_a_warning(judged: Judge):
    found = judged(*(make_rollout(1.0, index=index) for index in range(8)))
    assert "all 8 rollouts begin with the same reply" in found.evidence
    assert found.remedy == "raise orchestrator.sampling.temperature"
