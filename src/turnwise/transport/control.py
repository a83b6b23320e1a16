"""How `rl` asks the processes of a run to end: a file, which works across hosts and without a terminal."""

from pathlib import Path
from typing import Literal

import msgspec

from turnwise.transport.files import write_atomic

StopKind = Literal["interrupted", "success", "abort", "failed"]


class StopRequest(msgspec.Struct, frozen=True):
    """Why the run ends before its last step."""

    kind: StopKind
    reason: str


class Control:
    """`control/stop.json` of a run folder."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "control" / "stop.json"

    def request_stop(self, kind: StopKind, reason: str) -> None:
        write_atomic(self.path, msgspec.json.encode(StopRequest(kind, reason)))

    def stop_request(self) -> StopRequest | None:
        """The request to end, or None."""
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=StopRequest)
        except FileNotFoundError:
            return None

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)
