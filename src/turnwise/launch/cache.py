"""Folders in the user's cache that are made once: by one process at a time, whole or not at all, and known again."""

import fcntl
import json
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from turnwise.transport import write_atomic

Progress = Callable[[str], None]
STAMP = "turnwise.json"  # written last into a folder: what it was made from, and the size of each file


def cache_root() -> Path:
    """`TURNWISE_CACHE`, or `~/.cache/turnwise`."""
    return Path(os.environ.get("TURNWISE_CACHE") or Path.home() / ".cache" / "turnwise").expanduser()


@contextmanager
def locked(folder: Path, progress: Progress) -> Generator[None]:
    """One process at a time makes `folder`; the lock falls when its holder ends, however it ends."""
    path = folder.with_name(f".{folder.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("another process is preparing this model: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_stamp(folder: Path, source: str) -> None:
    """Note what a complete folder was made from: `source`, a SHA-256."""
    write_atomic(folder / STAMP, json.dumps({"sha256": source, "sizes": _sizes(folder)}).encode())


def is_whole(folder: Path, source: str) -> bool:
    """Whether the folder was made from `source` and no file of it was lost or cut since."""
    stamp = folder / STAMP
    if not stamp.is_file() or not is_json(stamp):
        return False
    made = json.loads(stamp.read_text())
    sizes = made.get("sizes", {})
    return made.get("sha256") == source and bool(sizes) and sizes == _sizes(folder)


def is_json(path: Path) -> bool:
    """Whether a file can be read as JSON."""
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file() and path.name != STAMP}
