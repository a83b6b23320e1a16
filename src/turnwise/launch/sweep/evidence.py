"""What a run's own folder says about it: how far it came, whether it is whole, whether somebody works in it now."""

import tomllib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from turnwise.config import ConfigError
from turnwise.config.files import read_toml
from turnwise.launch.run_folder import holds_run
from turnwise.monitor import judge_metrics
from turnwise.report import load_metrics
from turnwise.report.run import Metrics
from turnwise.transport import Control, RunDir
from turnwise.transport.control import StopRequest


@dataclass(frozen=True)
class Evidence:
    """A run folder at one moment."""

    begun: bool = False  # a run lies in the folder
    max_steps: int | None = None  # of its own configuration
    metrics: Metrics = field(default_factory=dict[int, dict[str, float]])
    evaluated: frozenset[int] = frozenset()  # steps whose evaluation is on file
    stop: StopRequest | None = None  # what ended it before its last step
    trouble: str | None = None  # a file that cannot be read

    @property
    def step(self) -> int:
        """The last optimiser step on record."""
        trained = (step for step, values in self.metrics.items() if any(not name.startswith("val-") for name in values))
        return max(trained, default=0)

    @cached_property
    def verdict(self) -> str:
        """Whether the run learns, in a word; empty before its first step."""
        return str(judge_metrics(self.metrics).state) if self.step else ""

    @property
    def complete(self) -> bool:
        """All steps, or a success that ends a run, and the evaluation of the last policy."""
        if not self.begun or self.max_steps is None or self.trouble:
            return False
        succeeded = self.stop is not None and self.stop.kind == "success"
        return (self.step >= self.max_steps or succeeded) and self.step in self.evaluated

    @property
    def aborted(self) -> bool:
        """Ended by its own `stop.abort_when`: another start would end in the same way."""
        return self.stop is not None and self.stop.kind == "abort"

    @property
    def lack(self) -> str:
        """What is missing from a whole run, in words; empty where nothing is."""
        if self.complete:
            return ""
        if self.trouble:
            return self.trouble
        if self.max_steps is None:
            return "it has no config.toml" if self.begun else "not begun"
        if self.step < self.max_steps:
            because = f": {self.stop.reason}" if self.stop else ""
            return f"step {self.step} of {self.max_steps}{because}"
        return f"no final evaluation, of step {self.step}"


def gather(root: Path) -> Evidence:
    """Read a run folder; one that is not there is an empty one."""
    if not holds_run(root):
        return Evidence()
    run_dir = RunDir(root)
    trouble, config, metrics = None, dict[str, Any](), dict[int, dict[str, float]]()
    try:
        config = read_toml(run_dir.config) if run_dir.config.exists() else {}
        metrics = load_metrics(root)
    except (ConfigError, ValueError) as error:
        trouble = str(error)
    evaluated = frozenset(
        int(number) for path in run_dir.evals.glob("step_*.json") if (number := path.stem.removeprefix("step_")).isdigit()
    )
    return Evidence(True, config.get("max_steps"), metrics, evaluated, _stop(root), trouble)


class FolderReader:
    """`gather`, again and again: files that have not changed are not read again."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._seen: list[tuple[int, int, int] | None] = []
        self._evidence = Evidence()

    def read(self) -> Evidence:
        run_dir = RunDir(self.root)
        seen = [_signature(path) for path in (run_dir.config, run_dir.metrics, run_dir.evals, Control(self.root).path)]
        if not self._evidence.begun or seen != self._seen:
            self._seen, self._evidence = seen, gather(self.root)
        return self._evidence


def saved_tables(root: Path) -> dict[str, Any]:
    """The configuration with which the run in the folder began; empty where there is none to read."""
    try:
        return tomllib.loads(RunDir(root).config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _stop(root: Path) -> StopRequest | None:
    try:
        return Control(root).stop_request()
    except ValueError:  # of another version, or torn by a full disk: it says no more than that the run ended
        return None


def _signature(path: Path) -> tuple[int, int, int] | None:
    """Changes when a file is written or replaced, or when a folder gets a file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
