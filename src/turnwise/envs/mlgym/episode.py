"""The state of one episode: what it works with, and what it has come to."""

from dataclasses import dataclass, field

from turnwise.containers import Box
from turnwise.envs.mlgym.editor import Editor
from turnwise.envs.mlgym.task import Task

ENDINGS = ("submitted", "autosubmitted", "format", "forfeit")  # metrics `ended_*`, of which each episode has one


@dataclass(frozen=True)
class Opened:
    """The task, container and editor of an episode."""

    task: Task
    box: Box
    editor: Editor


@dataclass
class Progress:
    """What an episode has come to."""

    validations: int = 0
    best: float | None = None  # improvement over the baseline at the best validation
    commands: int = 0
    failed: int = 0
    format_errors: int = 0
    format_errors_in_a_row: int = 0
    metrics: dict[str, float] = field(default_factory=dict[str, float])

    def ended(self, how: str) -> None:
        """Note which of `ENDINGS` it was."""
        self.metrics |= {f"ended_{ending}": float(ending == how) for ending in ENDINGS}

    def all_metrics(self) -> dict[str, float]:
        return {
            "validations": float(self.validations),
            "commands": float(self.commands),
            "failed_commands": float(self.failed),
            "format_errors": float(self.format_errors),
            **self.metrics,
        }
