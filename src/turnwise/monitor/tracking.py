"""What trackers such as W&B are told of a run, and what each remembers between two starts of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from turnwise.monitor.samples import Row

FOLDER = "tracking"  # of what trackers keep, in the run's
PLACES = "places"  # file in it: where to look, a line a tracker
ENDING = "ending"  # file in it: how the run ended, as a tracker was told
REMEMBERED = 1_000  # checkpoints, of the highest steps: a file of some 50 kB


@dataclass(frozen=True)
class StepRecord:
    """A line of metrics.jsonl, with the rollouts that are shown beside it."""

    step: int
    time: float  # unix
    metrics: Mapping[str, float]  # finite ones
    samples: Mapping[str, Sequence[Row]] = field(default_factory=dict[str, Sequence[Row]])  # table -> its new rows


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that can be uploaded."""

    step: int
    folder: Path  # checkpoints/step_N
    made: float  # unix time of its meta.json: a step that was repeated has another
    best: bool  # the highest held-out reward of the checkpoints there are
    reward: float | None = None  # held out, the mean over environments; None where the step was not evaluated

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"


@dataclass(frozen=True)
class Ending:
    """How a run ended, as `rl` tells it; the default is what is left to say when `rl` itself was killed."""

    outcome: str = "killed"  # "done" | "failed" | "interrupted" | "aborted" | "killed"
    reason: str = "rl itself was ended"
    code: int = 130  # exit code of `rl`
    summary: Mapping[str, str | float] = field(default_factory=dict[str, str | float])  # verdict, best step, scores

    @classmethod
    def parse(cls, line: str) -> "Ending":
        """From the line of JSON that `rl` writes; the default for an empty or torn one."""
        try:
            return cls(**json.loads(line))
        except (ValueError, TypeError):
            return cls()

    def line(self) -> str:
        return json.dumps(asdict(self)) + "\n"


class Tracker(Protocol):
    """Somewhere outside of the run folder. What it raises leaves it out of the rest of the run."""

    name: str

    def log(self, record: StepRecord) -> None: ...

    def checkpoint(self, checkpoint: Checkpoint) -> None: ...

    def finish(self, ending: Ending, report: Sequence[Path]) -> str:
        """Upload the report and close; returns where to look, for the user."""
        ...


@dataclass
class Memory:
    """What a tracker has taken, in a file of the run folder: a resumed run goes on where it was."""

    path: Path
    rows: int = 0  # of history, of all starts together: numbers of rows only grow
    until: float = 0.0  # time of the newest line that was sent
    checkpoints: dict[str, list[float]] = field(
        default_factory=dict[str, list[float]]
    )  # step -> [made, 1.0 where it was the best]
    earlier: float = 0.0  # `until` as this start found it: within a start lines count in their order

    @classmethod
    def load(cls, path: Path) -> "Memory":
        try:
            known: dict[str, Any] = json.loads(path.read_text())
            until = float(known["until"])
            return cls(path, int(known["rows"]), until, dict(known["checkpoints"]), until)
        except (OSError, ValueError, KeyError, TypeError):
            return cls(path)

    def is_new(self, record: StepRecord) -> bool:
        """Whether an earlier start has not sent this line."""
        return record.time > self.earlier

    def sent(self, record: StepRecord) -> None:
        """Keep that a line was sent. One that was sent just before the process was killed is sent again: twice, but not never."""
        self.until = max(self.until, record.time)
        self.save()

    def next_row(self) -> int:
        """The number after all that were given out. It is kept first: one may be lost with the process, and none comes twice."""
        self.rows += 1
        self.save()
        return self.rows - 1

    def lacks(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is to be sent: it is new, or has become the best."""
        made, best = self.checkpoints.get(str(checkpoint.step), (None, 0.0))
        return made != checkpoint.made or checkpoint.best > best

    def is_newest(self, checkpoint: Checkpoint) -> bool:
        """Whether none of a higher step was sent."""
        return checkpoint.step >= max(map(int, self.checkpoints), default=0)

    def has(self, checkpoint: Checkpoint) -> None:
        """Keep that a checkpoint was sent."""
        self.checkpoints[str(checkpoint.step)] = [checkpoint.made, float(checkpoint.best)]
        for step in sorted(self.checkpoints, key=int)[:-REMEMBERED]:
            del self.checkpoints[step]
        self.save()

    def save(self) -> None:
        """Write it beside its place and rename it there."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".tmp")
        draft.write_text(json.dumps({"rows": self.rows, "until": self.until, "checkpoints": self.checkpoints}))
        draft.rename(self.path)
