"""One started process of a run: its output goes to its log, its end is noticed, its health is asked for."""

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections import deque
from pathlib import Path

from turnwise.launch.causes import likely_cause
from turnwise.launch.plan import RANK_PREFIX, ProcessSpec

HEALTH_TIMEOUT_S = 1.0
TORCHRUN_LINES = 400  # torchrun ends with a traceback of its own and a summary, some 60 lines, below those of the ranks
CAUSE_LINES = 4000  # of the log's end, in which a cause is looked for
KILLED = "something killed it, most likely the kernel for want of RAM (`dmesg` tells)."
TORCHRUN_ENDING = "exitcode  :"
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # engines are on this host: never ask a proxy


class Child:
    """A process in a session of its own, so that Ctrl-C in the terminal reaches `rl` alone.

    stdout and stderr go straight into the log file: no pipe that could fill up, and nothing is lost when `rl` is killed.
    """

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        self.started = time.monotonic()
        self.healthy = spec.health_url is None
        spec.log.parent.mkdir(parents=True, exist_ok=True)
        with spec.log.open("ab") as output:
            self._start = output.tell()
            self._process = subprocess.Popen(
                spec.argv,
                env={**os.environ, **spec.env},
                cwd=spec.cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pid(self) -> int:
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.poll()

    def reap(self) -> None:
        """Take note of its end, once that was brought about, so that no zombie stays."""
        self._process.wait()

    def check_health(self) -> bool:
        """Ask once whether it serves; remembered once it did."""
        if not self.healthy and self.spec.health_url:
            try:
                with _DIRECT.open(self.spec.health_url, timeout=HEALTH_TIMEOUT_S) as answer:
                    self.healthy = answer.status == 200
            except (urllib.error.URLError, OSError):
                return False
        return self.healthy

    def last_lines(self, count: int) -> list[str]:
        """The last lines that this start of the process wrote; of torchrun's own only how the worker ended."""
        if self.spec.role != "trainer":
            return tail(self.spec.log, count, since=self._start)
        lines = tail(self.spec.log, TORCHRUN_LINES, since=self._start)
        ending = [line for line in lines if line.lstrip().startswith(TORCHRUN_ENDING)][-1:]
        own = [line for line in lines if line.startswith(RANK_PREFIX)]
        return [*own[-(count - len(ending)) :], *ending] if own else lines[-count:]

    def likely_cause(self) -> str | None:
        """What its log says about why it ended, and what helps; None where nothing known is found."""
        if self.exit_code() == -signal.SIGKILL:
            return KILLED
        if self.spec.role == "orchestrator":
            return None  # its log shows what models write, which may be anything
        return likely_cause(tail(self.spec.log, CAUSE_LINES, since=self._start), self.spec.role)

    def ending(self) -> str:
        """How it ended, in words."""
        code = self.exit_code()
        return f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"


def tail(path: Path, count: int, *, since: int = 0) -> list[str]:
    """Last lines of a text file after byte `since`; empty where there is no file."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(since)
        return [line.decode(errors="replace").rstrip("\r\n") for line in deque(file, count)]
