"""AdamW on this rank's part of the parameters, a bucket at a time, with its moments on the device or in the CPU's memory.

PyTorch's own update works on all parameters at once, and its moments lie where the parameters do. Here what an update needs is
bounded by a bucket. The arithmetic is PyTorch's (`torch.optim.adamw.adamw`, fused on CUDA), element by element on the same
buckets, so where the moments lie changes no bit.

Offloaded moments lie in pinned arenas. While one bucket is updated, the next comes to the device and the one before goes back, on
streams of their own.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from turnwise.config import OptimConfig
from turnwise.trainer import fsdp

BUCKET = 1 << 25  # elements: 128 MiB of each moment are on their way at a time
ARENA = 1 << 28  # elements: 1 GiB; the pinned allocator rounds sizes up to powers of two
ALIGNMENT = 64  # elements: every parameter begins where vector instructions like it, offloaded or not
MOMENTS = ("exp_avg", "exp_avg_sq")
_Arena = list[tuple[nn.Parameter, int]]  # parameters, each with the index of its first element


@dataclass(frozen=True)
class _Piece:
    """Part of a parameter, as flat ranges."""

    parameter: nn.Parameter
    begin: int
    end: int
    offset: int  # of its first element in the bucket


@dataclass(frozen=True)
class _Bucket:
    """What is updated at a time: `length` elements of an arena from `begin` on."""

    arena: int
    begin: int
    length: int
    pieces: tuple[_Piece, ...]


class AdamW:
    """AdamW (arXiv 1711.05101). `state` has what a checkpoint holds of each parameter: `exp_avg`, `exp_avg_sq` and `step`."""

    def __init__(self, parameters: Iterable[nn.Parameter], config: OptimConfig) -> None:
        self.config = config
        self.lr = config.lr
        self.parameters = list(parameters)
        self.device = fsdp.local(self.parameters[0]).device if self.parameters else torch.device("cpu")
        arenas = list(_arenas(self.parameters))
        self.buckets = [bucket for index, arena in enumerate(arenas) for bucket in _buckets(index, arena)]
        self.staging = _Staging(arenas, self.buckets, self.device) if config.offload else None
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}
        for arena_index, arena in enumerate(arenas):
            for parameter, begin in arena:
                moments = (
                    {name: torch.zeros_like(parameter, requires_grad=False) for name in MOMENTS}
                    if self.staging is None
                    else self.staging.moments(parameter, arena_index, begin)
                )
                self.state[parameter] = {"step": torch.zeros((), dtype=torch.float32), **moments}

    @torch.no_grad()
    def step(self) -> Tensor:
        """Apply the gradients; returns the squared L2 norm of this rank's part of the change, a float64 scalar."""
        trained = [parameter for parameter in self.parameters if parameter.grad is not None]
        moved = torch.zeros((), dtype=torch.float64, device=self.device)
        if self.staging is None:
            for bucket in self.buckets:
                moved += self._update(bucket, {name: self._resident(bucket, name) for name in MOMENTS})
        else:
            for bucket, moments in self.staging.travel(self.buckets):
                moved += self._update(bucket, moments)
        for parameter in trained:
            self.state[parameter]["step"] += 1
        return moved

    def zero_grad(self) -> None:
        """Free the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def _resident(self, bucket: _Bucket, name: str) -> list[Tensor]:
        return [_flat(self.state[piece.parameter][name])[piece.begin : piece.end] for piece in bucket.pieces]

    def _update(self, bucket: _Bucket, moments: Mapping[str, Sequence[Tensor]]) -> Tensor:
        """Update the pieces that have a gradient, in place; returns the squared norm of the change."""
        chosen = [i for i, piece in enumerate(bucket.pieces) if piece.parameter.grad is not None]
        if not chosen:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        pieces = [bucket.pieces[i] for i in chosen]
        weights = [_flat(piece.parameter.detach())[piece.begin : piece.end] for piece in pieces]
        grads = [_flat_grad(piece.parameter)[piece.begin : piece.end] for piece in pieces]
        steps = [float(self.state[piece.parameter]["step"]) for piece in pieces]
        before = torch.cat(weights)
        adamw(
            weights,
            grads,
            [moments["exp_avg"][i] for i in chosen],
            [moments["exp_avg_sq"][i] for i in chosen],
            [],
            list(torch.tensor(steps, dtype=torch.float32, device=self.device).unbind()),
            fused=self.device.type == "cuda",
            amsgrad=False,
            beta1=self.config.betas[0],
            beta2=self.config.betas[1],
            lr=self.lr,
            weight_decay=self.config.weight_decay,
            eps=self.config.eps,
            maximize=False,
        )
        change = torch.cat(weights).sub_(before)
        return torch.linalg.vector_norm(change, dtype=torch.float64).square()


class _Staging:
    """Moments in the CPU's memory, and two places for a bucket of them on the device."""

    def __init__(self, arenas: Sequence[_Arena], buckets: Sequence[_Bucket], device: torch.device) -> None:
        lengths = [arena[-1][1] + _aligned(_size(arena[-1][0])) for arena in arenas]
        pin = device.type == "cuda"
        self.arenas = [{name: torch.zeros(length, pin_memory=pin) for name in MOMENTS} for length in lengths]
        largest = max((bucket.length for bucket in buckets), default=0)
        self.slots = [{name: torch.empty(largest, device=device) for name in MOMENTS} for _ in range(2)]
        self.backend: Any = torch.get_device_module(device)
        self.inward, self.outward = self.backend.Stream(), self.backend.Stream()

    def moments(self, parameter: nn.Parameter, arena: int, begin: int) -> dict[str, Tensor]:
        """Views of an arena in the form of the parameter: sharded as it is, but on the CPU."""
        mine = fsdp.local(parameter.detach())
        views = {name: buffer[begin : begin + mine.numel()].view(mine.shape) for name, buffer in self.arenas[arena].items()}
        if not isinstance(parameter, DTensor):
            return views
        mesh = fsdp.meshes().on("cpu")
        return {
            name: DTensor.from_local(view, mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride())
            for name, view in views.items()
        }

    def travel(self, buckets: Sequence[_Bucket]) -> Iterator[tuple[_Bucket, dict[str, list[Tensor]]]]:
        """Each bucket with its moments on the device; what is written into them is in the CPU's memory when this ends."""
        main = self.backend.current_stream()
        self.inward.wait_stream(main)  # the slots' memory may have been in use before it was theirs
        arrived = [self.backend.Event() for _ in self.slots]
        emptied = [self.backend.Event() for _ in self.slots]
        for index in range(len(buckets) + 1):
            if index < len(buckets):
                slot = index % 2
                if index >= 2:
                    self.inward.wait_event(emptied[slot])
                self._copy(buckets[index], slot, self.inward, inward=True)
                arrived[slot].record(self.inward)
            if index > 0:
                bucket, slot = buckets[index - 1], (index - 1) % 2
                main.wait_event(arrived[slot])
                yield bucket, self._parts(bucket, slot)
                self.outward.wait_stream(main)
                self._copy(bucket, slot, self.outward, inward=False)
                emptied[slot].record(self.outward)
        self.backend.synchronize()

    def _copy(self, bucket: _Bucket, slot: int, stream: Any, *, inward: bool) -> None:
        with self.backend.stream(stream):
            for name, buffer in self.arenas[bucket.arena].items():
                home = buffer[bucket.begin : bucket.begin + bucket.length]
                away = self.slots[slot][name][: bucket.length]
                target, source = (away, home) if inward else (home, away)
                target.copy_(source, non_blocking=True)

    def _parts(self, bucket: _Bucket, slot: int) -> dict[str, list[Tensor]]:
        return {
            name: [buffer[piece.offset : piece.offset + piece.end - piece.begin] for piece in bucket.pieces]
            for name, buffer in self.slots[slot].items()
        }


