"""The folder of a run: one `rl` at a time, never overwritten silently, cleaned of what runs write and of nothing else."""

import fcntl
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from turnwise.config import ConfigError
from turnwise.transport import RunDir

LOCK = ".rl.lock"
FILES = ("config.toml", "metrics.jsonl", "status.json", "report.md", "wandb_id", "mlflow_id")
FOLDERS = (
    *("logs", "trajectories", "evals", "checkpoints", "weights", "batches", "control", "report"),
    *("tensorboard", "wandb", "tracking"),
)
EVIDENCE = ("config.toml", "metrics.jsonl", "checkpoints", "batches")  # any of these: somebody's run lies here


@contextmanager
def locked(root: Path) -> Generator[int]:
    """Hold the run folder; yields the lock's descriptor, which the warden shares.

    Raises:
        ConfigError: another `rl` holds it.
    """
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip() or "unknown"
            raise ConfigError(
                f"output_dir = {root} is in use by another run (process {holder}); wait for its end, or use another output_dir."
            ) from None
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def is_held(root: Path) -> bool:
    """Whether an `rl`, or the warden that ends what it left, has the folder at this moment."""
    try:
        descriptor = os.open(root / LOCK, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def holds_run(root: Path) -> bool:
    """Whether a run lies in the folder."""
    return any((root / name).exists() for name in EVIDENCE)


def refuse_existing(root: Path) -> None:
    """Raises ConfigError when a run lies in the folder."""
    if holds_run(root):
        raise ConfigError(
            f"output_dir = {root} holds a run already. Add --resume to go on with it, --clean to delete it and start anew, "
            "or choose another folder with --output-dir."
        )


def clean(root: Path, trajectories: Path | None = None) -> list[Path]:
    """Delete what a run writes, known by its names, and return it. Anything else in the folder stays."""
    removed: list[Path] = []
    for name in (*FILES, *FOLDERS):
        path = root / name
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            continue
        removed.append(path)
    for path in sorted(trajectories.glob("step_*.jsonl")) if trajectories and trajectories.is_dir() else []:
        path.unlink()
        removed.append(path)
    return removed


def steps_of(folder: Path, suffix: str) -> list[tuple[int, Path]]:
    """(N, path) of the entries `step_N<suffix>` in a folder, ascending."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob(f"step_*{suffix}"):
        number = path.name.removeprefix("step_").removesuffix(suffix)
        if number.isdigit():
            found.append((int(number), path))
    return sorted(found)


def run_dir_of(root: Path) -> RunDir:
    """Raises ConfigError when the folder holds no run."""
    if not (root / "config.toml").is_file():
        raise ConfigError(f"{root} holds no run: it has no config.toml (looked from {Path.cwd()}).")
    return RunDir(root)
