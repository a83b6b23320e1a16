"""Runs a command and ends it, with all that it started, as soon as the standard input of this process closes.

`python -m turnwise.adapters.openenv.guard [CLEANUP...] -- COMMAND...`: whoever holds the other end of the pipe may end in any
way, SIGKILL too. CLEANUP runs after the end of the command, for what is not in its process group, such as an engine's container.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

GRACE_S = 5.0  # between asking the command to end and ending it
CLEANUP_S = 10.0


def main() -> int:
    """Entry point; returns the command's exit code."""
    separator = sys.argv.index("--")
    cleanup, command = sys.argv[1:separator], sys.argv[separator + 1 :]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    threading.Thread(target=_end_with_input, args=(child,), daemon=True).start()
    code = child.wait()
    _signal(child, signal.SIGKILL)  # what it left behind
    if cleanup:
        _clean_up(cleanup)
    return code


def _clean_up(words: Sequence[str]) -> None:
    """Run it; only its failure is told, since mostly there is nothing left to end."""
    try:
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CLEANUP_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"{' '.join(words)}: {error}", flush=True)
        return
    if done.returncode:
        print(f"{' '.join(words)}: {done.stderr.strip()}", flush=True)


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
