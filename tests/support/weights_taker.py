"""The other end of a hand-over, without engines: claims each version that is announced, receives it and notes its digest."""

import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from turnwise.transport import Digest, Manifest, Receiver, Served, WeightsReady, WeightsStore

PATIENCE_S = 120.0


@dataclass
class WeightsTaker:
    """Orchestrator and engines of a run in a thread.

    `last` is the last version that is taken; `drop_at` one that is given up after its first tensor, and `at_drop` is called.
    """

    store: WeightsStore
    last: int
    first: int = 0
    drop_at: int | None = None
    at_drop: Callable[[], None] = lambda: None
    taken: dict[int, str] = field(default_factory=dict)  # digest by version
    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)  # type and shape in the last version
    error: Exception | None = None

    def follow(self) -> None:
        receiver: Receiver | None = None
        try:
            for version in range(self.first, self.last + 1):
                ready = self._announced(version)
                manifest = Manifest.read(Path(ready.path))
                assert (ready.kind, ready.transfer, manifest.version) == ("full", "broadcast", version)
                assert not self.store.claim_path(version).exists()
                self.store.claim(version)
                receiver = receiver or Receiver(ready.rendezvous, rank=1, manifest=manifest, timeout_s=60)
                self.taken[version] = self._receive(receiver, manifest, version)
                self.store.acknowledge(Served(version))
        except Exception as error:
            self.error = error
        finally:
            if receiver is not None:
                receiver.close("the taker is done")

    def _announced(self, version: int) -> WeightsReady:
        deadline = time.monotonic() + PATIENCE_S
        while (ready := self.store.poll(version)) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"v{version} was not announced")
            time.sleep(0.01)
        return ready

    def _receive(self, receiver: Receiver, manifest: Manifest, version: int) -> str:
        digest = Digest()
        with closing(receiver.receive(manifest)) as pairs:
            for name, tensor in pairs:
                if version == self.drop_at:
                    self.at_drop()
                    raise RuntimeError("given up")
                digest.add(name, tensor)
                self.tensors[name] = (str(tensor.dtype), tuple(tensor.shape))
        return digest.hexdigest()


@contextmanager
def taking(
    store: WeightsStore, last: int, *, first: int = 0, drop_at: int | None = None, at_drop: Callable[[], None] = lambda: None
) -> Generator[WeightsTaker]:
    """Versions up to `last` are taken while the block runs, and are all there at its end."""
    taker = WeightsTaker(store, last, first, drop_at, at_drop)
    thread = threading.Thread(target=taker.follow, daemon=True)
    thread.start()
    yield taker
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), f"only versions {sorted(taker.taken)} came"
    if taker.error is not None and drop_at is None:
        raise taker.error
