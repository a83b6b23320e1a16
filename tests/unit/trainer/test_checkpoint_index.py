"""Which checkpoints count as whole, and which are kept. Folders here are written by hand: no torch is needed."""

import json
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from turnwise.config import CkptConfig
from turnwise.trainer.checkpoint_index import (
    META,
    CheckpointError,
    Meta,
    best_checkpoints,
    check_checkpoint,
    checkpoint_steps,
    latest_valid_checkpoint,
    manifest,
    prune_checkpoints,
)


def write_checkpoint(run_dir: Path, step: int) -> Path:
    folder = run_dir / "checkpoints" / f"step_{step}"
    (folder / "trainer").mkdir(parents=True)
    (folder / "trainer" / "__0_0.distcp").write_bytes(b"tensors" * 100)
    (folder / "orchestrator.msgpack").write_bytes(b"progress")
    meta = Meta(step=step, version="0", time=0.0, config_digest="", world_size=1, files=manifest(folder))
    (folder / META).write_bytes(msgspec.json.encode(meta))
    return folder


def write_eval(run_dir: Path, step: int, **rewards: float) -> None:
    (run_dir / "evals").mkdir(parents=True, exist_ok=True)
    metrics = {f"val-core/{name}/reward/mean": value for name, value in rewards.items()} | {"val-aux/x/mean": 99.0}
    (run_dir / "evals" / f"step_{step}.json").write_text(json.dumps({"step": step, "version": step, "metrics": metrics}))


def test_the_newest_whole_checkpoint_is_taken(tmp_path: Path) -> None:
    for step in (2, 10, 4):
        write_checkpoint(tmp_path, step)
    assert checkpoint_steps(tmp_path) == [2, 4, 10]
    assert latest_valid_checkpoint(tmp_path) == 10
    (tmp_path / "checkpoints" / "step_10" / "trainer" / "__0_0.distcp").write_bytes(b"cut")
    assert latest_valid_checkpoint(tmp_path) == 4
    (tmp_path / "checkpoints" / "step_4" / META).unlink()
    assert latest_valid_checkpoint(tmp_path) == 2


def test_a_run_without_checkpoints_has_none_and_drafts_do_not_count(tmp_path: Path) -> None:
    assert latest_valid_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints" / ".step_3.99.tmp").mkdir(parents=True)
    assert latest_valid_checkpoint(tmp_path) is None


def test_each_kind_of_damage_is_named_with_its_file(tmp_path: Path) -> None:
    shard = Path("trainer") / "__0_0.distcp"
    cut, missing, altered, headless, garbled, moved = (write_checkpoint(tmp_path, step) for step in range(1, 7))
    (cut / shard).write_bytes(b"tens")
    (missing / "orchestrator.msgpack").unlink()
    (altered / shard).write_bytes(b"tensorz" * 100)
    (headless / META).unlink()
    (garbled / META).write_text("{")
    moved = moved.rename(moved.with_name("step_60"))
    expectations = {
        cut: r"__0_0\.distcp has 4 bytes instead of 700",
        missing: r"orchestrator\.msgpack is missing",
        headless: r"meta\.json is missing: this is no complete checkpoint",
        garbled: r"meta\.json cannot be read",
        moved: r"is of step 6, not of step_60",
    }
    for folder, message in expectations.items():
        with pytest.raises(CheckpointError, match=message + r".*resume"):
            check_checkpoint(folder)
    assert check_checkpoint(altered).step == 3  # sizes alone do not tell
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is corrupt"):
        check_checkpoint(altered, contents=True)


def test_best_is_by_held_out_reward_over_all_environments(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write_checkpoint(tmp_path, step)
    write_eval(tmp_path, 1, wordle=0.9, gsm8k=0.1)
    write_eval(tmp_path, 2, wordle=0.6, gsm8k=0.6)
    write_eval(tmp_path, 3, wordle=0.5, gsm8k=0.5)
    write_eval(tmp_path, 7, wordle=9.0)  # there is no checkpoint of it
    assert best_checkpoints(tmp_path, 3) == [2, 1, 3]


def test_newest_and_best_stay_and_the_rest_goes(tmp_path: Path) -> None:
    for step in range(1, 8):
        write_checkpoint(tmp_path, step)
    write_eval(tmp_path, 2, wordle=1.0)
    write_eval(tmp_path, 5, wordle=0.5)
    (tmp_path / "checkpoints" / "step_3" / "KEEP").touch()
    removed = prune_checkpoints(tmp_path, CkptConfig(keep_last=2, keep_best=1))
    assert removed == [1, 4, 5]
    assert checkpoint_steps(tmp_path) == [2, 3, 6, 7]


def test_without_a_limit_all_stay(tmp_path: Path) -> None:
    for step in range(3):
        write_checkpoint(tmp_path, step)
    assert prune_checkpoints(tmp_path, CkptConfig(keep_last=None)) == []
    assert checkpoint_steps(tmp_path) == [0, 1, 2]


def test_reading_the_index_loads_no_torch() -> None:
    code = "import sys, turnwise.trainer.checkpoint_index; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
