"""What a run tells about itself: metrics.jsonl and status.json, read again and again while they grow."""

import itertools
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turnwise.monitor import Learning, LearningWatch, console_line
from turnwise.transport import RunDir

RECENT_STEPS = 10  # steps whose median duration makes the estimate of the end
REWARD = "critic/reward/mean"


@dataclass
class Progress:
    """The state of a run as far as it is known from its files."""

    max_steps: int
    metrics: dict[str, float] = field(default_factory=dict)  # newest value of each
    rewards: dict[int, float] = field(default_factory=dict)
    evals: dict[int, dict[str, float]] = field(default_factory=dict)  # val-core/.../{mean,stderr} by step
    times: dict[int, float] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    facts: LearningWatch = field(default_factory=LearningWatch)

    @property
    def learning(self) -> Learning:
        """What the run does, by the metrics that were read."""
        return self.facts.verdict

    @property
    def step(self) -> int:
        return max(self.rewards, default=0)

    def remaining_s(self) -> float | None:
        """Estimated seconds until the last step; None before two steps were seen."""
        recent = sorted(self.times)[-RECENT_STEPS - 1 :]
        gaps = [(self.times[b] - self.times[a]) / (b - a) for a, b in itertools.pairwise(recent)]
        return statistics.median(gaps) * max(0, self.max_steps - self.step) if gaps else None


class Watch:
    """Reads what was added since the last look."""

    def __init__(self, run_dir: RunDir, max_steps: int) -> None:
        self.run_dir = run_dir
        self.progress = Progress(max_steps)
        self._offset = 0

    def look(self) -> list[str]:
        """Take in what is new; returns a line for each new record of metrics.jsonl."""
        self.progress.status = _read_json(self.run_dir.status) or self.progress.status
        return [
            console_line(step, metrics, max_steps=self.progress.max_steps)
            for step, metrics in map(self._take, self._new_records())
        ]

    def _new_records(self) -> list[dict[str, Any]]:
        """Whole lines only: one that is being written is read at the next look."""
        path = self.run_dir.metrics
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [json.loads(line) for line in whole.splitlines()]

    def _take(self, record: dict[str, Any]) -> tuple[int, dict[str, float]]:
        step = int(record["step"])
        metrics = {name: float(value) for name, value in record.items() if name not in ("step", "time") and _is_number(value)}
        self.progress.metrics.update(metrics)
        self.progress.facts.record(step, metrics)
        if REWARD in metrics:
            self.progress.rewards[step] = metrics[REWARD]
            self.progress.times[step] = float(record.get("time", 0.0))
        scores = {name: value for name, value in metrics.items() if name.startswith("val-core/")}
        if scores:
            self.progress.evals.setdefault(step, {}).update(scores)
        return step, metrics


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
