"""Means with standard errors: of rollouts that share tasks, and of runs that share all but their seed."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


def over_tasks(values: Iterable[tuple[str, float]]) -> tuple[float, float | None]:
    """Mean over rollouts, and its standard error from the task means: rollouts of one task are not independent.

    Args:
        values: (task, value) of each rollout; at least one.

    Returns:
        The mean, and the error; None where all rollouts are of one task.
    """
    by_task: defaultdict[str, list[float]] = defaultdict(list)
    for task, value in values:
        by_task[task].append(value)
    means = [fmean(of_task) for of_task in by_task.values()]
    error = stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
    return fmean(value for of_task in by_task.values() for value in of_task), error


@dataclass(frozen=True)
class OverSeeds:
    """A number over runs that differ by their seed alone."""

    values: tuple[float, ...]  # one a run
    seed_stderr: float | None  # of the mean, between seeds; None with fewer than two
    task_stderr: float | None  # of one run's value, over the evaluated tasks

    @classmethod
    def of(cls, values: Sequence[float], errors: Sequence[float | None]) -> "OverSeeds":
        """From the runs' values and their standard errors over tasks, where those are known."""
        known = [error for error in errors if error is not None]
        return cls(
            values=tuple(values),
            seed_stderr=stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None,
            task_stderr=math.sqrt(fmean(error**2 for error in known)) if known else None,
        )

    @property
    def mean(self) -> float | None:
        return fmean(self.values) if self.values else None

    @property
    def stderr(self) -> float | None:
        """Of the mean: between seeds where there are several, else over the tasks of the one run.

        Two or three seeds lie close together by luck often enough, so that their spread is not believed below what independent
        runs would have from the tasks alone.
        """
        if self.seed_stderr is None:
            return self.task_stderr
        return max(self.seed_stderr, (self.task_stderr or 0.0) / math.sqrt(len(self.values)))
