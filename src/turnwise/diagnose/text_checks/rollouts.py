"""Do rollouts work: does the engine answer, do episodes end as they should, and does history keep its tokens?"""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, median

from turnwise.diagnose.context import Context
from turnwise.diagnose.core import Check, Finding
from turnwise.diagnose.notes import Notes
from turnwise.orchestrator.tokenizer import ModelText
from turnwise.orchestrator.types import Rollout, StopReason, Turn

CUT_SHARE = 0.25  # of replies that the token limit cuts, of rollouts that fill the context
ROUNDING = 1e-4  # nats above 0 that a logprob may be computed to
REASONS = 3
FEW_DISTINCT = 8  # fewer replies say nothing about variety


def look(context: Context) -> Finding:
    """Play the first groups of the run with the untrained policy, and look at every turn."""
    played = [r for judged in context.groups for r in (*judged.group.rollouts, *judged.group.failed_attempts)]
    good = [rollout for rollout in played if rollout.ok]
    notes = Notes()
    _errors(played, context.config.orchestrator.max_error_share, notes)
    if not good:
        return notes.finding("", {"rollouts": len(played)}, _table(played))
    turns = [turn for rollout in good for turn in rollout.turns]
    _lengths(good, turns, context.config.seq_len, notes)
    _logprobs(turns, notes)
    _variety(good, notes)
    samples = _drift(good, context.text, notes)
    tokens = sum(rollout.sampled_tokens for rollout in good)
    seconds = [rollout.timing["total_s"] for rollout in good if "total_s" in rollout.timing]
    data = {
        "rollouts": len(played),
        "errored": len(played) - len(good),
        "turns": len(turns),
        "tokens": tokens,
        "cut_share": fmean(turn.finish_reason == "length" for turn in turns),
        "samples_per_rollout": samples,
        "seconds": median(seconds) if seconds else None,
    }
    summary = (
        f"{len(good)} rollouts of {len(turns) / len(good):.1f} turns and {tokens / len(good):.0f} sampled tokens on average; "
        "each turn's prompt goes on from the tokens before it"
    )
    return notes.finding(summary, data, _table(played))


def _errors(played: Sequence[Rollout], allowed: float, notes: Notes) -> None:
    failed = [rollout for rollout in played if not rollout.ok]
    if not failed:
        return
    reasons = Counter(str(rollout.error) for rollout in failed).most_common(REASONS)
    text = f"{len(failed)} of {len(played)} rollouts ended with an error: " + " | ".join(f"{n} x {why}" for why, n in reasons)
    if len(failed) > allowed * len(played):
        notes.fail(f"{text}; a run stops above orchestrator.max_error_share = {allowed:g}", "mend what the reasons name")
    else:
        notes.warn(text, "mend what the reasons name: errored rollouts are repeated, and then lost")


def _lengths(good: Sequence[Rollout], turns: Sequence[Turn], seq_len: int, notes: Notes) -> None:
    longest = max(len(turn.prompt_ids) + len(turn.sampled_ids) for turn in turns)
    if longest > seq_len:
        notes.fail(f"a turn has {longest} tokens with its prompt, more than seq_len = {seq_len}")
    cut = fmean(turn.finish_reason == "length" for turn in turns)
    if cut > CUT_SHARE:
        notes.warn(
            f"{cut:.0%} of the replies are cut by the token limit",
            "raise orchestrator.sampling.max_tokens, unless short replies are what is to be learned",
        )
    full = fmean(rollout.stop_reason is StopReason.CONTEXT_FULL for rollout in good)
    if full > CUT_SHARE:
        notes.warn(
            f"{full:.0%} of the rollouts end because the context is full",
            "raise seq_len, or lower orchestrator.sampling.max_tokens or orchestrator.env.max_turns",
        )


def _logprobs(turns: Sequence[Turn], notes: Notes) -> None:
    values = [value for turn in turns for value in turn.logprobs]
    wrong = [value for value in values if not math.isfinite(value) or value > ROUNDING]
    if wrong:
        notes.fail(f"{len(wrong)} of {len(values)} logprobs are no logprobs, the first {wrong[0]}: the engine computes nonsense")
    if not values:
        notes.fail("not a single token was sampled: every reply is empty")


def _variety(good: Sequence[Rollout], notes: Notes) -> None:
    first = Counter(tuple(rollout.turns[0].sampled_ids) for rollout in good if rollout.turns)
    if len(good) >= FEW_DISTINCT and len(first) == 1:
        notes.warn(f"all {len(good)} rollouts begin with the same reply", "raise orchestrator.sampling.temperature")


def _drift(good: Sequence[Rollout], text: ModelText, notes: Notes) -> float:
    """Judge every step from one prompt to the next; returns samples a rollout, 1 where tokens only grow at the end."""
    rewritten = drifted = pairs = 0
    where = ""
    for rollout in good:
        for number, (turn, after) in enumerate(zip(rollout.turns, rollout.turns[1:], strict=False), 1):
            pairs += 1
            before = [*turn.prompt_ids, *turn.sampled_ids]
            if list(after.prompt_ids[: len(before)]) == before:
                continue
            rewritten += 1
            if _decoded(text, after.prompt_ids).startswith(_decoded(text, before)):
                drifted += 1
                where = where or f"{rollout.rollout_id}, turn {number}: {_first_difference(text, before, after.prompt_ids)}"
    if drifted:
        notes.fail(
            f"{drifted} of {pairs} prompts spell the same text as before with other tokens ({where}): the policy is trained on "
            "tokens that it did not see",
            "take the next prompt from the tokens of the last one (Chat.next_prompt), not from its text",
        )
    samples = 1 + rewritten / len(good)
    if rewritten > drifted:
        notes.warn(
            f"{rewritten - drifted} of {pairs} prompts rewrite what was said before: each becomes a training sample of its own, "
            f"{samples:.1f} a rollout, and the engine computes its prompt anew",
            "use a chat template that only appends (model.chat_template)",
        )
    return samples


def _decoded(text: ModelText, ids: Sequence[int]) -> str:
    return text.tokenizer.decode(list(ids), skip_special_tokens=False)


def _first_difference(text: ModelText, before: Sequence[int], after: Sequence[int]) -> str:
    at = next(i for i, (one, other) in enumerate(zip(before, after, strict=False)) if one != other)
    was, now = (_decoded(text, ids[at : at + 2]) for ids in (before, after))
    return f"token {at} was {before[at]} ({was!r}) and became {after[at]} ({now!r})"


def _table(played: Sequence[Rollout]) -> list[str]:
    counts = Counter(str(rollout.stop_reason) for rollout in played)
    return [f"ended by {reason:<13} {count:>5}" for reason, count in counts.most_common()]


ROLLOUTS = Check(
    "rollouts", "Do rollouts run without errors, each turn on the tokens of the last?", ("plan", "template", "environment"), look
)
