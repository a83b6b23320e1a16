"""Weights & Biases: one run, which a resumed run continues, in W&B's own words."""

import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from turnwise.config import RLConfig, WandbConfig
from turnwise.monitor.follow import SHOWN_INCREMENTS
from turnwise.monitor.samples import COLUMNS, Row
from turnwise.monitor.secrets import Redactor
from turnwise.monitor.tracking import FOLDER, Checkpoint, Ending, Memory, StepRecord

INIT_TIMEOUT_S = 60.0  # until a run that cannot reach the service is recorded offline
TEXT = (".md", ".json")  # of the report: redacted on the way

logger = logging.getLogger(__name__)


class WandbTracker:
    """The run in W&B. Its id is kept in `wandb_id`, and how far it got in `tracking/wandb.json`.

    W&B's own row numbers must grow, or it drops rows: they are counted over all starts of the run. The axis of every curve
    is `step`, which a resumed run may repeat: both values stay.

    Raises:
        Exception: whatever the package raises when it can record neither online nor offline.
    """

    name = "W&B"

    def __init__(self, config: RLConfig, settings: WandbConfig, redactor: Redactor) -> None:
        self.root, self.settings, self.redactor = config.output_dir, settings, redactor
        # files of artefacts wait here for their upload, and not in the home folder
        os.environ.setdefault("WANDB_DATA_DIR", str(self.root / "wandb" / "data"))
        self._wandb: Any = import_module("wandb")
        self._memory = Memory.load(self.root / FOLDER / "wandb.json")
        self.run: Any = self._init(_options(config, settings, redactor, self._wandb))
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        self._tables: dict[str, tuple[Any, int]] = {}  # name -> the table and how often it was added to
        self._step = 0

    def _init(self, options: Mapping[str, Any]) -> Any:
        self._online = self.settings.mode == "online"
        if self._online:
            try:
                return self._wandb.init(mode="online", **options)
            except Exception as error:  # whatever the network, the account or the service did
                logger.warning(
                    "W&B cannot be reached (%s: %s); this run is recorded offline under %s",
                    type(error).__name__,
                    self.redactor.text(str(error)),
                    self.root / "wandb",
                )
        self._online = False
        return self._wandb.init(mode="offline", **options)

    def log(self, record: StepRecord) -> None:
        """Add a row: its metrics, and the tables that grow with it."""
        if not self._memory.is_new(record):
            return
        self._step = record.step
        tables = {name: self._grown(name, rows) for name, rows in record.samples.items()}
        self._add({"_timestamp": record.time, "step": record.step, **record.metrics, **tables})
        self._memory.sent(record)
        for table in tables.values():
            table.data[:] = [()] * len(table.data)  # they are sent: their number must stay, their text need not

    def _add(self, values: Mapping[str, Any]) -> None:
        self.run.log(dict(values), step=self._memory.next_row(), commit=True)

    def _grown(self, name: str, rows: Sequence[Row]) -> Any:
        """The table with new rows. After as many additions as W&B shows, a new one takes over, since each addition names all
        of those before it."""
        table, additions = self._tables.get(name, (None, SHOWN_INCREMENTS))
        if additions >= SHOWN_INCREMENTS:
            table, additions = self._wandb.Table(columns=list(COLUMNS), log_mode="INCREMENTAL"), 0
        for row in rows:
            table.add_data(*row)
        self._tables[name] = (table, additions + 1)
        return table

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        """Upload what `wandb.artifacts` says of it: a version with the aliases `latest`, `step-N`, and `best` where it is."""
        whole = self.settings.artifacts == "checkpoints"
        folder = checkpoint.folder if whole else checkpoint.adapter
        if self.settings.artifacts == "none" or not folder.is_dir() or not self._memory.lacks(checkpoint):
            return
        kind = "checkpoint" if whole else "adapter"
        known = {"step": checkpoint.step, "held_out_reward": checkpoint.reward}
        artifact = self._wandb.Artifact(f"{kind}-{self.run.id}", type="model", metadata=known)
        artifact.add_dir(str(folder), skip_cache=True)
        newest = self._memory.is_newest(checkpoint)
        aliases = ["latest"] * newest + [f"step-{checkpoint.step}"] + ["best"] * checkpoint.best
        self.run.log_artifact(artifact, aliases=aliases)
        self._memory.has(checkpoint)

    def finish(self, ending: Ending, report: Sequence[Path]) -> str:
        """Upload the report, say in the summary how the run ended, and wait for the uploads."""
        self._upload(report)
        said = {"outcome": ending.outcome, "outcome_reason": ending.reason, **ending.summary}
        self.run.summary.update(self.redactor.tables(said))
        self.run.finish(exit_code=ending.code)
        if self._online:
            return str(self.run.url)
        return f"recorded offline; `wandb sync {self.root}/wandb/offline-run-*-{self.run.id}` uploads it"

    def _upload(self, report: Sequence[Path]) -> None:
        if not report:
            return
        artifact = self._wandb.Artifact(f"report-{self.run.id}", type="report")
        for path in report:
            name = path.relative_to(self.root).as_posix()
            if path.suffix in TEXT:
                with artifact.new_file(name, encoding="utf-8") as file:
                    file.write(self.redactor.text(path.read_text(encoding="utf-8")))
            else:
                artifact.add_file(str(path), name=name, skip_cache=True)
        self.run.log_artifact(artifact, aliases=["latest"])
        pictures = {f"report/{path.stem}": self._wandb.Image(str(path)) for path in report if path.suffix == ".png"}
        if pictures:
            self._add({"step": self._step, **pictures})


def _options(config: RLConfig, settings: WandbConfig, redactor: Redactor, wandb: Any) -> dict[str, Any]:
    root = config.output_dir
    (root / "wandb").mkdir(parents=True, exist_ok=True)
    return {
        "project": settings.project,
        "entity": settings.entity,
        "group": settings.group,
        "tags": settings.tags or None,
        "name": config.run_name or root.resolve().name,
        "id": wandb_id(root),
        "resume": "allow",
        "allow_val_change": True,  # a resumed run may be made longer
        "dir": str(root),
        "config": redactor.tables(config.model_dump(mode="json")),
        "settings": wandb.Settings(console="off", disable_git=True, save_code=False, init_timeout=INIT_TIMEOUT_S),
    }


def wandb_id(run_root: Path) -> str:
    """Id of this run in W&B: made once, then kept in `wandb_id` of the run folder."""
    path = run_root / "wandb_id"
    if path.exists() and (known := path.read_text().strip()):
        return known
    fresh = uuid.uuid4().hex[:12]
    path.write_text(fresh + "\n")
    return fresh


def missing_for_wandb(settings: WandbConfig) -> str | None:
    """What keeps a run from being tracked as configured, with its remedy; None where nothing does."""
    if settings.mode == "disabled":
        return None
    try:
        wandb: Any = import_module("wandb")
    except ImportError:
        return "[wandb] is set, but the package is missing: `pip install turnwise[wandb]`, or drop the table (--no-wandb)."
    if settings.mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
        return 'wandb.mode = "online" needs an account: run `wandb login`, set WANDB_API_KEY, or use wandb.mode = "offline".'
    return None
