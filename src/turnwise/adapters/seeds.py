"""Task sets of environments that have no list of tasks: the seeds of their episodes, disjoint between splits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from turnwise.envs.base import Task
from turnwise.envs.suggest import did_you_mean

HELD_OUT = 1 << 30  # where validation seeds begin: below 2 ** 31 with all that follows, which every generator takes as a seed


@dataclass(frozen=True)
class SeededTasks(Sequence[Task]):
    """`size` rows `{"id": "PREFIX/SEED", "seed": SEED}` of successive seeds from `first` on, made when asked for."""

    prefix: str
    first: int
    size: int

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Task: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Task]: ...

    def __getitem__(self, index: int | slice) -> Task | Sequence[Task]:
        seeds = range(self.first, self.first + self.size)
        if isinstance(index, slice):
            return [self._row(seed) for seed in seeds[index]]
        return self._row(seeds[index])

    def _row(self, seed: int) -> Task:
        return {"id": f"{self.prefix}/{seed}", "seed": seed}


def seeded_splits(prefix: str, *, num_train: int, num_validation: int, seed: int) -> dict[str, SeededTasks]:
    """The task rows of "train" and "validation".

    Args:
        prefix: of the ids.
        num_train: training tasks, with the seeds from `seed` on.
        num_validation: held-out tasks, with the seeds from 2 ** 30 + `seed` on.
        seed: the first.

    Raises:
        ValueError: naming the argument, for numbers with which the two ranges would not be disjoint.
    """
    for key, value, least in (("num_train", num_train, 1), ("num_validation", num_validation, 0), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"args.{key} = {value!r} must be a whole number from {least} on")
    for key, value in (("num_train", num_train), ("num_validation", num_validation)):
        if seed + value > HELD_OUT:
            raise ValueError(
                f"args.seed = {seed} and args.{key} = {value} must not add up to more than 2 ** 30; lower one of them"
            )
    return {
        "train": SeededTasks(prefix, seed, num_train),
        "validation": SeededTasks(prefix, HELD_OUT + seed, num_validation),
    }


def rows_of(splits: dict[str, SeededTasks], split: str, *, source: str) -> SeededTasks:
    """The rows of one split.

    Raises:
        ValueError: for a split that does not exist.
    """
    if split not in splits:
        raise ValueError(f"{source} has no split {split!r}.{did_you_mean(split, splits)} Known: {', '.join(splits)}.")
    return splits[split]


def seed_of(task: Task, *, source: str) -> int:
    """The seed of a task row.

    Raises:
        ValueError: when the row has none, or one that is no whole number from 0 on.
    """
    seed = task.get("seed")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"{source} task {dict(task)!r}: 'seed' must be a whole number from 0 on")
    return seed