def _arenas(parameters: Sequence[nn.Parameter]) -> Iterator[_Arena]:
    """Parameters in order, `ARENA` elements at a time; a larger one has an arena to itself."""
    arena: _Arena = []
    used = 0
    for parameter in parameters:
        size = _aligned(_size(parameter))
        if arena and used + size > ARENA:
            yield arena
            arena, used = [], 0
        arena.append((parameter, used))
        used += size
    if arena:
        yield arena


def _buckets(index: int, arena: _Arena) -> Iterator[_Bucket]:
    """An arena, `BUCKET` elements at a time; a parameter may lie in several of them."""
    length = arena[-1][1] + _aligned(_size(arena[-1][0]))
    for begin in range(0, length, BUCKET):
        end = min(begin + BUCKET, length)
        pieces: list[_Piece] = []
        for parameter, start in arena:
            first, last = max(begin, start), min(end, start + _size(parameter))
            if first < last:
                pieces.append(_Piece(parameter, first - start, last - start, first - begin))
        yield _Bucket(index, begin, end - begin, tuple(pieces))


def _size(parameter: Tensor) -> int:
    return fsdp.local(parameter.detach()).numel()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _flat(tensor: Tensor) -> Tensor:
    """This rank's elements as one dimension; a view."""
    return fsdp.local(tensor).view(-1)


def _flat_grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return fsdp.local(parameter.grad).reshape(-1)
