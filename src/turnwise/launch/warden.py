"""Ends what a run left behind when `rl` itself was killed. A process of its own, whose stdin is a pipe that `rl` holds open.

    python -m turnwise.launch.warden RUN_ID GRACE_SECONDS

The end of that pipe is the end of `rl`, however it came about (`kill -9` and the out-of-memory killer included). In an
orderly run nothing is left by then, and the warden only ends. It also holds the lock of the run folder, so that nobody
resumes a run whose last processes are still writing.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from turnwise.launch.survivors import end_all


def main() -> None:
    run_id, grace_s = sys.argv[1], float(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # what ends `rl` must not end its warden first
    while os.read(0, 4096):
        pass
    end_all(run_id, grace_s)


class Warden:
    """The warden as seen from `rl`."""

    def __init__(self, run_id: str, log: Path, *, grace_s: float, lock_descriptor: int | None = None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "turnwise.launch.warden", run_id, str(grace_s)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
                pass_fds=() if lock_descriptor is None else (lock_descriptor,),
            )

    def dismiss(self, timeout_s: float = 30.0) -> None:
        """Close the pipe and wait until it has seen that nothing is left."""
        if self._process.stdin:
            self._process.stdin.close()
        self._process.wait(timeout_s)


if __name__ == "__main__":
    main()
