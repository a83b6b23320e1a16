"""What a person who watches `tail -f logs/orchestrator.stdout` sees: a line a batch, and games as they were played."""

from collections.abc import Mapping, Sequence

from turnwise.orchestrator.filters import Fate, JudgedGroup
from turnwise.orchestrator.types import Rollout

MAX_TEXT = 400  # characters of one message that are shown


def batch_line(step: int, max_steps: int, groups: Sequence[JudgedGroup], metrics: Mapping[str, float]) -> str:
    """One line about a batch that goes to the trainer."""
    signal = sum(judged.fate is Fate.SIGNAL for judged in groups)
    parts = [
        f"batch {step}/{max_steps}",
        f"reward {metrics.get('critic/reward/mean', 0.0):.3f} ± {metrics.get('critic/reward/std', 0.0):.3f}",
        f"{signal} of {len(groups)} groups with signal",
        f"turns {metrics.get('num_turns/mean', 0.0):.1f}",
        f"tokens {metrics.get('response_length/mean', 0.0):.1f}",
        f"lag {metrics.get('staleness/max', 0.0):.0f}",
        f"{metrics.get('throughput/tokens_per_s', 0.0):.0f} tok/s",
        f"{metrics.get('timing/batch_s', 0.0):.1f} s",
    ]
    troubles = [
        f"{int(metrics[name])} {label}"
        for name, label in (("rollouts/errored/count", "errored"), ("groups/stale/count", "groups too old"))
        if metrics.get(name)
    ]
    return " | ".join([*parts, *troubles])


def pick_samples(groups: Sequence[JudgedGroup], count: int) -> list[Rollout]:
    """Rollouts worth looking at: the best of the batch, then the worst, then others."""
    valid = sorted((r for judged in groups for r in judged.group.valid), key=lambda rollout: -rollout.reward)
    ends = [rollout for pair in zip(valid, reversed(valid), strict=True) for rollout in pair]
    return list({rollout.rollout_id: rollout for rollout in ends}.values())[:count]


def render_rollout(rollout: Rollout) -> str:
    """A rollout as text: observation, reply and what it earned, turn by turn."""
    head = f"rollout {rollout.rollout_id} of {rollout.env}, task {rollout.task_id}: reward {rollout.reward:.3f}"
    lines = [f"┌ {head}, {rollout.stop_reason}"]
    turns = {id(message): turn for message, turn in zip(rollout.said, rollout.turns, strict=False)}
    for message in rollout.messages:
        label = {"assistant": "reply >", "system": "system:"}.get(message["role"], "env   :")
        lines += _block(label, message.get("raw") or message["content"])
        if (turn := turns.get(id(message))) is not None:
            earned = ", ".join(f"{name} {value:+.2f}" for name, value in turn.components.items() if value) or "nothing"
            cut = ", cut by max_tokens" if turn.finish_reason == "length" else ""
            lines.append(f"│         {turn.reward:+.3f} ({earned}; {len(turn.sampled_ids)} tokens{cut})")
    if rollout.error:
        lines += _block("error  :", rollout.error)
    return "\n".join([*lines, "└"])


def _block(label: str, text: str) -> list[str]:
    shown = text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}... ({len(text)} characters)"
    first, *rest = [_visible(line) for line in shown.split("\n")]
    return [f"│ {label} {first}", *(f"│         {line}" for line in rest)]


def _visible(line: str) -> str:
    """Control characters as escapes: a reply must not move the cursor of whoever watches."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
