"""Does the trainer train on what the policy chose, and on nothing else?"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.hand_made import context_of
from support.rollouts import echo_setup, make_group, make_rollout, make_turn
from turnwise.diagnose.context import Context
from turnwise.diagnose.core import Verdict
from turnwise.diagnose.text_checks.excerpt import LINES, excerpt
from turnwise.diagnose.text_checks.mask import MASK, mismatch
from turnwise.orchestrator.buffer import GroupTask
from turnwise.orchestrator.filters import FinishedGroup
from turnwise.orchestrator.samples import to_samples
from turnwise.orchestrator.tokenizer import ModelText, load_model_text
from turnwise.orchestrator.types import Rollout, Turn
from turnwise.transport import NOT_SAMPLED, Sample

ids = st.lists(st.integers(0, 255), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def tiny_text(tiny_model: Path) -> ModelText:
    return load_model_text(str(tiny_model))


def played(parts: Sequence[tuple[Sequence[int], Sequence[int], bool]]) -> Rollout:
    """A rollout of turns, each (new tokens of its prompt, sampled tokens, whether the history is rewritten before it)."""
    turns: list[Turn] = []
    history: list[int] = []
    for number, (given_ids, sampled, rewritten) in enumerate(parts):
        prompt = [*([250, *history[1:]] if rewritten else history), *given_ids]
        turns.append(make_turn(prompt, sampled, version=number % 2))
        history = [*prompt, *sampled]
    return replace(make_rollout(1.0), turns=tuple(turns))


@pytest.fixture
def context(tmp_path: Path, tiny_text: ModelText) -> Context:
    """One group of two rollouts of two turns, the second of which lost."""
    env = echo_setup()
    group = FinishedGroup(
        0,
        GroupTask(env, 0, env.tasks[0], 0),
        (
            make_rollout(turn_rewards=[0.5, 1.0], index=0),
            make_rollout(turn_rewards=[0.0, 0.0], index=1),
        ),
    )
    context = context_of([group], tmp_path)
    context.text = tiny_text
    return context


def with_samples(context: Context, change: Callable[[Sample], Sample]) -> str:
    """Evidence of the failure after every sample was changed."""
    context.batch = msgspec.structs.replace(context.batch, samples=[change(sample) for sample in context.batch.samples])
    found = MASK.run(context)
    assert found.verdict is Verdict.FAIL
    return found.evidence


def moved(values: Sequence[object], by: int, empty: object) -> list[object]:
    return [values[i - by] if 0 <= i - by < len(values) else empty for i in range(len(values))]


def test_samples_as_a_run_makes_them_pass(context: Context):
    found = MASK.run(context)
    assert found.verdict is Verdict.PASS, found.evidence
    assert found.evidence.startswith("12 of 22 tokens (55%) train: exactly those that were sampled, in 2 samples of 2 rollouts")
    assert found.lines


@settings(deadline=None)
@given(st.lists(st.tuples(ids, ids, st.booleans()), min_size=1, max_size=5))
def test_samples_of_any_rollout_agree_with_its_turns(parts: list[tuple[list[int], list[int], bool]]):
    rollout = played(parts)
    advantages = [float(number + 1) for number in range(len(parts))]
    assert mismatch(rollout, advantages, to_samples(rollout, advantages)) == ""


@settings(deadline=None)
@given(st.lists(st.tuples(ids, ids, st.booleans()), min_size=1, max_size=5), st.sampled_from([-2, -1, 1, 2]))
def test_a_moved_mask_never_agrees(parts: list[tuple[list[int], list[int], bool]], by: int):
    rollout = played(parts)
    advantages = [1.0] * len(parts)
    samples = [
        msgspec.structs.replace(
            sample,
            loss_mask=moved(sample.loss_mask, by, False),
            policy_versions=moved(sample.policy_versions, by, NOT_SAMPLED),
        )
        for sample in to_samples(rollout, advantages)
    ]
    assert mismatch(rollout, advantages, samples)


def test_a_mask_moved_by_one_is_called_that(context: Context):
    def shift(sample: Sample) -> Sample:
        mask, versions = moved(sample.loss_mask, 1, False), moved(sample.policy_versions, 1, NOT_SAMPLED)
        return msgspec.structs.replace(sample, loss_mask=mask, policy_versions=versions)

    evidence = with_samples(context, shift)
    assert "rollout g0-0: 3 positions of a sample are masked wrongly, the first 3 (does not train), 6 (trains)" in evidence
    assert "the mask is the right one moved by 1" in evidence


def test_a_prompt_that_trains_is_found(context: Context):
    def everything(sample: Sample) -> Sample:
        count = len(sample.token_ids)
        return msgspec.structs.replace(sample, loss_mask=[True] * count, policy_versions=[0] * count)

    assert "5 positions of a sample are masked wrongly, the first 0 (trains), 1 (trains)" in with_samples(context, everything)


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("logprobs", -0.25, "the logprob at position 4 is -0.25, and the turn that sampled it says -0.5"),
        ("policy_versions", 3, "the version at position 4 is 3, and the turn that sampled it says 0"),
        ("advantages", 9.0, "the advantage at position 4 is 9, and the turn that sampled it says 0.7"),
    ],
)
def test_a_value_of_another_token_is_found(context: Context, column: str, value: float, told: str):
    def change(sample: Sample) -> Sample:
        values = list(getattr(sample, column))
        values[4] = value
        return msgspec.structs.replace(sample, **{column: values})

    assert told in with_samples(context, change)


def test_a_token_that_nobody_sampled_is_found(context: Context):
    def change(sample: Sample) -> Sample:
        return msgspec.structs.replace(sample, token_ids=[*sample.token_ids[:4], 99, *sample.token_ids[5:]])

    assert "holds no turn of the rollout as it was prompted and sampled" in with_samples(context, change)


def test_a_turn_that_is_left_out_is_found():
    rollout = played([([1], [2], False), ([3], [4], True)])
    samples = to_samples(rollout, [1.0, 1.0])
    assert len(samples) == 2
    assert mismatch(rollout, [1.0, 1.0], samples[:1]) == "1 turns are in no sample"


def test_a_wrong_count_of_sampled_tokens_is_found(context: Context):
    evidence = with_samples(context, lambda sample: msgspec.structs.replace(sample, rollout_tokens=5))
    assert "a sample says that the rollout has 5 sampled tokens, and it has 6" in evidence


def test_a_sample_longer_than_a_sequence_is_found(context: Context):
    context.config = context.config.model_copy(update={"seq_len": 8})
    assert "a sample has 11 tokens, more than seq_len = 8" in MASK.run(context).evidence


def sample_of(tokenizer: ModelText, *parts: tuple[str, bool]) -> Sample:
    token_ids: list[int] = []
    mask: list[bool] = []
    for text, trains in parts:
        own = tokenizer.tokenizer.encode(text, add_special_tokens=False).ids
        token_ids += own
        mask += [trains] * len(own)
    zeros = [0.0] * len(token_ids)
    versions = [0 if trains else NOT_SAMPLED for trains in mask]
    return Sample(token_ids, mask, zeros, zeros, versions, sum(mask), "g0-0", 0, "t0")


def test_what_trains_stands_in_brackets_on_every_line(tiny_text: ModelText):
    parts = (("<|im_start|>user\nhow?<|im_end|>\n", False), ("one\ntwo<|im_end|>", True), ("\n<|im_start|>user", False))
    assert excerpt(sample_of(tiny_text, *parts), tiny_text.tokenizer) == (
        *("<|im_start|>user", "how?<|im_end|>", "⟦one↵⟧", "⟦two<|im_end|>⟧", "<|im_start|>user"),
    )


def test_long_prompts_and_replies_are_shortened(tiny_text: ModelText):
    shown = "\n".join(excerpt(sample_of(tiny_text, ("a" * 5000, False), ("b" * 5000, True)), tiny_text.tokenizer))
    assert len(shown) < 500
    assert "a … a" in shown
    assert shown.endswith("b⟧")


def test_a_sample_of_many_lines_is_shortened_to_a_screen(tiny_text: ModelText):
    parts = [part for number in range(50) for part in ((f"say {number}\n", False), ("yes\n", True))]
    assert len(excerpt(sample_of(tiny_text, *parts), tiny_text.tokenizer)) <= LINES + 1


def test_groups_that_are_in_no_batch_are_not_asked_for(context: Context):
    context.groups = [*context.groups, *context_of([make_group([1.0, 0.0], number=5)], context.scratch).groups]
    assert MASK.run(context).verdict is Verdict.PASS
