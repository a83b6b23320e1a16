"""Where a worker of an engine, vLLM's or the embedded one, takes full weights that the trainer broadcasts."""

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from turnwise.transport import Manifest, Receiver
from turnwise.transport.broadcast import TIMEOUT_S

if TYPE_CHECKING:
    from torch import Tensor

Load = Callable[[Iterator[tuple[str, "Tensor"]]], None]


class WeightsInbox:
    """The worker's end of the broadcast. It stays open from version to version.

    Args:
        timeout_s: for the trainer and the other workers to come, and for each bucket, in seconds.
    """

    def __init__(self, *, timeout_s: float = TIMEOUT_S) -> None:
        self._receiver: Receiver | None = None
        self._timeout_s = timeout_s

    def take(self, rendezvous: str, folder: str, rank: int, load: Load) -> None:
        """Receive a version and hand its tensors to `load`, while the next ones are under way.

        Args:
            rendezvous: host:port of the trainer's store.
            folder: of the version, with its manifest.
            rank: of this worker among trainer and workers, from 1 on.
            load: reads names and tensors to their end, on the current stream.

        Raises:
            BroadcastError: the weights did not get through.
            OSError, ValueError: there is no manifest.
        """
        manifest = Manifest.read(Path(folder))
        if self._receiver is None or self._receiver.rendezvous != rendezvous:
            self.close()
            self._receiver = Receiver(rendezvous, rank=rank, manifest=manifest, timeout_s=self._timeout_s)
        with closing(self._receiver.receive(manifest)) as pairs:
            load(pairs)

    def close(self) -> None:
        """Leave the group, if there is one."""
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None
