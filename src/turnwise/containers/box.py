"""A leased container: commands in a shell that stays, files in and out, and what ended a command told apart."""

import shlex
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import PurePosixPath
from typing import IO

from turnwise.config.containers import ContainersConfig
from turnwise.containers.archive import ENTRY_OVERHEAD, Content, pack, unpack
from turnwise.containers.channel import CHUNK
from turnwise.containers.errors import ContainerGone, EngineDown, TransferRefused
from turnwise.containers.shell import Reply, Shell, Stop, quote
from turnwise.containers.spec import DATA, HOME, Cell, Counters, Process, Spec

TRANSFER_S = 120.0
MAX_FILES = 10_000
NO_SUCH_FILE = 44  # exit status of our own script
ERROR_BYTES = 2048


class Ending(StrEnum):
    """How a command ended."""

    OK = "ok"  # exit status 0
    FAILED = "failed"  # another one
    TIMEOUT = "timeout"  # past its deadline, so everything in the container was killed
    OOM = "oom"  # a process was killed because the container's memory was full
    PIDS = "pids"  # a process was refused because the container has its most, so everything in it was killed
    FLOOD = "flood"  # more output than anybody reads, so everything in the container was killed


@dataclass(frozen=True)
class CommandResult:
    """What a command did."""

    ending: Ending
    exit_code: int | None  # None where the command was killed, or took the shell with it in a way that left no status
    output: str  # stdout and stderr in the order of writing; undecodable bytes replaced
    cut: int  # bytes left out of the middle of the output
    seconds: float
    new_session: bool  # the next command starts in a new shell: folder and variables are lost, files are not


