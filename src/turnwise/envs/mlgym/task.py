"""A task for an agent with a shell: files it may see, files only its evaluation sees, and how a submission is scored."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal

from turnwise.containers import Box

Content = bytes | Path
Files = Mapping[str, Content]  # by path relative to the folder they go into; a Path is a file or folder of this machine
Scores = Mapping[str, float]  # by metric
Half = Literal["validation", "test"]  # what `validate` scores, and what counts at the end

RISING = frozenset({"accuracy", "r2", "score", "reward mean", "bleu score", "validation_accuracy"})
FALLING = frozenset({"rmse", "val_loss", "time"})


class Submission(StrEnum):
    """What a task's evaluation takes."""

    CSV = "CSVSubmissionTasks"  # submission.csv
    PYTHON = "PythonSubmissionTasks"  # the edited starter file
    MODEL = "ModelSubmissionTasks"  # the first *.yaml
    LANGUAGE_MODEL = "LMSubmissionTasks"  # whatever lies in the workspace, trained under torchrun

    @property
    def expected(self) -> str:
        """What has to be there, in words."""
        return {"CSV": "submission.csv", "PYTHON": "edited starter file", "MODEL": "*.yaml"}.get(self.name, "file")


@dataclass(frozen=True)
class Verdict:
    """What an evaluation found."""

    scores: Scores | None  # None where the submission has no score
    found: bool = True  # whether there was a submission
    words: str = ""  # why there is no score


@dataclass(frozen=True)
class Task:
    """One task, in the state in which an episode begins.

    `baseline` holds scores to improve on, for each half that has them; `secret` the files that are put beside a submission when
    it is evaluated, and never into the agent's container. `judge` scores a submission that lies in a container of its own from
    outside, in the evaluator's stead.
    """

    id: str
    name: str
    description: str
    submission: Submission
    metric: str
    evaluator: str  # path in the workspace
    workspace: Files
    data: Files
    secret: Mapping[Half, Files]
    baseline: Mapping[Half, Scores] = field(default_factory=dict[Half, Scores])
    baseline_script: str | None = None  # is run where `baseline` has no scores
    time_limit_s: float = 3600.0  # of a command that trains, and of an evaluation
    gpus: int = 0
    judge: Callable[[Box, Half], Verdict] | None = None

    @property
    def rises(self) -> bool:
        """Whether more of the metric is better."""
        return rises(self.metric)

    def score(self, scores: Scores) -> float | None:
        """The metric among what an evaluation reported, whatever its capital letters; None when it is not there or not finite."""
        value = next((float(value) for name, value in scores.items() if name.lower() == self.metric.lower()), None)
        return value if value is not None and math.isfinite(value) else None

    def improvement(self, score: float, half: Half) -> float | None:
        """How much better than the baseline, in units of what is left to gain; None without a baseline.

        (score - baseline) / (1 - baseline) for a metric of at most 1, else the difference over the baseline's magnitude; better
        is positive.
        """
        base = self.score(self.baseline.get(half, {}))
        if base is None:
            return None
        if self.metric.lower() in BOUNDED and base < 1:
            return (score - base) / (1 - base)
        return (score - base if self.rises else base - score) / (abs(base) or 1.0)


BOUNDED = frozenset({"accuracy", "r2", "validation_accuracy"})  # cannot exceed 1


def rises(metric: str) -> bool:
    """Whether more is better. Raises ValueError for a metric that is in neither table."""
    if metric.lower() in RISING:
        return True
    if metric.lower() in FALLING:
        return False
    known = ", ".join(sorted(RISING | FALLING))
    raise ValueError(f"nothing says whether more of the metric {metric!r} is better; known are {known}")


def scores_in(output: str) -> Scores | None:
    """The last line of an evaluator's output that is a JSON object of numbers: warnings may stand around it. None without one."""
    for line in reversed(output.splitlines()):
        if not line.lstrip().startswith("{"):
            continue
        try:
            value = json.loads(line)
        except ValueError:
            continue
        numbers = {str(k): float(v) for k, v in value.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        if numbers:
            return numbers
    return None


def clipped(improvement: float | None) -> float:
    """An improvement as a reward, within -1 and 1; what has no baseline to improve on earns nothing."""
    return 0.0 if improvement is None else max(-1.0, min(1.0, improvement))
