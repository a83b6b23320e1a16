"""Servers on this machine that a run starts itself: from a command, or from an image by the command `docker`."""

import atexit
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from turnwise.adapters.openenv.wire import OpenEnvError, get_json

PORT_IN_IMAGE = 8000  # where images of OpenEnv listen
POLL_S = 0.1
TAIL_CHARACTERS = 1000  # of the log, in an error
END_SEEN_S = 1.0  # between the end of a connection and that of its process
END_S = 20.0  # more than the guard's own grace and what it lets the clean-up take
RUN = secrets.token_hex(4)  # in names of containers: others with the same engine may be on another loopback, with equal ports


@dataclass(frozen=True)
class Launch:
    """What is started.

    Args:
        command: words of a command line; `{port}` stands for the port to listen on.
        log: file for what it prints; one in the folder for temporary files when not given.
        start_timeout_s: what it may take until its `/health` answers.
        cleanup: words of a command line that ends what may go on when the command was killed; also with `{port}`.
    """

    command: tuple[str, ...]
    log: str | None = None
    start_timeout_s: float = 60.0
    cleanup: tuple[str, ...] = ()


class LocalServer:
    """One process, alive until this one ends.

    Raises:
        OpenEnvError: it does not start, or is not healthy in time; the text ends with the end of its log.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = Path(launch.log or Path(tempfile.gettempdir()) / f"turnwise-openenv-{os.getpid()}-{port}.log")
        self.words, self.cleanup = (
            [word.replace("{port}", str(port)) for word in words] for words in (launch.command, launch.cleanup)
        )
        self._process = self._start()
        atexit.register(self.stop)
        self._await_health()

    def stop(self) -> None:
        """End it and all that it started."""
        atexit.unregister(self.stop)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(END_S)

    def check(self, grace_s: float = 0.0) -> None:
        """Raises OpenEnvError when the process has ended, or does within `grace_s` seconds."""
        with suppress(subprocess.TimeoutExpired):
            code = self._process.wait(grace_s)
            raise OpenEnvError(f"the OpenEnv server {' '.join(self.words)!r} ended with exit code {code}{self._tail()}")

    def _start(self) -> "subprocess.Popen[bytes]":
        places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        program = shutil.which(self.words[0], path=places)
        if program is None:
            why = "an id without args.command that is no URL is an image" if self.cleanup else "args.command"
            raise OpenEnvError(f"{why}: there is no program {self.words[0]!r}; give its path, or install it")
        guard = [sys.executable, "-m", "turnwise.adapters.openenv.guard", *self.cleanup, "--", program, *self.words[1:]]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            # in a session of its own: what ends the whole process group of a run must not end it before it has cleaned up
            return subprocess.Popen(guard, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def _await_health(self) -> None:
        limit_s = self.launch.start_timeout_s
        deadline = time.monotonic() + limit_s
        while True:
            self.check()
            try:
                get_json(f"{self.url}/health", timeout_s=max(POLL_S, deadline - time.monotonic()))
                return
            except OpenEnvError as error:
                if time.monotonic() > deadline:
                    self.stop()
                    words = f"the OpenEnv server {' '.join(self.words)!r} was not healthy within"
                    raise OpenEnvError(f"{words} args.start_timeout_s = {limit_s:g}: {error}{self._tail()}") from error
            time.sleep(POLL_S)

    def _tail(self) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace")[-TAIL_CHARACTERS:].strip()
        return f"; its log {self.log} ends with:\n{text}" if text else f"; its log {self.log} is empty"


def image_launch(image: str, log: str | None = None, start_timeout_s: float = 60.0) -> Launch:
    """Serves an image on the loopback interface, and removes its container at the end.

    `docker run` passes SIGTERM on to the server. When it is killed itself, because the server does not end, the container goes
    on; hence the clean-up.
    """
    name = f"turnwise-openenv-{RUN}-{{port}}"
    published = f"127.0.0.1:{{port}}:{PORT_IN_IMAGE}"
    command = ("docker", "run", "--rm", "--init", "--name", name, "--publish", published, image)
    return Launch(command, log, start_timeout_s, cleanup=("docker", "rm", "--force", "--volumes", name))


def local_url(launch: Launch) -> str:
    """The URL of the server of `launch`, started when it is first asked for and shared by this process.

    Raises:
        OpenEnvError: it does not start, or has ended: a server is started once in a run, so that a crash is seen.
    """
    with _LOCK:
        found = _SERVERS.get(launch)
        if found is None:
            try:
                found = LocalServer(launch)
            except OpenEnvError as error:
                found = error
            _SERVERS[launch] = found
    if isinstance(found, OpenEnvError):
        raise OpenEnvError(str(found)) from found
    found.check()
    return found.url


def end_of(launch: Launch) -> str | None:
    """How the server of `launch` ended, when it lately did; None where it did not."""
    found = _SERVERS.get(launch)
    if not isinstance(found, LocalServer):
        return None
    try:
        found.check(END_SEEN_S)
    except OpenEnvError as error:
        return str(error)
    return None


def stop_all() -> None:
    """End the servers of this process now."""
    with _LOCK:
        servers: Sequence[LocalServer | OpenEnvError] = list(_SERVERS.values())
        _SERVERS.clear()
    for server in servers:
        if isinstance(server, LocalServer):
            server.stop()


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


_LOCK = threading.Lock()
_SERVERS: dict[Launch, LocalServer | OpenEnvError] = {}
