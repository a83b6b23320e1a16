"""Rollouts as a person reads them: who said what, and what it earned."""

import re
from collections.abc import Mapping
from typing import Any

MAX_CHARACTERS = 1200  # of one message; a report is for reading
MAX_MESSAGES = 16


def dialogue(rollout: Mapping[str, Any], *, with_system: bool = True) -> str:
    """A rollout as Markdown: one line of facts, then its messages, long ones cut in the middle."""
    messages = [m for m in rollout.get("messages") or [] if with_system or m.get("role") != "system"]
    shown = messages if len(messages) <= MAX_MESSAGES else [*messages[: MAX_MESSAGES // 2], None, *messages[-MAX_MESSAGES // 2 :]]
    left_out = len(messages) - MAX_MESSAGES
    parts = [_message(m) if m is not None else f"*… {left_out} messages left out …*" for m in shown]
    return "\n\n".join([_facts(rollout), *(parts or ["*(no messages were recorded)*"])])


def pick(rollouts: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The best rollout and the middle one by reward, each with its label; those with errors only if there are no others."""
    ranked = sorted((r for r in rollouts if not r.get("error")), key=_reward)
    if not ranked:
        return [("errored", rollouts[0])] if rollouts else []
    best, middle = ranked[-1], ranked[(len(ranked) - 1) // 2]
    return [("best", best)] if best is middle else [("typical", middle), ("best", best)]


def _reward(rollout: Mapping[str, Any]) -> float:
    value = rollout.get("reward")
    return float(value) if isinstance(value, int | float) else 0.0


def _facts(rollout: Mapping[str, Any]) -> str:
    facts = [f"task `{rollout.get('task_id', '?')}`", f"reward **{_reward(rollout):.3f}**"]
    components = rollout.get("components") or {}
    facts += [", ".join(f"{name} {value:+.2f}" for name, value in components.items())] if components else []
    facts += [f"ended: {rollout['stop_reason']}"] if rollout.get("stop_reason") else []
    facts += [f"error: {_one_line(rollout['error'])}"] if rollout.get("error") else []
    return " · ".join(facts)


def _message(message: Mapping[str, Any]) -> str:
    text = _shorten(str(message.get("raw") or message.get("content") or "").rstrip())
    longest = max((len(ticks) for ticks in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)  # whatever fences the text holds, this one is longer
    return f"**{message.get('role', '?')}**\n\n{fence}text\n{text}\n{fence}"


def _shorten(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]}\n… {len(text) - 2 * half} characters left out …\n{text[-half:]}"


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:300]
