"""The `rl` of one run: started in a session of its own, or taken over from a sweep that was killed while it went on."""

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import tomli_w

from turnwise.launch.child import tail
from turnwise.launch.run_folder import holds_run, is_held
from turnwise.launch.sweep.attempts import AttemptLog, Attempts, Mode
from turnwise.launch.sweep.plan import PlannedRun
from turnwise.transport import RunDir, write_atomic

RL = (sys.executable, "-m", "turnwise.cli.rl")
RL_WORDS = "rl: "  # how `rl` begins a line about why it does not start


class RunProcess:
    """An `rl` at work.

    Args:
        run: what it does.
        process: as this sweep started it; None for one that an earlier sweep did, known by `attempts`.
    """

    def __init__(self, run: PlannedRun, process: "subprocess.Popen[bytes] | None", attempts: Attempts) -> None:
        self.run = run
        self._process = process
        self._attempts = attempts

    @property
    def adopted(self) -> bool:
        return self._process is None

    def over(self) -> bool:
        """Whether `rl` and everything that it started have ended."""
        if self._process is not None and self._process.poll() is None:
            return False
        return not is_held(self.run.folder) and not (self.adopted and alive(self._attempts))

    @property
    def exit_code(self) -> int | None:
        """None while it runs, and for one that was taken over."""
        return None if self._process is None else self._process.poll()

    def interrupt(self) -> bool:
        """Ask for a checkpoint and the end, as Ctrl-C does; a second time, for the end at once. False if nobody can be asked."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGINT)
            return True
        if not alive(self._attempts) or self._attempts.pid is None:
            return False
        psutil.Process(self._attempts.pid).send_signal(signal.SIGINT)
        return True


def start(run: PlannedRun, mode: Mode, place: Sequence[int] | None, root: Path, rl: Sequence[str] = RL) -> RunProcess:
    """Start `rl` for a run; its output goes to `logs/<label>.log` of the sweep at `root`.

    Raises:
        OSError: the file system refused, or there is no such program.
    """
    file, log = root / "configs" / f"{run.label}.toml", root / "logs" / f"{run.label}.log"
    if mode != "resume" or not file.exists():
        write_atomic(file, tomli_w.dumps(run.tables).encode())
    argv = [*rl, *arguments(run, mode, place, file)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        output.write(f"\n$ {shlex.join(argv)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    gpus = sorted({gpu for part in run.gpus_on(place).values() for gpu in part})
    attempts = AttemptLog(run.folder)
    attempts.started(pid=process.pid, created=psutil.Process(process.pid).create_time(), mode=mode, gpus=gpus)
    return RunProcess(run, process, attempts.read())


def arguments(run: PlannedRun, mode: Mode, place: Sequence[int] | None, file: Path) -> list[str]:
    """What `rl` is told: the run's configuration, and where it runs this time."""
    words = ["@", str(file), "--plain"]
    words += {"new": [], "resume": ["--resume"], "rerun": ["--clean"]}[mode]
    for part, gpus in run.gpus_on(place).items():
        words += [f"--gpus.{part}", json.dumps(gpus)] if gpus else []  # a run that is gone on with may have had others
    return words


def next_mode(run: PlannedRun, when_ended_early: Mode) -> Mode:
    """How the run is started next: a folder that holds no run, or none that could be gone on with, begins anew."""
    if not holds_run(run.folder):
        return "new"
    return when_ended_early if RunDir(run.folder).config.is_file() else "rerun"


def alive(attempts: Attempts) -> bool:
    """Whether the process of the last start still runs; another one that got its number meanwhile does not count."""
    if attempts.pid is None:
        return False
    try:
        process = psutil.Process(attempts.pid)
        return process.create_time() == attempts.pid_created and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def last_words(root: Path, label: str) -> str:
    """Why `rl` would not start, from its log: all of its last complaint."""
    lines = tail(root / "logs" / f"{label}.log", 200)
    since = max((at for at, line in enumerate(lines) if line.startswith("$ ")), default=0)
    complaint = max((at for at, line in enumerate(lines) if at > since and line.startswith(RL_WORDS)), default=None)
    if complaint is None:
        return lines[-1] if len(lines) > since + 1 else "it said nothing"
    return " ".join(line.strip() for line in lines[complaint:]).removeprefix(RL_WORDS)
