"""The batch log: `batches/step_N.msgpack`, the one truth about which rollout went into which step."""

from pathlib import Path

import msgspec

from turnwise.transport.files import write_atomic
from turnwise.transport.messages import Batch


class BatchLog:
    """Batches of a run as files. The orchestrator appends; the trainer reads in order, again after a resume."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, step: int) -> Path:
        return self.root / f"step_{step}.msgpack"

    def write(self, batch: Batch) -> None:
        """Append a batch.

        Raises:
            FileExistsError: the log has a batch of that step already.
            OSError: the file system refused; the log is as before.
        """
        path = self.path(batch.step)
        if path.exists():
            raise FileExistsError(f"{path} exists already: a batch is written once")
        write_atomic(path, msgspec.msgpack.encode(batch))

    def read(self, step: int) -> Batch:
        """Raises ValueError when the file is not a batch, FileNotFoundError when it is not there."""
        path = self.path(step)
        try:
            return msgspec.msgpack.decode(path.read_bytes(), type=Batch)
        except msgspec.DecodeError as error:
            raise ValueError(f"{path} is not a batch of this version of turnwise: {error}") from error

    def steps(self) -> list[int]:
        """Steps that have a batch, ascending."""
        numbers = (path.stem.removeprefix("step_") for path in self.root.glob("step_*.msgpack"))
        return sorted(int(number) for number in numbers if number.isdigit())
