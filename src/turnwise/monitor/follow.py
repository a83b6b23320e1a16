"""Reads a run folder as it grows: lines of metrics.jsonl, rollouts to show, checkpoints."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from turnwise.config import RLConfig
from turnwise.monitor.held_out import START, evaluations
from turnwise.monitor.history import numbers
from turnwise.monitor.samples import Row, pick, read_evaluation, read_trajectories, row
from turnwise.monitor.secrets import Redactor
from turnwise.monitor.tracking import Checkpoint, StepRecord

TRAINING, HELD_OUT = "samples/train", "samples/held_out"
SHOWN_INCREMENTS = 100  # additions to a table that W&B draws: the last so many


class Follower:
    """What is new in a run folder, at every call. Holds no more than the lines that came since the last one.

    Args:
        config: resolved.
        samples: rollouts to show of a step and of an evaluation.
        interval: steps between those of training; a hundredth of `max_steps` when None.
    """

    def __init__(self, config: RLConfig, redactor: Redactor, *, samples: int, interval: int | None) -> None:
        self.root, self.redactor, self.samples = config.output_dir, redactor, samples
        self.trajectories = config.trajectories_dir or self.root / "trajectories"
        self.interval = interval or -(-(config.max_steps or 1) // SHOWN_INCREMENTS)
        self._offset = 0  # bytes of metrics.jsonl that were read
        self._seen: tuple[object, ...] = ()  # checkpoints and their evaluations at the last look

    def records(self) -> Iterator[StepRecord]:
        """Whole lines since the last call, oldest first.

        Raises:
            ValueError: a line is no JSON object with a step and a time.
        """
        path = self.root / "metrics.jsonl"
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield self._record(json.loads(line))

    def _record(self, line: dict[str, Any]) -> StepRecord:
        step, metrics = int(line["step"]), numbers(line)
        evaluated = any(name.startswith(START) for name in metrics)
        samples = {HELD_OUT: self._evaluated(step)} if evaluated else {TRAINING: self._trained(step)}
        return StepRecord(step, float(line["time"]), metrics, {table: rows for table, rows in samples.items() if rows})

    def _trained(self, step: int) -> list[Row]:
        due = self.samples and step and (step == 1 or step % self.interval == 0)
        records = read_trajectories(self.trajectories / f"step_{step}.jsonl") if due else []
        return [row(step, record, self.redactor) for record in pick(records, self.samples)]

    def _evaluated(self, step: int) -> list[Row]:
        records = read_evaluation(self.root / "evals" / f"step_{step}.json") if self.samples else []
        return [row(step, record, self.redactor) for record in pick(records, self.samples)]

    def checkpoints(self) -> list[Checkpoint]:
        """Whole checkpoints on the disk, oldest first; none where nothing about them has changed since the last call."""
        made = dict(sorted(self._made()))
        evaluated = {step: path for step in made if (path := self.root / "evals" / f"step_{step}.json").exists()}
        seen = (*made.items(), *evaluated)
        if seen == self._seen:
            return []
        self._seen = seen
        metrics = {step: json.loads(path.read_text(encoding="utf-8"))["metrics"] for step, path in evaluated.items()}
        rewards = {one.step: one.reward for one in evaluations({step: numbers(found) for step, found in metrics.items()})}
        best = max(rewards, key=lambda step: rewards[step], default=None)  # the earlier wins a tie
        folder = self.root / "checkpoints"
        return [Checkpoint(step, folder / f"step_{step}", at, step == best, rewards.get(step)) for step, at in made.items()]

    def _made(self) -> Iterator[tuple[int, float]]:
        """Steps of checkpoints, and when they were made."""
        for meta in (self.root / "checkpoints").glob("step_*/meta.json"):
            number = meta.parent.name.removeprefix("step_")
            if number.isdigit():
                yield int(number), meta.stat().st_mtime

    def report(self) -> list[Path]:
        """report.md and its pictures, as far as they were written."""
        page, folder = self.root / "report.md", self.root / "report"
        return [page, *sorted(folder.glob("*.png")), *sorted(folder.glob("*.json"))] if page.exists() else []
