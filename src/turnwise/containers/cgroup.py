"""The kernel's counters of a container on this machine, read here: quicker than to ask in the container."""

from contextlib import suppress
from pathlib import Path
from typing import Self

from turnwise.containers.spec import Counters

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
FILES = {"oom_kill": ("memory", "memory.events", "memory.oom_control"), "max": ("pids", "pids.events", "pids.events")}


class CgroupCounters:
    """How often limits were hit in one container."""

    def __init__(self, oom: Path, pids: Path):
        self._oom, self._pids = oom, pids

    @classmethod
    def find(cls, container: str, pid: int, *, proc: Path = PROC, cgroups: Path = CGROUPS) -> Self | None:
        """Those of a container whose first process is `pid`, as its engine says.

        None where that cannot be known from here: the engine may count processes, or mount cgroups, in another namespace than
        this one. What is found bears the container's id in its path, so that it is never another one's.
        """
        files = dict[str, Path]()
        with suppress(OSError):
            for line in (proc / str(pid) / "cgroup").read_text().splitlines():
                _, controllers, path = line.split(":", 2)
                if container not in path:
                    continue
                for key, (controller, unified, legacy) in FILES.items():
                    file = cgroups / controllers / path.lstrip("/") / (legacy if controllers else unified)
                    if controllers in ("", controller) and file.is_file():
                        files[key] = file
        found = cls(files["oom_kill"], files["max"]) if len(files) == len(FILES) else None
        return found if found is not None and found.read() is not None else None

    def read(self) -> Counters | None:
        """Their values; None once the container has ended."""
        try:
            return Counters(_value(self._oom, "oom_kill"), _value(self._pids, "max"))
        except OSError:
            return None


def _value(file: Path, key: str) -> int:
    """The value of a key in a file of lines `key value`; 0 where the kernel has no such key."""
    with file.open("rb", buffering=0) as opened:
        words = opened.read().split()
    pairs = dict(zip(words[::2], words[1::2], strict=False))
    return int(pairs.get(key.encode(), 0))
