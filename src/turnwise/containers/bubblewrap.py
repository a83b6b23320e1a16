"""Where there is no engine: bubblewrap, weaker on purpose of use and honest about it.

What holds as with Docker: no network, another process tree, no capabilities, a read-only root, deadlines (a sandbox dies with its
first process, setsid or not), framing, bounded output, transfers. What does not: memory is limited for each process (RLIMIT_AS)
and not for all of them together; the number of processes and CPU time are not limited; files lie in a folder of the host, where
only each single one is limited; a limit that was hit shows as a failed command; there is no seccomp filter between the model's
code and the kernel; and nothing but the deadline ends a fork bomb.
"""

import logging
import os
import resource
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from turnwise.config.containers import ContainersConfig, LimitsConfig
from turnwise.containers.breaker import Breaker
from turnwise.containers.channel import PipeChannel
from turnwise.containers.errors import ContainerError, EngineDown, ImageMissing
from turnwise.containers.owner import Owner
from turnwise.containers.recipes import recipes, unpacked
from turnwise.containers.spec import DATA, ENVIRONMENT, HOME, Counters, Fate, Process, Spec

log = logging.getLogger(__name__)

MIB = 2**20
HOST_IMAGE = "host"  # this machine's own programs
HOST_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/alternatives", "/etc/ssl", "/etc/ld.so.cache")
OWNER_FILE = "owner"
PREFIX = "turnwise-box-"
EXIT_WAIT_S = 2.0


class SandboxedProcess(PipeChannel):
    """A shell in a sandbox of its own over the folders of its cell."""

    def close(self) -> None:
        """Kill the sandbox from the inside first: bubblewrap then buries its child, which nobody else might do."""
        with suppress(OSError):  # it may have ended
            outer = self.process.pid
            for child in Path(f"/proc/{outer}/task/{outer}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(EXIT_WAIT_S)
        super().close()

    def exit_code(self) -> int | None:
        """Its status, as a shell counts it: 128 and the signal for one that was killed."""
        try:
            status = self.process.wait(EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            return None
        return 128 - status if status < 0 else status


class BubblewrapCell:
    """Folders of the host, and sandboxes over them."""

    def __init__(self, spec: Spec, command: list[str], shell: str):
        self._limits, self._command, self._shell = spec.limits, command, shell
        self._folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        (self._folder / OWNER_FILE).write_text(Owner.me().label())
        for name in ("home", "tmp", "data"):
            (self._folder / name).mkdir()
        self._open: list[SandboxedProcess] = []

    def open(self, *, root: bool = False) -> Process:
        data = "--bind" if root else "--ro-bind"
        binds = ["--bind", "home", HOME, "--bind", "tmp", "/tmp", data, "data", DATA]
        binds = [str(self._folder / part) if part in ("home", "tmp", "data") else part for part in binds]
        try:
            process = subprocess.Popen(
                [*self._command, *binds, "--remount-ro", "/", "--chdir", HOME, "--", self._shell],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                bufsize=0,
                start_new_session=True,
                preexec_fn=lambda: _limit(self._limits),
            )
        except OSError as error:
            raise EngineDown(f"bubblewrap does not start: {error}") from error
        opened = SandboxedProcess(process)
        self._open = [other for other in self._open if other.process.poll() is None]
        self._open.append(opened)
        return opened

    def sweep(self) -> None:
        while self._open:
            self._open.pop().close()

    def counters(self) -> Counters:
        return Counters()

    def fate(self) -> Fate:
        return Fate(running=self._folder.exists(), oom=False)

    def destroy(self) -> None:
        self.sweep()
        shutil.rmtree(self._folder, ignore_errors=True)


def _limit(limits: LimitsConfig) -> None:
    """In the new process, before it becomes bubblewrap."""
    memory = limits.memory_mib * MIB
    for kind, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, limits.home_mib * MIB),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


class BubblewrapHost:
    """This machine, without an engine."""

    name = "bubblewrap"
    has_gpus = False  # devices are not passed through

    def __init__(self, config: ContainersConfig, breaker: Breaker):
        self.breaker, self.capacity, self.starts = breaker, config.max_containers, config.starts
        if config.network != "none":
            raise ContainerError(f"containers.network = {config.network!r} needs an engine; bubblewrap gives no network at all")

    def prepare(self, image: str) -> None:
        if shutil.which("bwrap") is None:
            raise EngineDown("bwrap is not on the path; install bubblewrap, or use containers.backend = 'docker'")
        if image in recipes():
            unpacked(image)
        elif image != HOST_IMAGE:
            raise ImageMissing(f"bubblewrap has no image {image!r}; name a recipe ({', '.join(recipes())}) or {HOST_IMAGE!r}")

    def start(self, spec: Spec) -> BubblewrapCell:
        command = [
            "bwrap",
            "--unshare-all",
            "--die-with-parent",
            "--new-session",
            "--cap-drop",
            "ALL",
            "--uid",
            "1000",
            "--gid",
            "1000",
        ]
        if spec.image == HOST_IMAGE:
            for folder in HOST_FOLDERS:
                command += ["--ro-bind-try", folder, folder]
            shell = "/bin/sh"
        else:
            command += ["--ro-bind", str(unpacked(spec.image)), "/"]
            shell = recipes()[spec.image].shell_path
        command += ["--proc", "/proc", "--dev", "/dev", "--clearenv", "--hostname", "box"]
        for name, value in ENVIRONMENT.items():
            command += ["--setenv", name, value]
        return BubblewrapCell(spec, command, shell)

    def remove_orphans(self) -> int:
        removed = 0
        for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            try:
                owner = Owner.parse((folder / OWNER_FILE).read_text())
            except OSError:  # being made or removed, or somebody else's
                continue
            if owner is not None and owner.is_dead() and folder.stat().st_uid == os.getuid():
                shutil.rmtree(folder, ignore_errors=True)
                removed += 1
        return removed

    def close(self) -> None:
        """Nothing is kept open."""
