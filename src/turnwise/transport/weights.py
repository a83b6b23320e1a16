"""Published policy versions: `weights/v{n}/`, announced by the `ready.json` inside, acknowledged by `weights/served.json`."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec

from turnwise.transport.files import atomic_dir, write_atomic
from turnwise.transport.messages import Served, WeightsReady

READY = "ready.json"
CLAIM = "claim.json"


def adapter_name(version: int) -> str:
    """Name under which engines serve a LoRA version: one name a version, since prefix caches are keyed by it."""
    return f"v{version}"


class WeightsStore:
    """The folder of published versions."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, version: int) -> Path:
        return self.root / adapter_name(version)

    def publish(self, ready: WeightsReady, fill: Callable[[Path], None]) -> None:
        """Write the version's files by `fill(folder)` and announce them, both at once.

        They are not synced to the disk: a run that goes on after a power failure publishes anew, from its checkpoint.

        Raises:
            OSError: the file system refused; no part of the version is visible.
        """
        with atomic_dir(self.path(ready.version), durable=False) as draft:
            fill(draft)
            (draft / READY).write_bytes(msgspec.json.encode(ready))

    def poll(self, version: int) -> WeightsReady | None:
        """The announcement of a version, or None while it is not there."""
        try:
            content = msgspec.json.decode((self.path(version) / READY).read_bytes())
        except FileNotFoundError:
            return None
        metrics = content["metrics"]  # JSON has no NaN, it comes as null: a step whose loss is NaN must still be announced
        content["metrics"] = {name: math.nan if value is None else value for name, value in metrics.items()}
        return msgspec.convert(content, WeightsReady)

    def claim_path(self, version: int) -> Path:
        """The file for which the sender of a broadcast waits."""
        return self.path(version) / CLAIM

    def claim(self, version: int) -> None:
        """Say that all engines are paused and about to receive a version that travels by broadcast."""
        write_atomic(self.claim_path(version), b"{}")

    def versions(self) -> list[int]:
        """Published versions that are still there, ascending."""
        numbers = (path.parent.name[1:] for path in self.root.glob(f"v*/{READY}"))
        return sorted(int(number) for number in numbers if number.isdigit())

    def acknowledge(self, served: Served) -> None:
        write_atomic(self.root / "served.json", msgspec.json.encode(served))

    def served(self) -> int:
        """Newest version that engines serve; 0, the initial weights, before any was."""
        path = self.root / "served.json"
        return msgspec.json.decode(path.read_bytes(), type=Served).version if path.exists() else 0

    def prune(self, keep: int) -> None:
        """Remove versions that are neither served nor among the `keep` newest up to the served one."""
        served = self.served()
        for version in self.versions():
            if version <= served - max(keep, 1):
                self._remove(version)

    def forget_after(self, version: int) -> None:
        """Remove versions beyond `version`, of a lineage that a resume gave up, and broadcasts, whose sender is gone by then."""
        for known in self.versions():
            ready = self.poll(known)
            if known > version or (ready is not None and ready.transfer == "broadcast"):
                self._remove(known)
        if self.served() > version:
            self.acknowledge(Served(version))

    def _remove(self, version: int) -> None:
        """The announcement goes first: nobody finds a version of which files are missing."""
        (self.path(version) / READY).unlink(missing_ok=True)
        shutil.rmtree(self.path(version), ignore_errors=True)
