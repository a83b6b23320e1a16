"""One gymnasium environment as one of ours."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium

from turnwise.adapters.answers import finite_number
from turnwise.adapters.gymnasium_env.actions import read_action_space
from turnwise.adapters.gymnasium_env.observations import Describer
from turnwise.adapters.seeds import rows_of, seed_of, seeded_splits
from turnwise.envs.base import Step, Task, TextEnv
from turnwise.envs.suggest import did_you_mean

MAX_TURNS = 100  # where neither the user nor the environment's registration sets a limit
SAY_ONE = "Reply with one of these actions and nothing else: {actions}."


class GymnasiumEnv(TextEnv):
    """An environment of `gymnasium.make`: `gymnasium:FrozenLake-v1`."""

    component_names = frozenset({"reward", "unreadable"})
    outcome_components = frozenset({"reward"})

    def __init__(
        self,
        *,
        source: str,
        env_args: Mapping[str, Any] | None = None,
        actions: Sequence[str] | None = None,
        observation: str | None = None,
        observation_names: Sequence[str] | None = None,
        instructions: str | None = None,
        unreadable_penalty: float = 0.0,
        max_turns: int | None = None,
        num_train: int = 1024,
        num_validation: int = 128,
        seed: int = 0,
        **others: Any,
    ) -> None:
        """Make the environment; no episode begins before `reset`.

        Args:
            source: what `gymnasium.make` takes: `CartPole-v1`, `package:Game-v0`.
            env_args: keyword arguments of the environment.
            actions: names of discrete actions, in the order of their numbers; the numbers when not given.
            observation: template of an observation, see `Describer`.
            observation_names: of the values of a discrete observation, or of the parts of one that has several.
            instructions: stand before the first observation, with the names of the actions in place of `{actions}`; when not
                given, the sentence that asks for one of them, or what an environment of text says under `system_prompt`.
            unreadable_penalty: subtracted as component `unreadable` for a reply that names no action; 0 leaves it out.
            max_turns: replies of an episode; the limit of the environment's registration when not given, else 100.
            num_train: training tasks; each is the seed of an episode.
            num_validation: held-out tasks.
            seed: the first of the seeds.
            others: `import`, a package whose import registers the environment.

        Raises:
            ValueError: for an environment that cannot be made, spaces that text cannot say, or arguments that do not fit.
        """
        super().__init__()
        _import(others)
        self.source = source
        self.splits = seeded_splits(f"gymnasium/{source}", num_train=num_train, num_validation=num_validation, seed=seed)
        self.env = _make(source, env_args or {})
        self.actions = read_action_space(self.env.action_space, actions, source=source)
        self.describe = Describer(self.env.observation_space, template=observation, names=observation_names, source=source)
        limit = None if self.env.spec is None else self.env.spec.max_episode_steps
        self.max_turns = (limit or MAX_TURNS) if max_turns is None else max_turns
        if self.max_turns < 1:
            raise ValueError(f"args.max_turns = {max_turns} must be at least 1")
        if not unreadable_penalty >= 0:
            raise ValueError(f"args.unreadable_penalty = {unreadable_penalty} must be at least 0; it is subtracted")
        self.unreadable_penalty = unreadable_penalty
        self.unreadable = 0
        self.system_prompt = self._instructions(instructions)

    def tasks(self, split: str) -> Sequence[Task]:
        """Seeds of episodes: rows of "id" and "seed".

        Raises:
            ValueError: for an unknown split.
        """
        return rows_of(self.splits, split, source=f"gymnasium:{self.source}")

    def begin(self, task: Task) -> str:
        self.unreadable = 0
        answer = self.env.reset(seed=seed_of(task, source=f"gymnasium:{self.source}"))
        if not (isinstance(answer, tuple) and len(answer) == 2):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"reset of gymnasium:{self.source} returned {str(answer)[:80]!r}, not (observation, info)")
        return self.describe(answer[0])

    def step(self, action: str) -> Step:
        self.turn += 1
        choice = action if self.actions is None else self.actions.read(action)
        if choice is None and self.actions is not None:
            return self._unreadable(self.actions.listing)
        observation, reward, terminated, truncated, _ = self.env.step(choice)
        earned = finite_number(reward, what=f"the reward of gymnasium:{self.source}")
        cut = bool(truncated) or (self.turn >= self.max_turns and not terminated)
        return self._step(self.describe(observation), {"reward": earned}, terminated=bool(terminated), truncated=cut)

    def episode_metrics(self) -> dict[str, float]:
        """The share of replies that named no action, where actions have names."""
        return {"unreadable_rate": self.unreadable / self.turn} if self.actions is not None and self.turn else {}

    def close(self) -> None:
        self.env.close()
        super().close()

    def _unreadable(self, listing: str) -> Step:
        self.unreadable += 1
        components = {"unreadable": -self.unreadable_penalty} if self.unreadable_penalty else {}
        return self.answer(f"No action was read. {SAY_ONE.replace('{actions}', listing)}", components=components)

    def _instructions(self, instructions: str | None) -> str:
        if self.actions is not None:
            return (SAY_ONE if instructions is None else instructions).replace("{actions}", self.actions.listing)
        if instructions is not None:
            return instructions
        own = getattr(self.env.unwrapped, "system_prompt", "")
        return own if isinstance(own, str) else ""


def _import(others: Mapping[str, Any]) -> None:
    """Import what `args.import` names; a keyword of Python, so that no parameter can have that name."""
    for name in others:
        if name != "import":
            known = [*GymnasiumEnv.__init__.__annotations__, "import"]
            listing = ", ".join(key for key in known if key not in ("source", "others", "return"))
            hint = did_you_mean(name, known)
            raise ValueError(f"args.{name} is not an argument of gymnasium environments.{hint} They take {listing}.")
    package = others.get("import")
    if package is None:
        return
    try:
        importlib.import_module(package)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"args.import = {package!r} cannot be imported: {error}; install the package that has it") from error


def _make(source: str, env_args: Mapping[str, Any]) -> gymnasium.Env[Any, Any]:
    try:
        return gymnasium.make(source, disable_env_checker=True, **env_args)
    except (gymnasium.error.Error, ImportError, TypeError, ValueError) as error:
        raise ValueError(
            f"gymnasium.make({source!r}) failed with args.env_args = {dict(env_args)}: {error} (an environment of another "
            "package is registered by its import: args.import, or an id like 'package:Game-v0')"
        ) from error
