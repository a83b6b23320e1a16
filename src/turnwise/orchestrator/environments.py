"""The environments of a run as the orchestrator sees them: settings and tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from turnwise.config import EnvConfig
from turnwise.envs import TextEnv, make
from turnwise.envs.messages import Tool
from turnwise.envs.rewards import check_weights, totals
from turnwise.envs.spare import SpareEnvs
from turnwise.orchestrator.overlong import COMPONENT as OVERLONG
from turnwise.orchestrator.types import Message

if TYPE_CHECKING:
    from turnwise.envs.base import Pools


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
    spare: SpareEnvs = field(default_factory=SpareEnvs)

    def take(self) -> TextEnv:
        """An instance for one episode."""
        env = self.spare.take(self.config.id, self.config.args)
        env.containers = self.containers
        return env

    def give_back(self, env: TextEnv) -> bool:
        """Keep an instance for later episodes; False when it holds resources (it defines `close`) and must be closed."""
        return self.spare.keep(env)

    def opening(self, observation: str) -> list[Message]:
        system: list[Message] = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return [*system, *self.examples, {"role": "user", "content": observation}]

    def totals(self, components: Mapping[str, float]) -> tuple[float, float, float]:
        """The reward of one step as configured, dense, and sparse."""
        return totals(components, self.config.reward, outcome_components=self.outcome_components)


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
