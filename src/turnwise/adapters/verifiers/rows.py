"""Task rows that name a place in a table of somebody else's, and a part of them held out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from turnwise.envs.base import Task

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Rows(Sequence[Task]):
    """Rows `{"id": "TABLE/POSITION"}`, made when asked for."""

    table: str
    positions: range

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, index: int) -> Task: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Task]: ...

    def __getitem__(self, index: int | slice) -> Task | Sequence[Task]:
        if isinstance(index, slice):
            return Rows(self.table, self.positions[index])
        return {"id": f"{self.table}/{self.positions[index]}"}


def place(task: Task, *, name: str) -> tuple[str, int]:
    """The table and the position that a row names.

    Raises:
        ValueError: when it is none of `Rows`.
    """
    table, _, position = str(task.get("id", "")).partition("/")
    if table not in SPLITS or not position.isdecimal():
        raise ValueError(f"{name}: task {dict(task)!r} is none of its rows, whose ids are train/0 or validation/0")
    return table, int(position)


def held_out(size: int, validation: object, *, name: str) -> dict[str, range]:
    """Positions of the splits of one table, the last `validation` of them held out.

    Raises:
        ValueError: when that leaves nothing to train on, or is no count.
    """
    if validation is None:
        return {"train": range(size)}
    if isinstance(validation, bool) or not isinstance(validation, int) or not 0 < validation < size:
        raise ValueError(
            f"args.adapter.validation = {validation!r} of {name} must be a count that leaves some of its {size} training tasks"
        )
    return {"train": range(size - validation), "validation": range(size - validation, size)}


def no_split(name: str, split: str, why: str) -> ValueError:
    """The error for a split that there is not."""
    if split not in SPLITS:
        return ValueError(f"{name} has the splits train and validation, not {split!r}")
    return ValueError(f"{name} has no {split} tasks: {why}")
