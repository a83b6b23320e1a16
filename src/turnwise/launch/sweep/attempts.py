"""`sweep_attempts.jsonl` in a run's folder: when the sweep started the run, how each start ended. `rl --clean` leaves it."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Mode = Literal["new", "resume", "rerun"]


@dataclass(frozen=True)
class Attempts:
    """What the file says."""

    started: float | None = None  # unix time of the first start
    ended: float | None = None  # of the last end; None while a start has no end
    count: int = 0  # starts
    failures: int = 0  # starts that ended early by themselves, since the last word to try again
    exit_code: int | None = None  # of the last end
    pid: int | None = None  # of the last start, if its end is not on file
    pid_created: float | None = None
    gpus: tuple[int, ...] = ()  # of the last start


class AttemptLog:
    """The file of one run. Each event is a line that is on the disk before the sweep goes on."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "sweep_attempts.jsonl"

    def started(self, *, pid: int, created: float, mode: Mode, gpus: list[int]) -> None:
        """A process was started; pid and creation time together name it for good."""
        self._add({"event": "start", "mode": mode, "pid": pid, "pid_created": created, "gpus": gpus})

    def ended(self, *, exit_code: int | None, step: int, failed: bool) -> None:
        """A start has ended; `exit_code` is None where another sweep had started it."""
        self._add({"event": "end", "exit_code": exit_code, "step": step, "failed": failed})

    def try_again(self) -> None:
        """Forget the failures so far."""
        self._add({"event": "try again"})

    def read(self) -> Attempts:
        """All events, put together; a line torn by a crash is passed over."""
        found: dict[str, Any] = {}
        count = failures = 0
        for event in self._events():
            if event["event"] == "start":
                count += 1
                found.setdefault("started", event["time"])
                found |= {"pid": event["pid"], "pid_created": event["pid_created"], "gpus": tuple(event["gpus"]), "ended": None}
            elif event["event"] == "end":
                failures += bool(event["failed"])
                found |= {"pid": None, "pid_created": None, "ended": event["time"], "exit_code": event["exit_code"]}
            else:
                failures = 0
        return Attempts(count=count, failures=failures, **found)

    def _events(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        events: list[dict[str, Any]] = []
        for line in self.path.read_bytes().splitlines():
            try:
                events.append(json.loads(line))
            except ValueError:
                continue  # the machine went down while this line was written
        return events

    def _add(self, event: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if file.tell() and not self.path.read_bytes().endswith(b"\n"):
                file.write(b"\n")  # after a torn line
            file.write(json.dumps({**event, "time": time.time()}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
