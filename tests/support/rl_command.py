"""The real `rl` in a process of its own, with everything that it starts findable by a mark in the environment."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Generator
from pathlib import Path

import psutil

MARK = "TURNWISE_TEST_MARK"
TOML = """
output_dir = "{output}"
max_steps = {max_steps}
seq_len = 512
[model]
name = "{model}"
[orchestrator]
batch_size = 4
rollouts_per_example = 2
max_staleness = {max_staleness}
[orchestrator.filters]
zero_variance = false
[orchestrator.sampling]
max_tokens = 8
[[orchestrator.env]]
id = "wordle"
[orchestrator.env.args]
num_train = 8
num_validation = 4
max_turns = 2
[orchestrator.eval]
num_examples = 2
[trainer]
threads = 1
[trainer.optim]
lr = 1e-2
[inference.embedded]
threads = 1
[monitor]
tensorboard = false
"""


class Rl:
    """A running `rl`. Its output is in `output()`; `processes()` are those that carry its mark, itself included."""

    def __init__(
        self, folder: Path, *args: str, cwd: Path | None = None, module: str = "turnwise.cli.rl", python: str = sys.executable
    ) -> None:
        self.mark = uuid.uuid4().hex
        self._log = folder / f"rl-{self.mark[:6]}.log"
        env = {**os.environ, MARK: self.mark, "OMP_NUM_THREADS": "1"}
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(
                [python, "-m", module, *args],
                cwd=cwd or folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def output(self) -> str:
        return self._log.read_text()

    def processes(self) -> list[psutil.Process]:
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def find(self, word: str, *, but: str = "\0") -> psutil.Process:
        """The one process whose command line has `word` and not `but`."""
        (found,) = [p for p in self.processes() if (line := " ".join(p.cmdline())) and word in line and but not in line]
        return found

    def wait(self, timeout_s: float = 180) -> int:
        return self.process.wait(timeout_s)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 120) -> None:
        """Wait for a condition; fails with the output of `rl` when it ends before, or when it takes too long."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"rl ended with {self.process.returncode}:\n{self.output()}"
            assert time.monotonic() < deadline, f"waited {timeout_s} s in vain:\n{self.output()}"
            time.sleep(0.05)

    def kill_everything(self) -> None:
        while left := self.processes():
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.05)
        self.process.wait()


@contextlib.contextmanager
def running(
    folder: Path, *args: str, cwd: Path | None = None, module: str = "turnwise.cli.rl", python: str = sys.executable
) -> Generator[Rl]:
    """`rl`, or another command, with these arguments; whatever it leaves is killed at the end of the block."""
    rl = Rl(folder, *args, cwd=cwd, module=module, python=python)
    try:
        yield rl
    finally:
        rl.kill_everything()


def write_config(folder: Path, model: Path, *, max_steps: int, max_staleness: int = 1, output: str = "run") -> Path:
    """A small run: two groups of two rollouts of two turns a step."""
    path = folder / "run.toml"
    path.write_text(TOML.format(output=output, model=model, max_steps=max_steps, max_staleness=max_staleness))
    return path


def finish(folder: Path, *args: str, cwd: Path | None = None, expect: int = 0, python: str = sys.executable) -> str:
    """Run `rl` to its end; returns its output."""
    with running(folder, *args, cwd=cwd, python=python) as rl:
        code = rl.wait()
        assert code == expect, f"exit code {code}:\n{rl.output()}"
        assert rl.processes() == []
        return rl.output()
