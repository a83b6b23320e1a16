"""Docker engines for tests: the one that DOCKER_HOST names, and private ones that a test may kill."""

import gc
import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

from turnwise.containers.owner import OWNER_LABEL, Owner

SCRIPT = Path(__file__).parents[2] / "scripts" / "docker_engine.sh"


def shared_engine() -> str:
    """URL of the engine that these tests share. Raises RuntimeError when there is none."""
    url = os.environ.get("DOCKER_HOST")
    if not url:
        raise RuntimeError("DOCKER_HOST names no engine; run `make test-docker`, which starts one")
    return url


class PrivateEngine:
    """An engine of a test's own, on a short path, since a socket's may have 107 characters.

    Args:
        home: where it keeps its data.
        network: `bridge` for containers with an engine's usual network, in the network namespace of this engine.
    """

    def __init__(self, home: Path, network: str = "none"):
        self.home, self.network = home, network

    def inside(self) -> list[str]:
        """What to put before a command line that shall reach published ports."""
        return ["nsenter", f"--net=/proc/{(self.home / 'docker.pid').read_text()}/ns/net"]

    def _call(self, action: str) -> str:
        words = ["sh", str(SCRIPT), action, str(self.home), self.network]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(f"docker_engine.sh {action}: {done.stderr}")
        return done.stdout.strip()

    def start(self) -> str:
        """Start it; returns its URL."""
        return self._call("start")

    def kill(self) -> None:
        """End it without a word, as a crash would."""
        self._call("kill")

    def remove(self) -> None:
        """Stop it and delete its data."""
        self._call("stop")
        shutil.rmtree(self.home, ignore_errors=True)


def my_containers(api: Any) -> list[dict[str, Any]]:
    """Containers of this very process."""
    return api.containers(all=True, filters={"label": f"{OWNER_LABEL}={Owner.me().label()}"})


def census() -> dict[str, int]:
    """What this process holds of what could leak."""
    gc.collect()
    links = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.lexists(entry.path)]
    return {
        "files": len(links),
        "sockets": sum(link.startswith("socket:") for link in links),
        "threads": threading.active_count(),
    }
