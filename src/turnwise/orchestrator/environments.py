"""The environments of a run as the orchestrator sees them: settings, tasks, and checked answers of `reset` and `step`."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from turnwise.config import EnvConfig, RewardConfig
from turnwise.envs import TextEnv, make
from turnwise.envs.messages import Tool, ToolCall
from turnwise.envs.rewards import check_weights, compose
from turnwise.orchestrator.overlong import COMPONENT as OVERLONG
from turnwise.orchestrator.types import Message

if TYPE_CHECKING:
    from turnwise.envs.base import Pools


class EnvNonsense(Exception):
    """An environment answered something that its contract does not allow."""


@dataclass(frozen=True)
class EnvSetup:
    """One `[[orchestrator.env]]` table, made usable."""

    name: str  # in metrics: the configured one, or the id without its module; numbered where a run has it twice
    config: EnvConfig
    tasks: Sequence[Mapping[str, Any]]
    system_prompt: str
    examples: tuple[Message, ...]
    max_turns: int
    outcome_components: frozenset[str]
    component_names: frozenset[str]
    uses_containers: bool = False
    tools: tuple[Tool, ...] = ()
    containers: "Pools | None" = None  # for environments that work in some
    wait_s: float = 0.0  # what an episode may wait for a container before it begins
    spare: list[TextEnv] = field(default_factory=list[TextEnv])  # instances between two episodes

    def take(self) -> TextEnv:
        """An instance for one episode."""
        try:
            env = self.spare.pop()
        except IndexError:
            env = make(self.config.id, self.config.args)
        env.containers = self.containers
        return env

    def give_back(self, env: TextEnv) -> bool:
        """Keep an instance for later episodes; False when it holds resources (it defines `close`) and must be closed."""
        if type(env).close is not TextEnv.close:
            return False
        self.spare.append(env)
        return True

    def opening(self, observation: str) -> list[Message]:
        system: list[Message] = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [*system, *self.examples, {"role": "user", "content": observation}]

    def totals(self, components: Mapping[str, float]) -> tuple[float, float, float]:
        """The reward of one step as configured, dense, and sparse."""
        weights = self.config.reward.weights
        dense = compose(components, RewardConfig(weights=weights), outcome_components=self.outcome_components)
        sparse = compose(components, RewardConfig(mode="sparse", weights=weights), outcome_components=self.outcome_components)
        return (dense if self.config.reward.mode == "dense" else sparse), dense, sparse


@dataclass(frozen=True, slots=True)
class StepResult:
    """A checked answer of `TextEnv.step`."""

    messages: list[Message]  # what answers the reply: one of the user, or those of tools
    terminated: bool
    truncated: bool
    components: dict[str, float]
    metrics: dict[str, float]


def load_setups(
    configs: Sequence[EnvConfig], split: str, *, containers: "Pools | None" = None, wait_s: float = 0.0
) -> list[EnvSetup]:
    """Make each environment once and read what is the same for all its episodes.

    Args:
        configs: the tables.
        split: whose tasks.
        containers: for episodes of environments that work in some.
        wait_s: what such an episode may wait for a container, seconds.

    Raises:
        ValueError: an environment cannot be made, has no task in `split`, has a component named `overlong`, or
            `reward.weights` names one that it does not have.
    """
    names = env_names(configs)
    found = [_load(name, config, split) for name, config in zip(names, configs, strict=True)]
    return [replace(setup, containers=containers, wait_s=wait_s) if setup.uses_containers else setup for setup in found]


def _load(name: str, config: EnvConfig, split: str) -> EnvSetup:
    env = make(config.id, config.args)
    tasks = env.tasks(split)
    if not len(tasks):
        raise ValueError(f"environment {config.id} has no task in its split {split!r}; give it some by orchestrator.env.args")
    if OVERLONG in env.component_names:
        raise ValueError(
            f"environment {config.id} has a reward component {OVERLONG!r}, the name under which orchestrator.overlong is "
            "recorded; rename the component"
        )
    check_weights(config.reward, env.component_names, env_id=config.id)
    return EnvSetup(
        name=name,
        config=config,
        tasks=tasks,
        system_prompt=env.system_prompt,
        examples=tuple(dict(message) for message in env.examples),
        max_turns=config.max_turns or env.max_turns,
        outcome_components=frozenset(env.outcome_components),
        component_names=frozenset(env.component_names),
        uses_containers=env.uses_containers,
        tools=_tools(env, config.id),
    )


def _tools(env: TextEnv, env_id: str) -> tuple[Tool, ...]:
    names = [tool.name for tool in env.tools if isinstance(tool, Tool)]
    if len(set(names)) != len(env.tools):
        raise ValueError(f"environment {env_id}: its tools must be turnwise.envs.messages.Tool, each with a name of its own")
    return tuple(env.tools)


def env_names(configs: Sequence[EnvConfig]) -> list[str]:
    """What rollouts and metrics call each environment: the configured name or its id without the module, numbered where twice."""
    names: list[str] = []
    for config in configs:
        base = config.name or config.id.rpartition(":")[2]
        twins = sum(name == base or name.startswith(f"{base}-") for name in names)
        names.append(f"{base}-{twins + 1}" if twins else base)
    return names


def checked_reset(answer: object) -> str:
    """The observation of a `reset`. Raises EnvNonsense."""
    if not (isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], str)):
        raise EnvNonsense(f"reset returned {_short(answer)}, not (text, info)")
    return clean_text(answer[0])


def checked_step(answer: object, component_names: Collection[str], calls: Sequence[ToolCall] | None = None) -> StepResult:
    """The five-tuple of a `step`, with every type and number checked.

    Args:
        calls: what the reply called, where the environment offers tools: `info["messages"]` answers each, in order.

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
    told = info.get("messages") if calls is not None else None
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