class Box:
    """One container for one rollout. Commands run one at a time; `close` may come from another thread."""

    def __init__(self, cell: Cell, spec: Spec, config: ContainersConfig):
        self.spec = spec
        self._cell, self._config = cell, config
        self._using = threading.Lock()
        self._session: tuple[Process, Shell] | None = None
        self._closed = False

    @property
    def gpus(self) -> tuple[str, ...]:
        """GPUs that this container alone may use."""
        return self.spec.gpus

    def run(self, command: str, *, timeout_s: float | None = None, max_bytes: int | None = None) -> CommandResult:
        """Run a command in the container's shell, in which folder and variables stay from one command to the next.

        Args:
            command: in the language of the image's shell; reads nothing from its input.
            timeout_s: seconds; `containers.command_timeout_s` when None.
            max_bytes: how much of the output to keep; `containers.output_bytes` when None.

        Raises:
            ContainerGone: the container ended, and not by what ran in it.
            EngineDown: its engine does not answer.
            ValueError: a NUL in the command.
        """
        started = time.monotonic()
        timeout_s = self._config.command_timeout_s if timeout_s is None else timeout_s
        max_bytes = self._config.output_bytes if max_bytes is None else max_bytes
        quote(command)
        with self._using:
            before = self._cell.counters()
            process, reply = self._attempt(command, timeout_s, max_bytes)
            if not reply.began:  # the shell was killed or broken between two commands, or the process limit let none begin
                self._renew()
                process, reply = self._attempt(command, timeout_s, max_bytes)
            ending, code = self._judge(process, reply, before)
            if reply.stop is not Stop.END or ending is Ending.PIDS:
                self._renew()
        return CommandResult(
            ending, code, reply.output.decode(errors="replace"), reply.cut, time.monotonic() - started, self._session is None
        )

    def _attempt(self, command: str, timeout_s: float, max_bytes: int) -> tuple[Process, Reply]:
        self._require()
        if self._session is None:
            process = self._cell.open()
            self._session = (process, Shell(process))
        process, shell = self._session
        flood_bytes = self._config.flood_bytes
        return process, shell.run(command, timeout_s=timeout_s, max_bytes=max_bytes, flood_bytes=flood_bytes)

    def _judge(self, process: Process, reply: Reply, before: Counters) -> tuple[Ending, int | None]:
        if reply.stop is Stop.FLOOD:
            return Ending.FLOOD, None
        if reply.exit_code == 0:
            return Ending.OK, 0
        try:
            now = self._cell.counters()
        except ContainerGone:
            if self._cell.fate().oom:
                return Ending.OOM, None
            raise
        if reply.stop is Stop.TIMEOUT:
            # a shell that cannot fork waits and tries again
            return (Ending.PIDS if now.pids > before.pids else Ending.TIMEOUT), None
        code = reply.exit_code if reply.stop is Stop.END else process.exit_code()
        if code == 0:
            return Ending.OK, code
        if now.oom > before.oom:
            return Ending.OOM, code
        return (Ending.PIDS if now.pids > before.pids else Ending.FAILED), code

    def _renew(self) -> None:
        """End the shell and everything that runs; the next command gets a new one."""
        session, self._session = self._session, None
        if session is not None:
            session[1].close()
        self._require()
        self._cell.sweep()

    def warm_up(self) -> None:
        """Open the shell, so that the first command waits for nothing. Raises as `run` does."""
        result = self.run(":")
        if result.ending is not Ending.OK:
            raise ContainerGone(f"the shell of the new container does not work ({result.ending}): {result.output[:ERROR_BYTES]}")

    def put(
        self, files: Mapping[str, Content], into: str = HOME, *, protected: bool = False, timeout_s: float = TRANSFER_S
    ) -> None:
        """Write files.

        Args:
            files: content by path relative to `into`; a Path is a file or a folder of this machine.
            into: a folder, which is made where it is missing.
            protected: below DATA, where the task can read files and not change them.
            timeout_s: seconds for all of them.

        Raises:
            TransferRefused: no room, no such folder, not in time.
            ValueError: a path leads out of `into`, or protected files are not below DATA.
        """
        if protected and PurePosixPath(DATA) not in (PurePosixPath(into), *PurePosixPath(into).parents):
            raise ValueError(f"protected files lie below {DATA}, and {into} does not")
        with pack(files) as packed:
            size = packed.tell()
            packed.seek(0)
            folder = shlex.quote(into)
            # what tar does not read is read by cat, so that the shell never takes it for commands
            script = f"mkdir -p {folder} && head -c {size} | {{ tar -xof - -C {folder}; code=$?; cat >/dev/null; exit $code; }}"
            reply = self._transfer(script, ERROR_BYTES, timeout_s, root=protected, stdin=packed)
        if reply.exit_code:
            said = reply.output.decode(errors="replace").strip()
            raise TransferRefused(f"{size} bytes of files did not get into {into}: {said or f'status {reply.exit_code}'}")

    def get(self, path: str, *, max_bytes: int | None = None, timeout_s: float = TRANSFER_S) -> dict[str, bytes]:
        """Take out a file, or a folder with all below it: content by path, relative to the folder in which `path` lies.

        Raises:
            TransferRefused: nothing there, a link, a device, more than `max_bytes` (`containers.transfer_bytes` when None), not
                in time.
        """
        limit = self._config.transfer_bytes if max_bytes is None else max_bytes
        whole = PurePosixPath(path)
        if not whole.is_absolute() or ".." in whole.parts or not whole.name:
            raise ValueError(f"{path!r} is no path of a file in the container; give an absolute one without '..'")
        folder, name = shlex.quote(str(whole.parent)), shlex.quote(f"./{whole.name}")
        script = (
            f"cd {folder} 2>/dev/null && [ -e {name} -o -L {name} ] || exit {NO_SUCH_FILE}; exec tar -cf - {name} 2>/dev/null"
        )
        most = limit + ENTRY_OVERHEAD * MAX_FILES
        reply = self._transfer(f"({script})", most, timeout_s)
        if reply.exit_code == NO_SUCH_FILE:
            raise TransferRefused(f"there is no {path}")
        if reply.exit_code or reply.cut:
            why = f"more than {most} bytes" if reply.cut else f"tar ended with {reply.exit_code}"
            raise TransferRefused(f"{path} was not taken out: {why}")
        return unpack(reply.output, max_bytes=limit, max_files=MAX_FILES)

    def read(self, path: str, *, max_bytes: int | None = None) -> bytes:
        """One regular file. Raises TransferRefused as `get` does, and for a folder."""
        files = self.get(path, max_bytes=max_bytes)
        name = PurePosixPath(path).name
        if name not in files:
            raise TransferRefused(f"{path} is no regular file")
        return files[name]

    def _transfer(self, script: str, kept: int, timeout_s: float, *, root: bool = False, stdin: IO[bytes] | None = None) -> Reply:
        """Run a script of ours in a shell of its own, which no command of the task has touched."""
        with self._using:
            reply = self._in_own_shell(script, kept, timeout_s, root, stdin)
            if not reply.began:  # the process limit let no shell begin
                self._renew()
                reply = self._in_own_shell(script, kept, timeout_s, root, stdin)
            if reply.stop is Stop.END:
                return reply
            self._renew()
        why = {
            Stop.TIMEOUT: f"not done after {timeout_s:g} s",
            Stop.FLOOD: f"more than {kept} bytes",
            Stop.EOF: "its process was killed",
        }
        raise TransferRefused(f"the transfer was broken off: {why[reply.stop]}")

    def _in_own_shell(self, script: str, kept: int, timeout_s: float, root: bool, stdin: IO[bytes] | None) -> Reply:
        self._require()
        process = self._cell.open(root=root)
        chunks = None if stdin is None else _chunks(stdin)
        try:
            return Shell(process).run(script, timeout_s=timeout_s, max_bytes=kept, flood_bytes=kept + CHUNK, stdin=chunks)
        finally:
            process.close()

    def _require(self) -> None:
        if self._closed:
            raise ContainerGone("the lease of this container has ended")

    def healthy(self) -> bool:
        """Whether it still answers."""
        try:
            self._cell.counters()
        except (ContainerGone, EngineDown):
            return False
        return True

    def close(self) -> None:
        """End and remove the container. Raises EngineDown when that is not certain; then call again later."""
        self._closed = True
        session = self._session
        if session is not None:
            session[1].close()
        self._cell.destroy()


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    file.seek(0)
    while chunk := file.read(CHUNK):
        yield chunk
