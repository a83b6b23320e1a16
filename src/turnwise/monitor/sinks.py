"""Where metrics go: a JSONL file, TensorBoard event files, Weights & Biases."""

import json
import logging
import math
import os
import time
import uuid
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from turnwise.config import RLConfig, WandbConfig

SECRET_WORDS = ("key", "token", "secret", "password")  # in a key of a passthrough table: its value stays on this machine

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes finite numbers under their names."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """`metrics.jsonl`: the record that conditions, resume and the report read. Whole lines only, also after a failure."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._drop_torn_line()
        self._file = path.open("ab", buffering=0)

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Append one line.

        Raises:
            OSError: the file system refused; the file holds the lines before.
        """
        line = json.dumps({"step": step, "time": round(time.time(), 3), **metrics}, allow_nan=False).encode() + b"\n"
        size = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(f"only {written} of {len(line)} bytes were written: is the disk full?")
        except OSError as error:
            os.truncate(self.path, size)
            raise OSError(
                error.errno, f"step {step} could not be recorded ({error.strerror or error})", str(self.path)
            ) from error

    def close(self) -> None:
        self._file.close()

    def _drop_torn_line(self) -> None:
        """A process killed while writing leaves a line without its end; the next line must not be glued to it."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            logger.warning("%s: dropped a line that was cut off after %d characters", self.path, len(content) - whole)
            os.truncate(self.path, whole)


class TensorBoardSink:
    """Event files under `tensorboard/<run name>`, by tensorboard's own writer: torch is not loaded for it."""

    def __init__(self, folder: Path, *, resume_step: int | None) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event: Any = import_module("tensorboard.compat.proto.event_pb2")  # generated code, without types
        self._summary: Any = import_module("tensorboard.compat.proto.summary_pb2").Summary
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventFileWriter(str(folder))
        if resume_step is not None:  # TensorBoard hides what an abandoned lineage wrote at or after this step
            start = self._event.SessionLog(status=self._event.SessionLog.START)
            self._writer.add_event(self._event.Event(wall_time=time.time(), step=resume_step, session_log=start))
            self._writer.flush()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        summary = self._summary(value=[self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()])
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """One W&B run, which a resumed run continues: its id is kept in `wandb_id`.

    Raises:
        ValueError: the package or the API key is missing; the message names the remedy.
    """

    def __init__(self, config: RLConfig, settings: WandbConfig, run_root: Path, *, run_name: str) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "[wandb] is set, but the package is missing: `pip install turnwise[wandb]`, or drop the table"
            ) from error
        self._run: Any = None
        mode = settings.mode
        if mode == "online" and not _has_api_key(wandb):
            raise ValueError(
                'wandb.mode = "online" needs an account: run `wandb login`, set WANDB_API_KEY, or use wandb.mode = "offline"'
            )
        options = _run_options(config, settings, run_root, run_name)
        try:
            self._run = wandb.init(mode=mode, **options)
        except Exception as error:  # whatever the network or the service did: the run goes on, `wandb sync` uploads later
            if mode != "online":
                raise
            logger.warning(
                "W&B cannot be reached (%s); this run is recorded offline under %s/wandb", type(error).__name__, run_root
            )
            self._run = wandb.init(mode="offline", **options)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # W&B's own step must grow; ours goes back at a resume

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


def _run_options(config: RLConfig, settings: WandbConfig, run_root: Path, run_name: str) -> dict[str, Any]:
    import wandb

    run_root.mkdir(parents=True, exist_ok=True)
    return {
        "project": settings.project,
        "entity": settings.entity,
        "group": settings.group,
        "tags": settings.tags or None,
        "name": run_name,
        "id": wandb_id(run_root),
        "resume": "allow",
        "dir": str(run_root),
        "config": without_secrets(config.model_dump(mode="json")),
        "settings": wandb.Settings(console="off", disable_git=True, save_code=False, init_timeout=60),
    }


def wandb_id(run_root: Path) -> str:
    """Id of this run in W&B: made once, then kept in `wandb_id` of the run folder."""
    path = run_root / "wandb_id"
    if path.exists() and (known := path.read_text().strip()):
        return known
    fresh = uuid.uuid4().hex[:12]
    path.write_text(fresh + "\n")
    return fresh


def without_secrets(value: Any) -> Any:
    """The configuration with values under secret-looking string keys replaced by `***`."""
    if isinstance(value, Mapping):
        return {k: "***" if isinstance(v, str) and _is_secret(str(k)) else without_secrets(v) for k, v in value.items()}
    return [without_secrets(item) for item in value] if isinstance(value, list) else value


def _is_secret(key: str) -> bool:
    return any(word in key.lower().replace("-", "_").split("_") for word in SECRET_WORDS)


def _has_api_key(wandb: Any) -> bool:
    return bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)


def finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Only what can be drawn."""
    return {name: float(value) for name, value in metrics.items() if value is not None and math.isfinite(value)}
