"""Processes of a run's plan in a benchmark: started as `rl` starts them, ended with all that they started."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from turnwise.inference.client import InferenceClient
from turnwise.launch.plan import ProcessSpec

ERRORS = 10
TAIL = 40  # lines of a log that are shown when something failed
END_S = 30.0


@contextmanager
def started(spec: ProcessSpec, argv: tuple[str, ...], **streams: Any) -> Generator["subprocess.Popen[bytes]"]:
    """`argv` in the environment of a process of the plan; `streams` that are not given go to its log."""
    spec.log.parent.mkdir(parents=True, exist_ok=True)
    with spec.log.open("wb") as log:
        output = {"stdout": log, "stderr": log, **streams}
        process = subprocess.Popen(argv, env={**os.environ, **spec.env}, start_new_session=True, **output)
    try:
        yield process
    except BaseException:
        lines = spec.log.read_text(errors="replace").splitlines()
        errors = [line for line in lines[:-TAIL] if "Error" in line][:ERRORS]  # the root cause stands far above the end
        print(f"--- {spec.name}:", *errors, *lines[-TAIL:], sep="\n", file=sys.stderr)
        raise
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def healthy(client: InferenceClient, server: "subprocess.Popen[bytes]", limit_s: float) -> None:
    """Wait until the engine answers. Raises RuntimeError when it ends before."""
    waiting = asyncio.create_task(client.wait_healthy(limit_s))
    while not waiting.done():
        if server.poll() is not None:
            waiting.cancel()
            raise RuntimeError(f"the engine ended with {server.returncode}")
        await asyncio.wait([waiting], timeout=0.5)
    await waiting
