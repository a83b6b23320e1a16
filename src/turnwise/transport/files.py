"""Files that other processes may read at any moment: written beside their place and renamed into it."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

POLL_S = 0.02  # one stat() of a missing file costs about 2 us: 50 a second are free, and no step waits 20 ms for a file twice


@contextmanager
def atomic_dir(path: Path, *, durable: bool = True) -> Generator[Path]:
    """A folder to fill that appears at `path` whole or not at all; an older one there is replaced.

    Args:
        path: where it appears.
        durable: synced to the disk first, so that it is whole after a power failure too; 0.1 GB can take a second.

    Raises:
        OSError: the file system refused (disk full, no permission); nothing is left behind, the older one is untouched.
    """
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed here; one process fills a folder
        shutil.rmtree(leftover, ignore_errors=True)
    draft, older = _beside(path, "tmp"), _beside(path, "old")
    draft.mkdir(parents=True)
    try:
        yield draft
        if durable:
            for entry in [*sorted(draft.rglob("*")), draft]:
                _sync(entry)
        if path.exists():  # moved aside first: deleting it in place would show parts of it to whoever reads
            path.rename(older)
        draft.rename(path)
        if durable:
            _sync(path.parent)
    finally:
        if older.exists() and not path.exists():
            older.rename(path)
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(older, ignore_errors=True)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old content or the new, never a part.

    Raises:
        OSError: the file system refused (disk full, no permission); the old file is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = _beside(path, "tmp")
    try:
        with draft.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(path)
        _sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def wait_for(path: Path, *, stop: Callable[[], bool], timeout_s: float | None = None) -> bool:
    """Wait until `path` exists. False when `stop()` became true first.

    Raises:
        TimeoutError: neither happened within `timeout_s` seconds.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while not path.exists():
        if stop():
            return False
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError(f"{path} did not appear within {timeout_s:.0f} s")
        time.sleep(POLL_S)
    return True


def _beside(path: Path, suffix: str) -> Path:
    """A name next to `path` that no other writer uses and no `step_*` pattern matches."""
    return path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.{suffix}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
