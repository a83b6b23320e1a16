"""What `containers.py` counts and compares with: this process, the engine's, a raw exec of the SDK, a shell of the host."""

import gc
import os
import socket
import struct
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import docker

from turnwise.containers.owner import OWNER_LABEL, Owner

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
SHIM = b"containerd-shim"
MARK = b"done 0\n"


def mine(api: Any) -> list[str]:
    """Ids of this process's containers, running or not."""
    found = api.containers(all=True, filters={"label": f"{OWNER_LABEL}={Owner.me().label()}"})
    return [container["Id"] for container in found]


class EngineProcesses:
    """The processes of an engine of this machine, found from its socket; needs the right to look at them."""

    def __init__(self, url: str):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(url.removeprefix("unix://"))
            credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        self.daemon = struct.unpack("3i", credentials)[0]

    def shims(self, containers: list[str]) -> list[int]:
        """The process that the engine keeps beside each container."""
        wanted = {container.encode() for container in containers}
        return [pid for pid in _pids() if SHIM in (words := _words(pid))[0] and wanted & set(words)]

    def cpu_s(self, containers: list[str]) -> float:
        """CPU time so far of the daemon, its children, and the shims of these containers."""
        return sum(map(_cpu_s, [self.daemon, *_children(self.daemon), *self.shims(containers)]))

    def counts(self) -> dict[str, int]:
        """What could leak there."""
        return {
            "engine files": len(os.listdir(f"/proc/{self.daemon}/fd")),
            "engine MiB": _status_kib(self.daemon, "VmRSS") // 1024,
        }

    def shim_mib(self, containers: list[str]) -> float:
        """Memory of a container's shim, MiB; pages that shims share are divided among them."""
        shims = self.shims(containers)
        return sum(_proportional_kib(pid) for pid in shims) / 1024 / max(1, len(shims))


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _words(pid: int) -> list[bytes]:
    with suppress(OSError):  # it has ended
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return [b""]


def _children(pid: int) -> list[int]:
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            children += map(int, (task / "children").read_text().split())
    return children


def _cpu_s(pid: int) -> float:
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S
    return 0.0


def _status_kib(pid: int, key: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def _proportional_kib(pid: int) -> int:
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return 0


def census(api: Any, engine: EngineProcesses) -> dict[str, int]:
    """What this process and its engine hold of what could leak."""
    gc.collect()
    links: list[str] = []
    for entry in os.scandir("/proc/self/fd"):
        with suppress(OSError):  # the one that lists
            links.append(os.readlink(entry.path))
    return {
        "containers": len(mine(api)),
        "sockets": sum(link.startswith("socket:") for link in links),
        "files": len(links),
        "threads": threading.active_count(),
        "own MiB": _status_kib(os.getpid(), "VmRSS") // 1024,
        **engine.counts(),
    }


def container_mib(api: Any, container: str) -> float:
    """Memory that the kernel counts for a container, MiB."""
    return api.stats(container, stream=False, one_shot=True)["memory_stats"]["usage"] / 2**20


class RawContainer:
    """A container as the SDK alone makes and uses it: created, started, one exec for each command."""

    def __init__(self, api: Any, image: str):
        self._api = api
        self.id: str = api.create_container(
            image,
            ["sh"],
            stdin_open=True,
            user="1000:1000",
            labels={OWNER_LABEL: Owner.me().label()},  # so that the next run removes it should this one be killed
            host_config=api.create_host_config(network_mode="none", read_only=True, log_config={"Type": "none"}),
        )["Id"]
        api.start(self.id)

    def run(self, command: str) -> None:
        """Run a command and learn its status."""
        raw_exec(self._api, self.id, command)

    def remove(self) -> None:
        self._api.remove_container(self.id, force=True, v=True)


def raw_exec(api: Any, container: str, command: str) -> None:
    """A command by the SDK alone: three calls and a new process."""
    made = api.exec_create(container, ["sh", "-c", command], user="1000:1000")["Id"]
    api.exec_start(made)
    status = api.exec_inspect(made)["ExitCode"]
    if status:
        raise RuntimeError(f"{command!r} ended with {status}")


def raw_client(url: str) -> Any:
    """The SDK's own client, with a connection for each of many threads."""
    return docker.APIClient(url, version="auto", max_pool_size=128)


class HostShell:
    """A shell of this machine that stays: the least that a command in a shell can cost."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(["sh"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)

    def run(self, command: str) -> None:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(f"{command}; echo done $?\n".encode())
        read = b""
        while not read.endswith(MARK):
            if not (more := stdout.read(1 << 16)):
                raise RuntimeError(f"the shell ended: {read!r}")
            read += more

    def close(self) -> None:
        self._process.communicate()
