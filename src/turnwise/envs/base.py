"""`TextEnv`: a gymnasium environment of text, with the helpers that let one read like the rules of its game.

A subclass says three things: which tasks there are (`tasks`), how an episode begins (`begin`), and what one reply does
(`step`). Everything else - drawing a task, composing the reward, counting turns, what is owed when an episode is cut off -
is here.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import gymnasium
from gymnasium import spaces

from turnwise.config import EnvConfig, RewardConfig, RLConfig
from turnwise.envs.rewards import compose

if TYPE_CHECKING:
    from turnwise.containers import Pools

Task = Mapping[str, Any]
Step = tuple[str, float, bool, bool, dict[str, Any]]

MAX_CHARACTERS = 1 << 20  # far beyond any reply; a bound only because gymnasium's text space needs one
SAMPLE_CHARACTERS = 32  # a random action need not be long to be random
SAMPLE_CHARSET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;!?-#<>/\n"


class Outage(Exception):
    """What an environment stands on is down, a container engine for instance: the episode is void, and played again."""


class FreeText(spaces.Text):
    """Any text up to `max_length` characters: `contains` looks at type and length, never at the alphabet."""

    def __init__(self, max_length: int = MAX_CHARACTERS) -> None:
        super().__init__(max_length, min_length=0, charset=SAMPLE_CHARSET)

    def contains(self, x: Any) -> bool:
        return isinstance(x, str) and self.min_length <= len(x) <= self.max_length

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        if mask is None and probability is None:
            mask = (int(self.np_random.integers(min(self.max_length, SAMPLE_CHARACTERS) + 1)), None)
        return super().sample(mask, probability)

    def __repr__(self) -> str:
        return f"FreeText({self.max_length})"


class TextEnv(gymnasium.Env[str, str], ABC):
    """An environment whose observations and actions are text. It knows no tokens and no model.

    `terminated` means that the task ended, `truncated` that a limit cut it off. `info["reward_components"]` holds what this
    step earned, by name; the reward is their sum. `info["metrics"]` holds the metrics of the episode so far, so that those
    of the last step are those of the whole episode.
    """

    metadata: dict[str, Any] = {"render_modes": []}

    system_prompt: str = ""
    """Instructions that stand before the first observation."""

    examples: tuple[Mapping[str, Any], ...] = ()
    """Messages of worked examples, between the instructions and the first observation: a warm start for weak models. As chats
    take them: `role`, `content`, and `tool_calls` or `tool_call_id` and `name`."""

    tools: tuple[Any, ...] = ()
    """Tools that a reply may call; none for plain text."""

    max_turns: int = 1
    """Replies of one episode; the one that reaches it is truncated, unless the rules ended the episode there."""

    uses_containers: ClassVar[bool] = False
    """Whether episodes need task containers, which are then in `containers` before the first reset."""

    containers: "Pools | None" = None

    container_image: str = ""
    """Image of an episode's container, for the plan: what has to be made is said before a run."""

    container_gpus: int = 0
    """GPUs that each episode's container leases, for the plan."""

    component_names: frozenset[str] = frozenset()
    """Names of all reward components; others are then refused, here and in `reward.weights`. Empty: not checked."""

    outcome_components: frozenset[str] = frozenset({"win"})
    """The components that sparse reward pays: what the task was about, none of the help on the way."""

    def __init__(self) -> None:
        self.observation_space = FreeText()
        self.action_space = FreeText()
        self.task: Task = {}
        self.turn = 0  # replies so far in this episode
        self.over = True  # until the first reset

    @abstractmethod
    def tasks(self, split: str) -> Sequence[Task]:
        """The tasks of `split` ("train" and "validation" at least), each with a stable text under "id".

        Raises:
            ValueError: for a split that does not exist.
        """

    @abstractmethod
    def begin(self, task: Task) -> str:
        """Set up an episode of `task` and return the first observation. Randomness comes from `self.np_random`."""

    @abstractmethod
    def step(self, action: str) -> Step:
        """Apply one reply: count it with `self.turn += 1`, then return one of `answer`, `win`, `end`."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Begin the episode of `options["task"]`, or of a training task drawn with `self.np_random`.

        An override may put the whole opening conversation under `info["messages"]`: it is then taken in place of the
        instructions, worked examples and observation.

        Raises:
            ValueError: when there is no task to draw, or the task given lacks what the environment needs.
            TypeError: when `options["task"]` is no mapping.
        """
        super().reset(seed=seed)
        self.task = self._choose_task(options or {})
        self.turn, self.over = 0, False
        observation = self.begin(self.task)
        return observation, {"task_id": str(self.task.get("id", "")), "reward_components": {}, "metrics": {}}

    def finish(self, reason: str) -> dict[str, float]:
        """End an episode that something outside cut off: the context is full, the turns ran out, the run shuts down.

        Args:
            reason: why, for environments that score reasons differently.

        Returns:
            The components still owed, to be added to the last step's; empty when the episode had ended by itself.
        """
        if self.over:
            return {}
        self.over = True
        return self._checked(self.closing_components())

    def closing_components(self) -> dict[str, float]:
        """Components owed to an episode that is cut off before its rules end it. None, unless overridden."""
        return {}

    def episode_metrics(self) -> dict[str, float]:
        """Metrics of the episode so far, leaving out those that say nothing yet. None, unless overridden."""
        return {}

    def plan_hints(self, config: RLConfig, table: EnvConfig) -> Sequence[str]:
        """What is worth saying before a run of `config`, of which `table` is this environment's: sentences with what to do about
        it. None, unless overridden."""
        return ()

    def typed(self, text: str) -> str | None:
        """What a person typed, as an action; None where further lines belong to it. The text itself, unless overridden."""
        return text

    def answer(self, observation: str, *, components: Mapping[str, float] | None = None) -> Step:
        """The episode goes on with `observation`, unless this was reply number `max_turns`: then it is truncated."""
        truncated = self.turn >= self.max_turns
        owed = self.closing_components() if truncated else {}
        return self._step(observation, {**(components or {}), **owed}, terminated=False, truncated=truncated)

    def end(self, observation: str, *, components: Mapping[str, float] | None = None) -> Step:
        """The rules end the episode here, well or badly."""
        return self._step(observation, components or {}, terminated=True, truncated=False)

    def win(self, observation: str, *, components: Mapping[str, float] | None = None) -> Step:
        """The rules end the episode with success: component `win` is 1, unless `components` says how much."""
        return self.end(observation, components={"win": 1.0, **(components or {})})

    def _step(self, observation: str, components: Mapping[str, float], *, terminated: bool, truncated: bool) -> Step:
        if self.over:
            raise RuntimeError(f"{type(self).__name__}.step() after the end of an episode (or before the first); call reset()")
        self.over = terminated or truncated
        earned = self._checked(components)
        reward = compose(earned, DENSE, outcome_components=self.outcome_components)
        info = {"reward_components": earned, "metrics": self.episode_metrics()}
        return observation, reward, terminated, truncated, info

    def _checked(self, components: Mapping[str, float]) -> dict[str, float]:
        for name, value in components.items():
            if not math.isfinite(value):
                raise ValueError(f"{type(self).__name__}: reward component {name!r} is {value}; it must be a finite number")
            if self.component_names and name not in self.component_names:
                known = ", ".join(sorted(self.component_names))
                raise ValueError(f"{type(self).__name__}: reward component {name!r} is not among component_names ({known})")
        return {name: float(value) for name, value in components.items()}

    def _choose_task(self, options: Mapping[str, Any]) -> Task:
        task = options.get("task")
        if task is None:
            rows = self.tasks("train")
            if not len(rows):
                raise ValueError(f"{type(self).__name__} has no training task to draw; give options={{'task': row}}")
            return rows[int(self.np_random.integers(len(rows)))]
        if not isinstance(task, Mapping):
            raise TypeError(f"{type(self).__name__}.reset: options['task'] must be a task row, not {type(task).__name__}")
        return task


DENSE = RewardConfig()
