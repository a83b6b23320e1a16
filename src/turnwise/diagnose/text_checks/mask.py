"""Does the trainer train on what the policy chose, and on nothing else? Every position is compared with the turns themselves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from turnwise.diagnose.context import Context
from turnwise.diagnose.core import Check, CheckFailed, Finding
from turnwise.diagnose.notes import Notes
from turnwise.diagnose.text_checks.excerpt import excerpt
from turnwise.orchestrator.types import Rollout, Turn
from turnwise.transport import NOT_SAMPLED, Sample

SHOWN = 3  # positions named in evidence


@dataclass(frozen=True)
class Position:
    """What a position of a sample must hold."""

    token: int
    trained: bool = False
    logprob: float = 0.0
    version: int = NOT_SAMPLED
    advantage: float = 0.0


def look(context: Context) -> Finding:
    """Lay the turns of each rollout beside its samples."""
    samples, notes = context.batch.samples, Notes()
    rollouts = {rollout.rollout_id: rollout for judged in context.groups for rollout in judged.group.rollouts}
    advantages = {
        rollout.rollout_id: [float(value) for value in values]
        for judged in context.groups
        for rollout, values in zip(judged.group.rollouts, judged.advantages, strict=True)
    }
    by_rollout: dict[str, list[Sample]] = {}
    for sample in samples:
        by_rollout.setdefault(sample.rollout_id, []).append(sample)
    for rollout_id, own in by_rollout.items():
        if wrong := mismatch(rollouts[rollout_id], advantages[rollout_id], own):
            notes.fail(f"rollout {rollout_id}: {wrong}")
            break
    _fits(samples, context.config.seq_len, notes)
    trained = sum(sum(sample.loss_mask) for sample in samples)
    tokens = sum(len(sample.token_ids) for sample in samples)
    data = {"samples": len(samples), "rollouts": len(by_rollout), "tokens": tokens, "trained": trained}
    summary = (
        f"{trained} of {tokens} tokens ({trained / tokens:.0%}) train: exactly those that were sampled, "
        f"in {len(samples)} samples of {len(by_rollout)} rollouts"
    )
    return notes.finding(summary, data, excerpt(_typical(samples), context.text.tokenizer))


def mismatch(rollout: Rollout, advantages: Sequence[float], samples: Sequence[Sample]) -> str:
    """What is wrong with the samples of a rollout; empty when they say what its turns say."""
    sampled = sum(len(turn.sampled_ids) for turn in rollout.turns)
    turns = [(turn, advantage) for turn, advantage in zip(rollout.turns, advantages, strict=True) if turn.sampled_ids]
    for sample in samples:
        if sample.rollout_tokens != sampled:
            return f"a sample says that the rollout has {sample.rollout_tokens} sampled tokens, and it has {sampled}"
        taken = _turns_in(sample, [turn for turn, _ in turns])
        if not taken:
            return "a sample holds no turn of the rollout as it was prompted and sampled"
        if wrong := _compare(sample, _positions(sample.token_ids, turns[:taken])):
            return wrong
        turns = turns[taken:]
    return f"{len(turns)} turns are in no sample" if turns else ""


def _turns_in(sample: Sample, turns: Sequence[Turn]) -> int:
    """How many of the next turns the tokens of a sample spell, each as its prompt and then its reply."""
    end = 0
    for count, turn in enumerate(turns):
        whole = [*turn.prompt_ids, *turn.sampled_ids]
        if len(whole) <= end or sample.token_ids[: len(whole)] != whole:
            return count
        end = len(whole)
    return len(turns)


def _positions(token_ids: Sequence[int], turns: Sequence[tuple[Turn, float]]) -> list[Position]:
    expected = [Position(token) for token in token_ids]
    for turn, advantage in turns:
        versions = [version for version, tokens in turn.spans for _ in range(tokens)]
        begin = len(turn.prompt_ids)
        for offset, (token, logprob, version) in enumerate(zip(turn.sampled_ids, turn.logprobs, versions, strict=True)):
            expected[begin + offset] = Position(token, True, logprob, version, advantage)
    return expected


def _compare(sample: Sample, expected: Sequence[Position]) -> str:
    """The first thing that differs, and where."""
    masked = [
        i for i, (position, trains) in enumerate(zip(expected, sample.loss_mask, strict=True)) if position.trained != trains
    ]
    if masked:
        shift = _shift([position.trained for position in expected], sample.loss_mask)
        moved = f"; the mask is the right one moved by {shift}" if shift else ""
        told = ", ".join(f"{i} ({'trains' if sample.loss_mask[i] else 'does not train'})" for i in masked[:SHOWN])
        return f"{len(masked)} positions of a sample are masked wrongly, the first {told}{moved}"
    columns: Mapping[str, tuple[Sequence[float], Sequence[float]]] = {
        "logprob": (sample.logprobs, [position.logprob for position in expected]),
        "version": (sample.policy_versions, [position.version for position in expected]),
        "advantage": (sample.advantages, [position.advantage for position in expected]),
    }
    for name, (found, wanted) in columns.items():
        for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
            if one != other:
                return f"the {name} at position {i} is {one:.6g}, and the turn that sampled it says {other:.6g}"
    return ""


def _shift(expected: Sequence[bool], found: Sequence[bool]) -> int:
    """By how many positions a mask was moved; 0 when it is not a moved one."""
    for by in (1, -1, 2, -2):
        moved = [expected[i - by] if 0 <= i - by < len(expected) else False for i in range(len(expected))]
        inner = slice(max(0, by), len(found) + min(0, by))  # what was moved in from outside may be anything
        if moved[inner] == list(found)[inner]:
            return by
    return 0


def _fits(samples: Sequence[Sample], seq_len: int, notes: Notes) -> None:
    longest = max((len(sample.token_ids) for sample in samples), default=0)
    if longest > seq_len:
        notes.fail(f"a sample has {longest} tokens, more than seq_len = {seq_len}")


def _typical(samples: Sequence[Sample]) -> Sample:
    """The sample of median length, to be shown."""
    if not samples:
        raise CheckFailed("the batch has no samples")
    return sorted(samples, key=lambda sample: len(sample.token_ids))[len(samples) // 2]


MASK = Check("mask", "Do exactly the sampled tokens train?", ("reward",), look)
