"""Full weights from trainer to engines: buckets of tensors, by NCCL between GPUs and by gloo between CPUs."""

import socket
from collections.abc import Callable, Generator, Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

from turnwise.transport.manifest import Backend, Manifest, TensorSpec
from turnwise.transport.peer_group import LOOPBACK, BroadcastError, PeerGroup, UnderWay, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

TIMEOUT_S = 300.0  # for peers to come, and for each bucket; 8 GB take well under a second
BACKLOG = 128


class Sender:
    """The trainer's end. Hosts the rendezvous, on loopback and a free port, and keeps the group open between versions.

    Args:
        backend: "nccl" from this process's current GPU, which no engine may use; "gloo" from the CPU.
        workers: of all engines together.
        timeout_s: for all workers to come, and for each bucket, in seconds.
        hurry: whether the run is about to end, so that waiting makes little sense.
    """

    def __init__(
        self, *, backend: Backend, workers: int, timeout_s: float = TIMEOUT_S, hurry: Callable[[], bool] = lambda: False
    ) -> None:
        import torch.distributed as dist  # late, as everywhere here: `rl` reads this package without loading torch

        listener = socket.create_server((LOOPBACK, 0), backlog=BACKLOG)  # torch's own would listen on every address
        port = int(listener.getsockname()[1])
        self.rendezvous = f"{LOOPBACK}:{port}"
        self.backend: Backend = backend
        self.world_size = workers + 1
        self._timeout_s, self._hurry = timeout_s, hurry
        self._store = dist.TCPStore(
            LOOPBACK,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=listener.detach(),
        )
        self._group: PeerGroup | None = None

    def send(self, manifest: Manifest, tensors: "Iterable[tuple[str, Tensor]]") -> None:
        """Send `tensors`, which must come as the manifest has them; the next bucket is filled while one is under way.

        Raises:
            BroadcastError: a worker did not come, or went away.
            ValueError: `tensors` are not those of the manifest.
        """
        pairs = iter(tensors)
        under_way: UnderWay | None = None
        try:
            group = self._joined()
            for index, specs in enumerate(manifest.buckets):
                flat = self._filled(specs, pairs)
                if under_way is not None:
                    group.finish(under_way)
                under_way = group.start(flat, _label(manifest, index))
            if (left := next(pairs, None)) is not None:
                raise ValueError(f"{left[0]} is not in the manifest of v{manifest.version}")
            if under_way is not None:
                group.finish(under_way)
        except BaseException as error:
            self.close(f"{type(error).__name__}: {error}")  # workers that wait hear of it now, not at their deadline
            raise

    def close(self, reason: str = "") -> None:
        """Leave the group. Workers that wait for something fail, and say the reason."""
        if self._group is not None:
            self._group.close(reason)

    def _joined(self) -> PeerGroup:
        if self._group is None:
            self._group = PeerGroup(
                self._store,
                0,
                self.world_size,
                backend=self.backend,
                rendezvous=self.rendezvous,
                timeout_s=self._timeout_s,
                hurry=self._hurry,
            )
        return self._group

    def _filled(self, specs: list[TensorSpec], pairs: "Iterator[tuple[str, Tensor]]") -> "Tensor":
        flat = _empty(specs, self.backend)
        for spec, place in zip(specs, _places(specs, flat), strict=True):
            name, tensor = next(pairs, (None, None))
            found = None if name is None or tensor is None else spec_of(name, tensor)
            if tensor is None or found != spec:
                raise ValueError(f"the manifest has {spec}, and what comes is {found}")
            place.copy_(tensor.detach())
        return flat


class Receiver:
    """The end of one worker of an engine.

    Args:
        rendezvous: host:port of the sender's store.
        rank: of this worker, from 1 on.
        manifest: of the first version to come; later ones have the same world and backend.
        timeout_s: for the sender and the other workers to come, and for each bucket, in seconds.

    Raises:
        BroadcastError: nobody answers at the rendezvous, or another worker did not come.
    """

    def __init__(self, rendezvous: str, *, rank: int, manifest: Manifest, timeout_s: float = TIMEOUT_S) -> None:
        import torch.distributed as dist

        self.rendezvous = rendezvous
        self.backend: Backend = manifest.backend
        host, _, port = rendezvous.rpartition(":")
        try:
            store = dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout_s))
        except (RuntimeError, ValueError) as error:
            raise BroadcastError(f"worker {rank}: no trainer answers at {rendezvous}: {first_line(error)}") from error
        self._group = PeerGroup(
            store, rank, manifest.world_size, backend=manifest.backend, rendezvous=rendezvous, timeout_s=timeout_s
        )

    def receive(self, manifest: Manifest) -> "Generator[tuple[str, Tensor]]":
        """Names and tensors as they arrive; the next bucket is under way while those of one are used.

        A tensor is a view of its bucket, whose memory is not used again. Close the iterator where you do not read it to its end
        (`contextlib.closing`): that tells the sender.

        Raises:
            BroadcastError: a bucket did not arrive in time, or the sender went away.
        """
        under_way = self._started(manifest, 0)
        try:
            for index, specs in enumerate(manifest.buckets):
                assert under_way is not None, "there is a bucket"
                flat = self._group.finish(under_way)
                under_way = self._started(manifest, index + 1)
                for spec, tensor in zip(specs, _places(specs, flat), strict=True):
                    yield spec.name, tensor
        except GeneratorExit:
            self.close(f"v{manifest.version} could not be loaded")  # the sender hears of it now, not at its deadline
            raise

    def close(self, reason: str = "") -> None:
        """Leave the group. A sender that still sends fails, and says the reason."""
        self._group.close(reason)

    def _started(self, manifest: Manifest, index: int) -> UnderWay | None:
        if index == len(manifest.buckets):
            return None
        return self._group.start(_empty(manifest.buckets[index], self.backend), _label(manifest, index))


def spec_of(name: str, tensor: "Tensor", dtype: "torch.dtype | None" = None) -> TensorSpec:
    """The entry of a tensor in a manifest; of its whole where it is sharded, in another type where one is given."""
    return TensorSpec(name, str(dtype or tensor.dtype).removeprefix("torch."), list(tensor.shape))


def _empty(specs: list[TensorSpec], backend: Backend) -> "Tensor":
    """Memory of a bucket: on the current GPU for NCCL, on the CPU for gloo."""
    import torch

    device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")
    return torch.empty(sum(spec.numel for spec in specs), dtype=getattr(torch, specs[0].dtype), device=device)


def _places(specs: list[TensorSpec], flat: "Tensor") -> "Iterator[Tensor]":
    """The tensors of a bucket as views of it."""
    for spec, part in zip(specs, flat.split([spec.numel for spec in specs]), strict=True):
        yield part.view(spec.shape)


def _label(manifest: Manifest, index: int) -> str:
    return f"v{manifest.version}, bucket {index + 1} of {len(manifest.buckets)}"
