"""Which checkpoints a run has, whether they are whole, and which are kept. Loads no torch: `rl --resume` reads this."""

import json
import shutil
import zlib
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from turnwise.config import CkptConfig
from turnwise.transport import RunDir

META = "meta.json"
CHUNK_BYTES = 1 << 24


class CheckpointError(Exception):
    """A checkpoint cannot be written or used. The message is complete: it is printed as it stands, without a traceback."""


class Meta(msgspec.Struct, frozen=True):
    """`meta.json`, written last: a folder that has it had everything else."""

    step: int
    version: str  # of turnwise
    time: float  # unix
    config_digest: str
    world_size: int  # trainer processes that wrote it; another number may read it
    files: dict[str, tuple[int, int]]  # path in the folder -> bytes, CRC-32


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps that have a checkpoint folder, ascending, whole or not."""
    names = (path.name.removeprefix("step_") for path in RunDir(run_dir).checkpoints.glob("step_*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdigit())


def latest_valid_checkpoint(run_dir: Path) -> int | None:
    """Newest step whose checkpoint has all its files at their full size; None when there is none."""
    for step in reversed(checkpoint_steps(run_dir)):
        try:
            check_checkpoint(RunDir(run_dir).checkpoint(step))
        except CheckpointError:
            continue
        return step
    return None


def check_checkpoint(folder: Path, *, contents: bool = False) -> Meta:
    """The description of a checkpoint that is whole.

    Args:
        folder: `checkpoints/step_N`.
        contents: read every byte and compare checksums too, not only sizes.

    Raises:
        CheckpointError: a file is missing, cut short or altered; the message names it.
    """
    remedy = f"remove {folder} and resume from an earlier checkpoint (`rl --resume` takes the newest whole one)"
    try:
        meta = msgspec.json.decode((folder / META).read_bytes(), type=Meta)
    except FileNotFoundError:
        raise CheckpointError(f"{folder / META} is missing: this is no complete checkpoint; {remedy}") from None
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{folder / META} cannot be read ({error}); {remedy}") from error
    if folder.name != f"step_{meta.step}":
        raise CheckpointError(f"{folder / META} is of step {meta.step}, not of {folder.name}; {remedy}")
    for name, (size, checksum) in meta.files.items():
        file = folder / name
        actual = file.stat().st_size if file.is_file() else None
        if actual is None:
            raise CheckpointError(f"{file} is missing; {remedy}")
        if actual != size:
            raise CheckpointError(f"{file} has {actual} bytes instead of {size}; {remedy}")
        if contents and crc32(file) != checksum:
            raise CheckpointError(f"{file} is corrupt (its checksum differs); {remedy}")
    return meta


def crc32(file: Path) -> int:
    """CRC-32 of a file's bytes."""
    checksum = 0
    with file.open("rb") as stream:
        while block := stream.read(CHUNK_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum


def manifest(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and checksum of every file under `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_size, crc32(path)) for path in files}


def held_out_reward(run_dir: Path, step: int) -> float | None:
    """Mean over evaluation environments of `val-core/*/reward/mean` after a step; None where there was no evaluation."""
    path = RunDir(run_dir).evals / f"step_{step}.json"
    if not path.exists():
        return None
    metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")).get("metrics", {})
    rewards = [value for name, value in metrics.items() if name.startswith("val-core/") and name.endswith("/reward/mean")]
    return fmean(rewards) if rewards else None


def best_checkpoints(run_dir: Path, count: int) -> list[int]:
    """The `count` steps of best held-out reward among those with a checkpoint, best first; the earlier wins a tie."""
    rewards = {step: held_out_reward(run_dir, step) for step in checkpoint_steps(run_dir)}
    known = {step: reward for step, reward in rewards.items() if reward is not None}
    return sorted(known, key=lambda step: (-known[step], step))[:count]


def prune_checkpoints(run_dir: Path, config: CkptConfig) -> list[int]:
    """Remove checkpoints that are neither among the newest nor the best; returns the removed steps.

    A folder that holds a file `KEEP` stays, whatever the configuration says.
    """
    steps = checkpoint_steps(run_dir)
    if config.keep_last is None:
        return []
    kept = set(steps[-config.keep_last :]) | set(best_checkpoints(run_dir, config.keep_best))
    removed = [step for step in steps if step not in kept and not (RunDir(run_dir).checkpoint(step) / "KEEP").exists()]
    for step in removed:
        shutil.rmtree(RunDir(run_dir).checkpoint(step), ignore_errors=True)
    return removed
