"""Files appear whole or not at all, also when the disk fills up while they are written."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from turnwise.transport import atomic_dir, wait_for, write_atomic


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def no_space(*args: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_is_written_with_its_folders(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a" / "b.json", b"one")
    write_atomic(tmp_path / "a" / "b.json", b"two")
    assert (tmp_path / "a" / "b.json").read_bytes() == b"two"
    assert entries(tmp_path / "a") == ["b.json"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "status.json", b"old")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(tmp_path / "status.json", b"new")
    assert (tmp_path / "status.json").read_bytes() == b"old"
    assert entries(tmp_path) == ["status.json"]


def test_a_folder_appears_only_when_it_is_filled(tmp_path: Path) -> None:
    with atomic_dir(tmp_path / "step_1") as draft:
        (draft / "model").mkdir()
        (draft / "model" / "weights").write_bytes(b"w")
        assert not (tmp_path / "step_1").exists()
        assert list(tmp_path.glob("step_*")) == []
    assert (tmp_path / "step_1" / "model" / "weights").read_bytes() == b"w"
    assert entries(tmp_path) == ["step_1"]


def test_a_folder_replaces_the_older_one_whole(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with atomic_dir(tmp_path / "v1") as draft:
            (draft / name).touch()
    assert entries(tmp_path / "v1") == ["new"]
    assert entries(tmp_path) == ["v1"]


def replace(path: Path, *, full: bool) -> None:
    with atomic_dir(path) as draft:
        (draft / "new").write_bytes(b"new")
        if full:
            no_space()


@pytest.mark.parametrize("failing", ["fill", "fsync", "rename"])
def test_a_failure_keeps_the_older_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    with atomic_dir(tmp_path / "v1") as draft:
        (draft / "old").write_bytes(b"old")
    rename = Path.rename

    def rename_once_refused(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            no_space()
        return rename(self, target)

    if failing == "fsync":
        monkeypatch.setattr(os, "fsync", no_space)
    if failing == "rename":
        monkeypatch.setattr(Path, "rename", rename_once_refused)
    with pytest.raises(OSError, match="No space left"):
        replace(tmp_path / "v1", full=failing == "fill")
    assert (tmp_path / "v1" / "old").read_bytes() == b"old"
    assert entries(tmp_path) == ["v1"]


KILLED = """
import os, sys
from pathlib import Path
from turnwise.transport import atomic_dir
with atomic_dir(Path(sys.argv[1])) as draft:
    (draft / "half").write_bytes(b"x" * 1000)
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_left_is_never_seen_and_cleared_by_the_next(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "step_2")], check=False)
    assert done.returncode == -9
    assert not (tmp_path / "step_2").exists()
    assert list(tmp_path.glob("step_*")) == []
    assert len(entries(tmp_path)) == 1
    with atomic_dir(tmp_path / "step_2") as draft:
        (draft / "whole").touch()
    assert entries(tmp_path) == ["step_2"]


LIMITED = """
import resource, signal, sys
from pathlib import Path
from turnwise.transport import Batch, BatchLog, Progress, Sample, WeightsReady, WeightsStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
root = Path(sys.argv[1])
log, store = BatchLog(root / "batches"), WeightsStore(root / "weights")
for step, tokens in ((1, 10), (2, 5000)):
    sample = Sample([1] * tokens, [True] * tokens, [0.0] * tokens, [0.0] * tokens, [0] * tokens, tokens, "r", 0, "t")
    try:
        log.write(Batch(step, [sample], ["r"], 1, 1.0, Progress()))
    except OSError as error:
        print("batch", step, error.errno)
    try:
        store.publish(WeightsReady(step, "lora", "p", "d"), lambda folder: (folder / "w").write_bytes(b"x" * tokens) and None)
    except OSError as error:
        print("weights", step, error.errno)
print(log.steps(), store.versions())
"""


def test_a_write_that_the_system_really_refuses_loses_nothing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"batch 2 {errno.EFBIG}", f"weights 2 {errno.EFBIG}", "[1] [1]"]
    assert entries(tmp_path / "batches") == ["step_1.msgpack"]
    assert entries(tmp_path / "weights") == ["v1"]


def test_waiting_ends_with_the_file_with_the_stop_or_with_the_deadline(tmp_path: Path) -> None:
    answers = iter([False, False, True])
    assert wait_for(tmp_path / "never", stop=lambda: next(answers)) is False
    write_atomic(tmp_path / "there", b"")
    assert wait_for(tmp_path / "there", stop=lambda: False) is True
    with pytest.raises(TimeoutError, match="never did not appear within 0 s"):
        wait_for(tmp_path / "never", stop=lambda: False, timeout_s=0.0)


def test_a_folder_that_need_not_be_durable_appears_whole_without_a_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", no_space)
    with atomic_dir(tmp_path / "v1", durable=False) as draft:
        (draft / "weights").write_bytes(b"w")
        assert not (tmp_path / "v1").exists()
    assert (tmp_path / "v1" / "weights").read_bytes() == b"w"
