"""A sweep file: several runs, the seeds they are repeated with, where they run, and what is compared in the end."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from turnwise.config.base import Config

WATCHED = ["response_length/mean", "actor/entropy", "critic/reward/mean"]


class SweepRunConfig(Config):
    """One experiment: a configuration that is run once for each seed."""

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """Name in tables and folders; `e6b` with seed 0 lies in `runs/e6b-s0`."""

    title: str = ""
    """What it is, in a few words."""

    files: list[Path] = Field(default_factory=list)
    """Its files, over the common ones."""

    overrides: dict[str, Any] = Field(default_factory=dict)
    """Its own values, over everything else: `[run.overrides.trainer.optim] lr = 1e-4`."""

    reference: float | None = None
    """A score from elsewhere to stand beside its own, in the unit of the table."""

    note: str = ""
    """What is to be known about that score."""


class SweepConfig(Config):
    """Runs that are made one after the other, or side by side, and compared."""

    name: str
    """Title of tables and pages."""

    output_dir: Path
    """Folder of the sweep; relative to where you are."""

    run: list[SweepRunConfig] = Field(min_length=1)
    """The experiments, in their order, each a `[[run]]` table."""

    files: list[Path] = Field(default_factory=list)
    """Files under every run's own. Paths of files are relative to the sweep file that names them."""

    overlays: list[Path] = Field(default_factory=list)
    """Files over every run's own, which shorten a sweep; what they change is printed and stands on the page."""

    overlay_overrides: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """What an overlay changes in single experiments alone, by id: `[overlay_overrides.e12.inference.noise] sigma_start = 0.02`.
    Ids of other sweeps may stand there, since one overlay goes behind several."""

    overrides: dict[str, Any] = Field(default_factory=dict)
    """Values of a run's configuration over all files: `[overrides.orchestrator] max_staleness = 0`."""

    seeds: list[int] = Field(default_factory=lambda: [0], min_length=1)
    """Each experiment is run once with each of these as its `seed`; `--seeds 3` stands for 0, 1, 2."""

    gpu_sets: list[list[int]] = Field(default_factory=list)
    """Places for runs side by side: `[[0, 1], [2, 3]]` keeps two runs going, each on one set. The GPUs that a run names are
    counted along its set. One run after the other, on the GPUs that each names, when empty."""

    when_ended_early: Literal["resume", "rerun"] = "resume"
    """What to do with a run that ended before its last step or without its final evaluation: go on from its newest checkpoint, or
    delete it and start anew."""

    max_attempts: int = Field(default=3, ge=1)
    """Starts that may fail before a run counts as failed."""

    metric: str
    """What runs are compared by, at their final evaluation: `val-core/openai/gsm8k/acc/mean`. Greater is better."""

    percent: bool = False
    """Show that metric times 100."""

    plots: list[str] = Field(default_factory=lambda: list(WATCHED))
    """Metrics that are drawn beside that one, a picture each."""

    compare: list[tuple[str, str]] = Field(default_factory=list)
    """Questions: pairs of experiments whose difference is told with its standard error, the second being what the first is held
    against: `[["e6b", "e6a"]]`."""
