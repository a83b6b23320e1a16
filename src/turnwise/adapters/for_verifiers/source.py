"""One of our environments as rollouts of theirs need it: what is the same for all episodes, tasks, instances, the reward."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from threading import Lock
from typing import Any

from turnwise.config import RewardConfig, RLConfig
from turnwise.envs import Task, TextEnv, make
from turnwise.envs.containers import containers_of
from turnwise.envs.messages import Tool
from turnwise.envs.rewards import check_weights, totals
from turnwise.envs.spare import SpareEnvs


class Source:
    """An environment by its id, for any number of episodes at a time.

    Args:
        env_id: a registered name, `package.module:Class`, or `SCHEME:NAME`.
        args: keyword arguments of the environment.
        reward: which components pay, and how much.
        seed: of all episodes; each derives its own from it, its split and the id of its task.
        max_turns: replies of one episode; the environment's own limit when not given.
        timeout_s: time limit of one call of the environment.
        containers: the table `[containers]` of a configuration, for environments that work in some.

    Raises:
        ValueError: the environment cannot be made, or `reward.weights` names a component that it does not have.
    """

    def __init__(
        self,
        env_id: str,
        args: Mapping[str, Any],
        *,
        reward: RewardConfig,
        seed: int = 0,
        max_turns: int | None = None,
        timeout_s: float = 60.0,
        containers: Mapping[str, Any] | None = None,
    ) -> None:
        if max_turns is not None and max_turns < 1:
            raise ValueError(f"max_turns = {max_turns} must be at least 1; leave it out for the environment's own limit")
        self.env_id, self.args, self.reward, self.seed = env_id, dict(args), reward, seed
        self.timeout_s, self.container_table = timeout_s, dict(containers or {})
        self._model = env = make(env_id, self.args)  # read from, never played
        check_weights(reward, env.component_names, env_id=env_id)
        self.system_prompt = env.system_prompt
        self.examples = tuple(dict(message) for message in env.examples)
        self.tools: tuple[Tool, ...] = tuple(env.tools)
        self.max_turns = max_turns or env.max_turns
        self.component_names = frozenset(env.component_names)
        self.outcome_components = frozenset(env.outcome_components)
        self.uses_containers = env.uses_containers
        self._tasks: dict[str, Sequence[Task]] = {}
        self._spare = SpareEnvs()
        self._stack, self._pools = ExitStack(), None
        self._opening = Lock()  # two episodes that begin at once open containers once

    def tasks(self, split: str) -> Sequence[Task]:
        """The tasks of `split`.

        Raises:
            ValueError: there is no such split, or no task in it.
        """
        if split not in self._tasks:
            rows = self._model.tasks(split)
            if not len(rows):
                raise ValueError(f"environment {self.env_id} has no task in its split {split!r}; give it some by its arguments")
            self._tasks[split] = rows
        return self._tasks[split]

    def task(self, split: str, index: int, task_id: str) -> Task:
        """The task that a row of a data set stands for.

        Raises:
            ValueError: another task stands there by now.
        """
        rows = self.tasks(split)
        found = str(rows[index].get("id", "")) if index < len(rows) else None
        if found != task_id:
            raise ValueError(
                f"task {index} of {self.env_id}/{split} is {found!r}, but the row was made for {task_id!r}; "
                "load the environment with the arguments that the data set was made with"
            )
        return rows[index]

    def seed_of(self, split: str, task_id: str) -> int:
        """The seed of an episode, in [0, 2^31): the same for all episodes of a task, so that a group begins alike."""
        text = repr((self.seed, split, task_id)).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") % 2**31

    def weights(self) -> dict[str, float]:
        """What each declared component is multiplied by; 0 where it does not pay in this reward mode."""
        sparse = self.reward.mode == "sparse"
        pays = {name: not sparse or name in self.outcome_components for name in sorted(self.component_names)}
        return {name: self.reward.weights.get(name, 1.0) * pays[name] for name in pays}

    def totals(self, components: Mapping[str, float]) -> tuple[float, float, float]:
        """The reward of some components as configured, dense, and sparse."""
        return totals(components, self.reward, outcome_components=self.outcome_components)

    def take(self) -> TextEnv:
        """An instance that nobody else plays. Blocks, when containers have to be found first."""
        env = self._spare.take(self.env_id, self.args)
        if self.uses_containers:
            env.containers = self._containers()
        return env

    def give_back(self, env: TextEnv) -> bool:
        """Keep an instance for later episodes; False when it holds resources (it defines `close`) and must be closed."""
        return self._spare.keep(env)

    @property
    def reset_timeout_s(self) -> float:
        """Time limit of a reset: with what it may wait for a container."""
        return self.timeout_s + (self._config.containers.wait_s if self.uses_containers else 0.0)

    def close(self) -> None:
        """Part from containers. Later episodes would open them again."""
        self._stack.close()
        self._pools = None

    def _containers(self) -> Any:
        with self._opening:
            if self._pools is None:
                self._pools = self._stack.enter_context(containers_of(self._config))
            return self._pools

    @cached_property
    def _config(self) -> RLConfig:
        envs = [{"id": self.env_id, "args": self.args}]
        tables = {"model": {"name": "none"}, "max_steps": 1, "orchestrator": {"env": envs}, "containers": self.container_table}
        return RLConfig.model_validate(tables)
