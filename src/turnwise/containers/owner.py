"""Whose a container is: labels that say which process made it, and whether that process is still there."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

OWNER_LABEL = "turnwise.owner"
RUN_LABEL = "turnwise.run"
START_FIELD = 19  # of /proc/PID/stat, counted behind the command's closing bracket


@dataclass(frozen=True)
class Owner:
    """A process, named so that no other one is ever taken for it.

    A process id alone is used again, and means nothing in another pid namespace or on another machine; so it comes with the start
    time of the process in clock ticks, its pid namespace, and the boot id of the kernel.
    """

    boot: str
    namespace: str
    pid: int
    started: int

    @classmethod
    def me(cls) -> "Owner":
        """This process."""
        started = start_time(os.getpid())
        assert started is not None
        return cls(_boot(), _namespace(), os.getpid(), started)

    def label(self) -> str:
        """As the text of a label."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def parse(cls, label: str) -> "Owner | None":
        """From the text of a label; None when it is no such text."""
        try:
            fields = json.loads(label)
            return cls(str(fields["boot"]), str(fields["namespace"]), int(fields["pid"]), int(fields["started"]))
        except (ValueError, KeyError, TypeError):
            return None

    def is_dead(self) -> bool:
        """Whether this process can tell for certain that the owner has ended. False where it cannot look."""
        if (self.boot, self.namespace) != (_boot(), _namespace()):
            return False
        return start_time(self.pid) != self.started


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when there is no such process, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in ("Z", "X") else int(fields[START_FIELD])


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _namespace() -> str:
    return os.readlink("/proc/self/ns/pid")
