"""One Docker engine through the SDK: its errors become ours, its hijacked sockets become channels."""

import logging
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import docker
import docker.errors
import docker.tls
import docker.utils
import requests

from turnwise.config.containers import HostConfig
from turnwise.containers.channel import SocketChannel
from turnwise.containers.errors import ContainerError, ContainerGone, EngineDown, RecipeFailed

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 60
IMPORT_TIMEOUT_S = 900  # an engine says nothing while it takes in an image
POOL_SIZE = 64  # connections kept for threads that call at the same time
TUNNEL_START_S = 30
EXIT_WAIT_S = 2.0  # the output of a process ends a little before the engine knows its status
DEFAULT_SOCKET = "/var/run/docker.sock"
SERVER_ERROR, CONFLICT = 500, 409


class Client(docker.APIClient):
    """The SDK's client, deaf to the environment: requests would let REQUESTS_CA_BUNDLE win over an engine's own authority."""

    trust_env: Any = property(lambda self: False, lambda self, value: None)


class Tunnel:
    """An engine's socket on another machine, forwarded over one ssh connection to a socket here."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        self._folder = Path(tempfile.mkdtemp(prefix="turnwise-ssh-"))
        self.socket = self._folder / "docker.sock"
        host = f"{parts.username}@{parts.hostname}" if parts.username else str(parts.hostname)
        port = ["-p", str(parts.port)] if parts.port else []
        options = ["BatchMode=yes", "ExitOnForwardFailure=yes", "ServerAliveInterval=15", "ServerAliveCountMax=3"]
        command = ["ssh", "-N", *port, *(part for option in options for part in ("-o", option))]
        command += ["-L", f"{self.socket}:{parts.path if len(parts.path) > 1 else DEFAULT_SOCKET}", "--", host]
        with (self._folder / "log").open("wb") as written:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=written, stderr=written, start_new_session=True
            )
        deadline = time.monotonic() + TUNNEL_START_S
        while not self.socket.exists():
            if not self.alive or time.monotonic() > deadline:
                said = (self._folder / "log").read_text(errors="replace").strip()[-500:]
                self.close()
                raise EngineDown(f"ssh to {host} made no connection: {said or 'no answer'}")
            time.sleep(0.02)

    @property
    def alive(self) -> bool:
        """Whether ssh still runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End ssh and remove the socket."""
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


class ExecProcess(SocketChannel):
    """A process that the engine started in a container."""

    def __init__(self, engine: "Engine", exec_id: str, stream: Any):
        super().__init__(*_raw(stream))
        self._engine, self._exec_id = engine, exec_id

    def exit_code(self) -> int | None:
        """Its status; None while the engine still counts it as running."""
        deadline = time.monotonic() + EXIT_WAIT_S
        while True:
            with self._engine.call() as api:
                seen = api.exec_inspect(self._exec_id)
            if not seen["Running"]:
                return seen["ExitCode"]
            if time.monotonic() > deadline:
                return None
            time.sleep(0.01)


class Engine:
    """A connection to an engine, made at the first call and anew after it broke. Thread-safe."""

    def __init__(self, config: HostConfig | None):
        """`config` None: the engine that the environment names (DOCKER_HOST), or the local one."""
        self._config = config
        self._lock = threading.Lock()
        self._client: Any = None
        self._tunnel: Tunnel | None = None
        self.name = config.url if config else str(docker.utils.kwargs_from_env().get("base_url", f"unix://{DEFAULT_SOCKET}"))

    @property
    def is_local(self) -> bool:
        """Whether it runs on this machine, so that GPU numbers mean the same there."""
        return self.name.startswith(("unix://", "http+unix://"))

    def _api(self) -> Any:
        with self._lock:
            if self._tunnel is not None and not self._tunnel.alive:
                self._disconnect()
            if self._client is None:
                self._client = self._connect()
            return self._client

    def _connect(self, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        common: dict[str, Any] = {"version": "auto", "timeout": timeout_s, "max_pool_size": POOL_SIZE}
        config = self._config
        if config is None:
            named: dict[str, Any] = {**docker.utils.kwargs_from_env(), **common}
            return Client(**named)
        if config.url.startswith("ssh://"):
            if self._tunnel is None:
                self._tunnel = Tunnel(config.url)
            return Client(f"unix://{self._tunnel.socket}", **common)
        tls: Any = False
        if config.tls_ca and config.tls_cert and config.tls_key:
            client = (str(config.tls_cert), str(config.tls_key))
            tls = docker.tls.TLSConfig(client_cert=client, ca_cert=str(config.tls_ca), verify=True)
        return Client(config.url, tls=tls, **common)

    @contextmanager
    def call(self) -> Generator[Any]:
        """The SDK's low-level client for one call, its errors translated.

        Raises EngineDown when the engine does not answer or fails, ContainerGone when the container of the call is not there or
        does not run, ContainerError when the engine refuses.
        """
        try:
            yield self._api()
        except docker.errors.NotFound as error:
            raise ContainerGone(f"{self.name}: {error.explanation}") from error
        except docker.errors.APIError as error:
            said = f"{self.name}: {error.explanation or error}"
            if error.status_code == CONFLICT:
                raise ContainerGone(said) from error
            raise (EngineDown(said) if (error.status_code or SERVER_ERROR) >= SERVER_ERROR else ContainerError(said)) from error
        except (docker.errors.DockerException, requests.RequestException, OSError) as error:
            raise EngineDown(f"{self.name} does not answer: {error}") from error

    def attach(self, container: str) -> SocketChannel:
        """The streams of a container's first process; ask before it starts."""
        with self.call() as api:
            return SocketChannel(*_raw(api.attach_socket(container, params={"stdin": 1, "stdout": 1, "stderr": 1, "stream": 1})))

    def execute(self, container: str, command: list[str], *, user: str, workdir: str) -> ExecProcess:
        """Start a process that waits for input: what it prints at once could be lost with the answer's headers."""
        with self.call() as api:
            made = api.exec_create(container, command, stdin=True, user=user, workdir=workdir)
            return ExecProcess(self, made["Id"], api.exec_start(made["Id"], socket=True))

    def image_labels(self, image: str) -> Mapping[str, str] | None:
        """Labels of an image; None when the engine has no such image. Never pulls."""
        with self.call() as api:
            try:
                return api.inspect_image(image)["Config"].get("Labels") or {}
            except docker.errors.ImageNotFound:
                return None

    def import_image(self, source: Path, repository: str, tag: str, labels: Mapping[str, str], setup: str) -> None:
        """Make an image of a tar archive, and run `setup` in it once, as root without network or capabilities.

        Raises EngineDown, and RecipeFailed when `setup` fails.
        """
        changes = [f"LABEL {key}={value}" for key, value in labels.items()]
        raw = f"{tag}-raw" if setup else tag
        with self.call() as _, closing(self._connect(IMPORT_TIMEOUT_S)) as api:
            with source.open("rb") as file:
                api.import_image(file, repository, raw, changes=changes)
            if not setup:
                return
            limits = api.create_host_config(network_mode="none", cap_drop=["ALL"], security_opt=["no-new-privileges"])
            made = api.create_container(f"{repository}:{raw}", ["/bin/sh", "-c", setup], host_config=limits)["Id"]
            try:
                api.start(made)
                status = api.wait(made)["StatusCode"]
                if status:
                    raise RecipeFailed(
                        f"the set-up of {repository} ended with {status}: {api.logs(made, tail=20).decode(errors='replace')}"
                    )
                api.commit(made, repository, tag, changes="\n".join(changes))
            finally:
                api.remove_container(made, force=True)
                api.remove_image(f"{repository}:{raw}", noprune=True)

    def close(self) -> None:
        """Let go of all connections."""
        with self._lock:
            self._disconnect()

    def _disconnect(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        if self._tunnel is not None:
            self._tunnel.close()
            self._tunnel = None


def _raw(stream: Any) -> tuple[Any, Any]:
    """The socket under the SDK's answer to a hijacking call, and what else has to be closed with it."""
    response = stream._response

    def release() -> None:
        response.close()
        stream.close()

    return getattr(stream, "_sock", stream), release
