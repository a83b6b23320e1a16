"""MLflow: parameters, metrics and artefacts of a run, through its client alone (`mlflow-skinny` is enough)."""

import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from turnwise.config import MlflowConfig, RLConfig
from turnwise.monitor.secrets import Redactor
from turnwise.monitor.tracking import FOLDER, Checkpoint, Ending, Memory, StepRecord

PARAMETER_LIMIT = 500  # characters that every store takes
PARAMETERS_A_CALL = 100  # MLflow's own limits of one batch
METRICS_A_CALL = 1000
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
"""Instead of 7 times 120 s, in which nothing would reach W&B either. What was set before stays."""


class MlflowTracker:
    """The run in MLflow. Its id is kept in `mlflow_id`, and how far it got in `tracking/mlflow.json`.

    Raises:
        Exception: whatever the package raises when the server cannot be reached.
    """

    name = "MLflow"

    def __init__(self, config: RLConfig, settings: MlflowConfig, redactor: Redactor) -> None:
        self.root, self.settings, self.redactor = config.output_dir, settings, redactor
        for name, value in PATIENCE.items():
            os.environ.setdefault(name, value)
        mlflow: Any = import_module("mlflow")
        self._entities: Any = import_module("mlflow.entities")
        self._client: Any = mlflow.MlflowClient(tracking_uri=settings.tracking_uri)
        self._memory = Memory.load(self.root / FOLDER / "mlflow.json")
        self.run_id = self._run(config.run_name or self.root.resolve().name)
        self._parameters(config)

    def _run(self, run_name: str) -> str:
        """The run that is gone on with, or a fresh one."""
        path = self.root / "mlflow_id"
        if path.exists() and (known := path.read_text().strip()):
            self._client.update_run(known, status="RUNNING")
            return known
        found = self._client.get_experiment_by_name(self.settings.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(self.settings.experiment)
        fresh: str = self._client.create_run(experiment, tags=self.settings.tags, run_name=run_name).info.run_id
        path.write_text(fresh + "\n")
        return fresh

    def _parameters(self, config: RLConfig) -> None:
        """The configuration. A parameter cannot change in MLflow, so a resumed run adds only those that are new."""
        known = self._client.get_run(self.run_id).data.params
        tables = self.redactor.tables(config.model_dump(mode="json"))
        fresh = [self._entities.Param(key, value[:PARAMETER_LIMIT]) for key, value in flat(tables) if key not in known]
        for start in range(0, len(fresh), PARAMETERS_A_CALL):
            self._client.log_batch(self.run_id, params=fresh[start : start + PARAMETERS_A_CALL])

    def log(self, record: StepRecord) -> None:
        """Record the metrics of a line. Its rollouts are W&B's alone: MLflow has no tables that grow."""
        if not self._memory.is_new(record):
            return
        at = round(record.time * 1000)
        metrics = [self._entities.Metric(name, value, at, record.step) for name, value in record.metrics.items()]
        for start in range(0, len(metrics), METRICS_A_CALL):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + METRICS_A_CALL])
        self._memory.sent(record)

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Upload what `mlflow.artifacts` says of it, and name the newest and the best in tags."""
        whole = self.settings.artifacts == "checkpoints"
        folder = checkpoint.folder if whole else checkpoint.adapter
        if self.settings.artifacts == "none" or not folder.is_dir() or not self._memory.lacks(checkpoint):
            return
        place = f"{'checkpoint' if whole else 'adapter'}/step_{checkpoint.step}"
        self._client.log_artifacts(self.run_id, str(folder), place)
        if self._memory.is_newest(checkpoint):
            self._client.set_tag(self.run_id, "latest", place)
        if checkpoint.best:
            self._client.set_tag(self.run_id, "best", place)
        self._memory.has(checkpoint)

    def finish(self, ending: Ending, report: Sequence[Path]) -> str:
        """Upload the report, and say in tags how the run ended."""
        for path in report:
            folder = path.parent.relative_to(self.root).as_posix()
            place = "report" if folder == "." else f"report/{folder}"
            if path.suffix == ".png":
                self._client.log_artifact(self.run_id, str(path), place)
            else:
                self._client.log_text(self.run_id, self.redactor.text(path.read_text(encoding="utf-8")), f"{place}/{path.name}")
        for key, value in {"outcome": ending.outcome, "outcome_reason": ending.reason, **ending.summary}.items():
            self._client.set_tag(self.run_id, key, self.redactor.text(str(value)))
        status = {"done": "FINISHED", "interrupted": "KILLED", "killed": "KILLED"}.get(ending.outcome, "FAILED")
        self._client.set_terminated(self.run_id, status=status)
        return f"run {self.run_id} of experiment {self.settings.experiment}"


def flat(value: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and texts of all values of a table that are set."""
    if isinstance(value, Mapping):
        for key, item in cast(Mapping[str, object], value).items():
            yield from flat(item, f"{prefix}.{key}" if prefix else key)
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in cast(list[object], value)):
        for index, item in enumerate(cast(list[object], value)):
            yield from flat(item, f"{prefix}.{index}")
    elif value is not None:
        yield prefix, str(value)


def missing_for_mlflow(settings: MlflowConfig) -> str | None:
    """What keeps a run from being tracked as configured, with its remedy; None where nothing does."""
    if find_spec("mlflow") is None:
        return "[mlflow] is set, but the package is missing: `pip install turnwise[mlflow]`, or drop the table (--no-mlflow)."
    if settings.tracking_uri is None and not os.environ.get("MLFLOW_TRACKING_URI"):
        return "mlflow.tracking_uri is not set; set it, or MLFLOW_TRACKING_URI, to a server as http://host:port."
    return None
