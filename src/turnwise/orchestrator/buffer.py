"""The stream of tasks: group g -> environment, task, seed. The same for the same run seed, however the run was interrupted."""

import math
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np

from turnwise.config import BufferConfig
from turnwise.envs.suggest import did_you_mean
from turnwise.orchestrator.environments import EnvSetup
from turnwise.orchestrator.rollout import derive_seed

UNSEEN_SPREAD = 1.0  # a task nobody has played yet is as interesting as the most uncertain one
FLOOR = 0.05  # chance share of a task at floor or ceiling, so that it is looked at again as the policy changes
SMOOTHING = 0.3  # weight of the newest group in a task's running mean


@dataclass(frozen=True)
class GroupTask:
    """What a group plays."""

    env: EnvSetup
    index: int  # of the task in the environment's training split
    task: Mapping[str, Any]
    env_seed: int


@dataclass
class TaskStats:
    """What is known of one task."""

    mean: float = 0.0  # running mean of the group means of the reward
    spread: float = UNSEEN_SPREAD  # running mean of the group std
    count: int = 0  # groups seen
    last: float = 0.0  # mean reward of the newest group

    def update(self, rewards: Sequence[float]) -> None:
        mean, std = float(np.mean(rewards)), float(np.std(rewards))
        weight = SMOOTHING if self.count else 1.0
        self.mean += weight * (mean - self.mean)
        self.spread += weight * (std - self.spread)
        self.count += 1
        self.last = mean


@dataclass
class TaskBuffer:
    """Draws tasks for groups and remembers how they went.

    `epochs` is a pure function of the run seed and the group number. `difficulty` also depends on the statistics, which
    change only when a batch is written; what it drew for groups still in progress is kept with the progress of the run.
    """

    envs: Sequence[EnvSetup]
    config: BufferConfig
    seed: int
    stats: dict[str, TaskStats] = field(default_factory=dict)  # "env/task id" -> statistics
    drawn: dict[int, int] = field(default_factory=dict)  # group -> task index, for groups not yet in a batch

    def __post_init__(self) -> None:
        total = sum(env.config.weight for env in self.envs)
        self._edges = list(accumulate(env.config.weight / total for env in self.envs))
        self._keys: dict[int, list[str]] = {}  # by environment, made when difficulty asks
        self._orders: dict[tuple[int, int], Sequence[int]] = {}
        self._counts: list[int] = []  # [group]: groups of the same environment before it
        self._seen = [0] * len(self.envs)

    def draw(self, group: int) -> GroupTask:
        """What group number `group` plays."""
        which, turn = self._place(group)
        env = self.envs[which]
        if self.config.kind == "difficulty":
            index = self.drawn.get(group)
            index = self._by_difficulty(which, group) if index is None else index
            self.drawn[group] = index
        else:
            epoch, position = divmod(turn, len(env.tasks))
            index = self._order(which, epoch)[position]
        return GroupTask(env, index, env.tasks[index], derive_seed(self.seed, "env", group) % 2**31)

    def observe(self, group: int, task: GroupTask, rewards: Sequence[float]) -> None:
        """Take in the rewards of a finished group's valid rollouts."""
        self.drawn.pop(group, None)
        if rewards:
            self.stats.setdefault(_key(task.env, task.index), TaskStats()).update(rewards)

    def state(self) -> dict[str, Any]:
        """What a resume needs, as plain values."""
        stats = {key: [s.mean, s.spread, s.count, s.last] for key, s in self.stats.items()}
        return {"stats": stats, "drawn": {str(group): index for group, index in self.drawn.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.stats = {key: TaskStats(*values) for key, values in state.get("stats", {}).items()}
        self.drawn = {int(group): index for group, index in state.get("drawn", {}).items()}

    def _place(self, group: int) -> tuple[int, int]:
        """Environment of a group, and how many groups that environment had before it.

        Low-discrepancy rather than drawn: group g falls into the interval of weights that holds frac(g * golden ratio), so
        that every stretch of the stream has close to the configured mixture.
        """
        if len(self.envs) == 1:
            return 0, group
        which = self._which(group)
        while len(self._counts) <= group:
            g = len(self._counts)
            self._counts.append(self._seen[self._which(g)])
            self._seen[self._which(g)] += 1
        return which, self._counts[group]

    def _which(self, group: int) -> int:
        return min(bisect_right(self._edges, math.fmod(group * 0.6180339887498949, 1.0)), len(self.envs) - 1)

    def _order(self, which: int, epoch: int) -> Sequence[int]:
        key = (which, epoch)
        if key not in self._orders:
            if len(self._orders) > 4 * len(self.envs):
                self._orders.clear()
            stream = np.random.default_rng(derive_seed(self.seed, "order", which, epoch))
            self._orders[key] = [int(i) for i in stream.permutation(len(self.envs[which].tasks))]
        return self._orders[key]

    def _by_difficulty(self, which: int, group: int) -> int:
        """A task drawn in proportion to the spread of its rewards, with a floor."""
        if which not in self._keys:
            self._keys[which] = [_key(self.envs[which], index) for index in range(len(self.envs[which].tasks))]
        spreads = [self.stats[key].spread if key in self.stats else UNSEEN_SPREAD for key in self._keys[which]]
        weights = np.maximum(np.asarray(spreads), FLOOR)
        stream = np.random.default_rng(derive_seed(self.seed, "difficulty", group))
        return int(stream.choice(len(weights), p=weights / weights.sum()))


def only_tasks(envs: Sequence[EnvSetup], ids: Sequence[str]) -> list[EnvSetup]:
    """The environments with the tasks that `orchestrator.buffer.tasks` names alone; as they are where it names none.

    Raises:
        ValueError: an id is unknown; all of those, with the nearest that is there.
    """
    if not ids:
        return list(envs)
    wanted, known, kept = set(ids), set[str](), list[EnvSetup]()
    for env in envs:
        rows = [(env.tasks[index], _names(env, index)) for index in range(len(env.tasks))]
        known.update(*(names for _, names in rows))
        if named := [task for task, names in rows if wanted & names]:
            kept.append(replace(env, tasks=named))
    if unknown := sorted(wanted - known):
        raise ValueError("\n".join(_unknown_task(name, known) for name in unknown))
    return kept


def _unknown_task(name: str, known: Collection[str]) -> str:
    last_parts = {one.rpartition("/")[2]: one for one in sorted(known, key=len, reverse=True)}
    meant = f" Did you mean {last_parts[name]!r}?" if name in last_parts else did_you_mean(name, known)
    suggestion = meant or f" One that is there is {min(known)!r}."
    return f"orchestrator.buffer.tasks names {name!r}, and no training environment has such a task.{suggestion}"


def _names(env: EnvSetup, index: int) -> set[str]:
    """By which a task may be called in `orchestrator.buffer.tasks`."""
    return {_key(env, index), str(env.tasks[index].get("id", index))}


def _key(env: EnvSetup, index: int) -> str:
    return f"{env.name}/{env.tasks[index].get('id', index)}"
