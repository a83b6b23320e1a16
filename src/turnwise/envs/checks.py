"""Answers of `reset`, `step` and `finish`, checked by whoever plays an environment: nothing malformed is taken for a zero."""

import math
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from turnwise.envs.messages import ToolCall

Message = dict[str, Any]
OPENING_ROLES = ("system", "user", "assistant", "tool")


def raised_words(error: BaseException) -> str:
    """What was raised, and where: `TypeError: words (file.py:12)`."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"


class EnvNonsense(Exception):
    """An environment answered something that its contract does not allow."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """A checked answer of `TextEnv.step`."""

    messages: list[Message]  # what answers the reply: one of the user, or those of tools
    terminated: bool
    truncated: bool
    components: dict[str, float]
    metrics: dict[str, float]


def checked_reset(answer: object) -> str:
    """The observation of a `reset`. Raises EnvNonsense."""
    if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], str)):
        raise EnvNonsense(f"reset returned {_short(answer)}, not (text, info)")
    return clean_text(answer[0])


def checked_opening(answer: object) -> list[Message] | None:
    """The whole conversation that a `reset` opens, where its info has one under "messages"; None where it has none.

    Raises:
        EnvNonsense: it is no conversation that the policy could answer.
    """
    checked_reset(answer)
    info = answer[1] if isinstance(answer, tuple) else None
    told = info.get("messages") if isinstance(info, Mapping) else None
    if told is None:
        return None
    if not isinstance(told, list | tuple) or not told:
        raise EnvNonsense(f"reset returned info['messages'] = {_short(told)}, not a list of messages")
    for message in told:
        if not isinstance(message, Mapping) or message.get("role") not in OPENING_ROLES:
            raise EnvNonsense(f"info['messages'] of reset holds {_short(message)}, not a message of one of {OPENING_ROLES}")
        if not isinstance(message.get("content"), str):
            raise EnvNonsense(f"info['messages'] of reset has content {_short(message.get('content'))}, not text")
    if told[-1]["role"] == "assistant":
        raise EnvNonsense("info['messages'] of reset ends with a reply; it must end with what the policy is to answer")
    return [{**message, "content": clean_text(message["content"])} for message in told]


def checked_step(answer: object, component_names: Collection[str], calls: Sequence[ToolCall] | None = None) -> StepResult:
    """The five-tuple of a `step`, with every type and number checked.

    Args:
        calls: what the reply called, where the environment offers tools: `info["messages"]` answers each, in order. Without
            tools, it may hold messages of the user in place of the observation.

    Raises:
        EnvNonsense: something is not as the contract of environments has it.
    """
    if not (isinstance(answer, tuple) and len(answer) == 5):
        raise EnvNonsense(f"step returned {_short(answer)}, not (text, reward, terminated, truncated, info)")
    observation, reward, terminated, truncated, info = answer
    if not isinstance(observation, str):
        raise EnvNonsense(f"step returned the observation {_short(observation)}, not text")
    if not _is_number(reward):
        raise EnvNonsense(f"step returned the reward {_short(reward)}, not a finite number")
    if not (isinstance(terminated, bool | np.bool_) and isinstance(truncated, bool | np.bool_)):
        raise EnvNonsense(f"step returned terminated={_short(terminated)}, truncated={_short(truncated)}, not two booleans")
    if not isinstance(info, Mapping):
        raise EnvNonsense(f"step returned the info {_short(info)}, not a mapping")
    told = info.get("messages")
    if told is None:
        told = [{"role": "user", "content": observation}]
    return StepResult(
        messages=checked_messages(told, calls or (), over=bool(terminated or truncated)),
        terminated=bool(terminated),
        truncated=bool(truncated),
        components=checked_numbers(info.get("reward_components", {}), "reward_components", component_names),
        metrics=checked_numbers(info.get("metrics", {}), "metrics"),
    )


def checked_messages(messages: object, calls: Sequence[ToolCall], *, over: bool = False) -> list[Message]:
    """What answers a reply with tools on offer: one tool message a call, in order, and user messages after them.

    Args:
        over: the episode ended, so that calls may be left without an answer.

    Raises:
        EnvNonsense: anything else.
    """
    if not isinstance(messages, list | tuple):
        raise EnvNonsense(f"info['messages'] is {_short(messages)}, not a list of messages")
    told = [_checked_message(message) for message in messages]
    answered = [message["tool_call_id"] for message in told if message["role"] == "tool"]
    asked = [call.id for call in calls]
    if answered != asked and not (over and answered == asked[: len(answered)]):
        raise EnvNonsense(
            f"info['messages'] answers the calls {answered}, but the reply made {asked}; one tool message a call, in order"
        )
    if any(message["role"] == "tool" for message in told[len(answered) :]) or not (told or over):
        raise EnvNonsense(
            "info['messages'] must hold the answers to calls first, then messages of the user, and at least one in all"
        )
    return told


def _checked_message(message: object) -> Message:
    if not isinstance(message, Mapping) or message.get("role") not in ("tool", "user"):
        raise EnvNonsense(f"info['messages'] holds {_short(message)}, not a message with the role tool or user")
    wanted = ("content", "tool_call_id", "name") if message["role"] == "tool" else ("content",)
    for key in wanted:
        if not isinstance(message.get(key), str):
            raise EnvNonsense(
                f"info['messages'] has {key} = {_short(message.get(key))} in a message of the {message['role']}, not text"
            )
    return {"role": message["role"], **{key: clean_text(message[key]) for key in wanted}}


def clean_text(text: str) -> str:
    """Text that can be encoded: lone surrogates, as from undecodable output of a program, become question marks."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
    return text


def checked_numbers(values: object, what: str, known: Collection[str] = ()) -> dict[str, float]:
    """A mapping of names to finite numbers; names outside a non-empty `known` are refused. Raises EnvNonsense."""
    if not isinstance(values, Mapping):
        raise EnvNonsense(f"{what} is {_short(values)}, not a mapping of names to numbers")
    for name, value in values.items():
        if not (isinstance(name, str) and _is_number(value)):
            raise EnvNonsense(f"{what}[{name!r}] is {_short(value)}, not a finite number under a name")
        if known and name not in known:
            raise EnvNonsense(f"{what} has the unknown name {name!r}; the environment declares {', '.join(sorted(known))}")
    return {name: float(value) for name, value in values.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
