"""What a run folder holds, read leniently: a report must come out of a run that was killed half-way too."""

import json
import logging
import math
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from turnwise.monitor import Learning, judge_metrics, read_metrics
from turnwise.transport import RunDir

Metrics = dict[int, dict[str, float]]

logger = logging.getLogger(__name__)


def load_metrics(run_root: Path) -> Metrics:
    """Metrics by step, ascending; a step's lines (training, evaluation) are merged, and null values left out."""
    merged: Metrics = {}
    for line in read_metrics(run_root / "metrics.jsonl"):
        merged.setdefault(line["step"], {}).update(_numbers(line))
    return dict(sorted(merged.items()))


@dataclass(frozen=True)
class Run:
    """One run folder.

    `config` is the raw TOML, so that a run of another version can be read; `evals` maps a step to its evaluation's content.
    """

    root: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=dict)
    evals: dict[int, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, root: Path) -> "Run":
        """Read a run folder; missing files count as empty.

        Raises:
            FileNotFoundError: there is no such folder.
        """
        if not root.is_dir():
            raise FileNotFoundError(f"{root} is not a run folder: there is no such folder")
        metrics, evals = load_metrics(root), dict(_read_evals(RunDir(root).evals))
        for step, content in evals.items():  # an evaluation may be filed moments before its metrics line
            values = _numbers(content.get("metrics", {}))
            metrics[step] = values | metrics.get(step, {})
        return cls(root, _read_config(root), dict(sorted(metrics.items())), evals)

    @property
    def name(self) -> str:
        return str(self.config.get("run_name") or self.root.resolve().name)

    @cached_property
    def train_steps(self) -> list[int]:
        """Steps of which training metrics are known, ascending."""
        return [step for step, values in self.metrics.items() if any(not name.startswith("val-") for name in values)]

    @cached_property
    def eval_steps(self) -> list[int]:
        """Steps at which held-out tasks were evaluated, ascending."""
        return [step for step, values in self.metrics.items() if any(name.startswith("val-") for name in values)]

    @cached_property
    def learning(self) -> Learning:
        """What the run did: the verdict of its metrics."""
        return judge_metrics(self.metrics)

    def names(self, prefix: str = "", suffix: str = "") -> list[str]:
        """Names of metrics that occur anywhere in the run, sorted."""
        every = {name for values in self.metrics.values() for name in values}
        return sorted(name for name in every if name.startswith(prefix) and name.endswith(suffix))

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, ascending."""
        steps = [step for step, values in self.metrics.items() if name in values]
        return steps, [self.metrics[step][name] for step in steps]

    def step_seconds(self) -> tuple[list[int], list[float]]:
        """Steps and their seconds, the first without its wait for a batch: that is the wait for the engines to start."""
        steps, seconds = self.series("timing/step_s")
        waited = self.metrics[steps[0]].get("timing/wait_batch_s", 0.0) if steps else 0.0
        return steps, [max(0.0, value - (0.0 if at else waited)) for at, value in enumerate(seconds)]

    def components(self) -> set[str]:
        """Names of reward components, as training reports them or evaluated rollouts carry them."""
        trained = {name.removeprefix("reward/").removesuffix("/mean") for name in self.names("reward/", "/mean")}
        return trained.union(
            *(rollout.get("components") or {} for content in self.evals.values() for rollout in rollouts_of(content))
        )

    @property
    def trajectories(self) -> Path:
        """Folder of the rollouts; a configured one counts only if it is there (a run folder may have been moved)."""
        configured = self.config.get("trajectories_dir")
        return Path(configured) if configured and Path(configured).is_dir() else self.root / "trajectories"

    def trajectory_steps(self) -> list[int]:
        """Steps whose rollouts are on disk, ascending."""
        return sorted(_steps_of(self.trajectories, ".jsonl"))

    def rollouts(self, step: int) -> list[dict[str, Any]]:
        """Rollouts of a step as written; lines that are not JSON objects are left out with a warning."""
        path, found = self.trajectories / f"step_{step}.jsonl", []
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        for number, line in enumerate(lines, start=1):
            try:
                rollout = json.loads(line)
            except json.JSONDecodeError:
                logger.warning("%s, line %d is not JSON; it is left out of the report", path, number)
                continue
            if isinstance(rollout, dict):
                found.append(rollout)
        return found

    def checkpoints(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        return sorted(_steps_of(RunDir(self.root).checkpoints, ""))


def rollouts_of(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rollouts of an evaluation; empty when it was written without them."""
    return [rollout for rollout in evaluation.get("rollouts") or [] if isinstance(rollout, dict)]


def replies(rollouts: list[dict[str, Any]]) -> list[str]:
    """What the model said in these rollouts, calls and all, one text a turn."""
    return [reply for rollout in rollouts for reply in _said(rollout)]


def _said(rollout: Mapping[str, Any]) -> list[str]:
    messages = [m for m in rollout.get("messages") or [] if m.get("role") == "assistant"]
    turns = rollout.get("turns")  # a list in trajectories, their number in evaluations
    count = turns if isinstance(turns, int) else len(turns or messages)
    own = messages[max(0, len(messages) - count) :]  # those before are worked examples
    return [str(m.get("raw") or m.get("content") or "").strip() for m in own]


@dataclass(frozen=True)
class Variety:
    """How different the replies of some rollouts are."""

    replies: int
    distinct: int
    most_common: str
    most_common_share: float

    @classmethod
    def of(cls, texts: list[str]) -> "Variety | None":
        """None when there is no reply."""
        if not texts:
            return None
        text, count = Counter(texts).most_common(1)[0]
        return cls(len(texts), len(set(texts)), text, count / len(texts))


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    found = {name: value for name, value in values.items() if name not in ("step", "time")}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float) and math.isfinite(value)}


def _read_config(root: Path) -> dict[str, Any]:
    path = RunDir(root).config
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        logger.warning("%s cannot be read (%s); the report goes without it", path, error)
        return {}


def _read_evals(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for step in sorted(_steps_of(folder, ".json")):
        path = folder / f"step_{step}.json"
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            logger.warning("%s cannot be read (%s); the report goes without it", path, error)
            continue
        if isinstance(content, dict):
            yield step, content


def _steps_of(folder: Path, suffix: str) -> Iterator[int]:
    """Steps N of the entries `step_N<suffix>`."""
    for path in folder.glob(f"step_*{suffix}"):
        number = path.name.removeprefix("step_").removesuffix(suffix)
        if number.isdigit():
            yield int(number)
