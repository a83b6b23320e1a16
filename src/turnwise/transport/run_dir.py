"""Where everything of a run lies under its output folder."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunDir:
    """Paths of one run."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.toml"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def batches(self) -> Path:
        return self.root / "batches"

    @property
    def weights(self) -> Path:
        return self.root / "weights"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def evals(self) -> Path:
        return self.root / "evals"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def status(self) -> Path:
        """What the orchestrator is doing now, rewritten about once a second for the live view."""
        return self.root / "status.json"

    @property
    def report(self) -> Path:
        return self.root / "report.md"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step}"
