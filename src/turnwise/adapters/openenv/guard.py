"""Runs a command and ends it, with all that it started, as soon as the standard input of this process closes.

`python -m turnwise.adapters.openenv.guard COMMAND...`: whoever holds the other end of the pipe may end in any way, SIGKILL too.
"""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

GRACE_S = 5.0  # between asking the command to end and ending it


def main() -> int:
    """Entry point; returns the command's exit code."""
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_end_with_input, args=(child,), daemon=True).start()
    code = child.wait()
    _signal(child, signal.SIGKILL)  # what it left behind
    return code


def _end_with_input(child: subprocess.Popen[bytes]) -> None:
    os.read(0, 1)  # nothing is ever written: it returns when the pipe closes
    _signal(child, signal.SIGTERM)
    try:
        child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        _signal(child, signal.SIGKILL)


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):  # nobody left in its group
        os.killpg(child.pid, number)


if __name__ == "__main__":
    sys.exit(main())
