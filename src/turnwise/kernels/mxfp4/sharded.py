"""A packed weight as a parameter that FSDP2 shards: for bases that do not fit whole on every rank.

FSDP2 of torch 2.11 refuses uint8 parameters, frozen or not, and bytes dressed up as bfloat16 do not survive (a NaN may change its
bits). So the parameter is a tensor subclass: outside a bfloat16 matrix [N, K], inside codes and scales, which FSDP2 gathers as
they are through `fsdp_pre_all_gather` and `fsdp_post_all_gather`. What it gathers it frees after the forward pass, and gathers
again into the same memory for backward; so autograd may hold the gathered bytes between the passes, when they take no memory.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import UInt8
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from turnwise.kernels.mxfp4.format import BLOCK
from turnwise.kernels.mxfp4.layer import MXFP4Linear

aten = torch.ops.aten


class PackedWeight(torch.Tensor):
    """Looks like a bfloat16 matrix [N, K], is codes [N, K/2] and scales [N, K/32]. Knows the operations by which FSDP2 shards."""

    packed: UInt8[Tensor, "n half_k"]
    scales: UInt8[Tensor, "n blocks"]

    handlers: ClassVar[dict[Any, Callable[..., Any]]] = {}

    @staticmethod
    def __new__(cls: type["PackedWeight"], packed: Tensor, scales: Tensor, shape: torch.Size | None = None) -> "PackedWeight":
        shape = shape or torch.Size((packed.shape[0], packed.shape[1] * 2))
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bfloat16, device=packed.device, requires_grad=False)

    def __init__(self, packed: Tensor, scales: Tensor, shape: torch.Size | None = None) -> None:
        self.packed, self.scales = packed, scales

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["packed", "scales"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], meta: None, size: Any, stride: Any) -> "PackedWeight":
        return PackedWeight(inner["packed"], inner["scales"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func not in cls.handlers:
            raise NotImplementedError(f"{func} of a packed weight: read its `packed` and `scales` instead")
        return cls.handlers[func](func, *args, **(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"PackedWeight({list(self.shape)}, device={self.device})"

    def fsdp_pre_all_gather(
        self, mesh: DeviceMesh, outer_size: torch.Size, outer_stride: tuple[int, ...], module: nn.Module, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], None]:
        """What each rank sends."""
        return (self.packed, self.scales), None

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: None, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The weight of what all sent; None where `out` already is that weight, in the same memory."""
        if out is not None:
            return None
        packed, scales = outputs
        return PackedWeight(packed, scales), (packed, scales)


def _handles(*operators: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        PackedWeight.handlers.update(dict.fromkeys(operators, handler))
        return handler

    return register


@_handles(aten.detach.default, aten.clone.default, aten.alias.default)
def _both(func: Any, weight: PackedWeight, **options: Any) -> PackedWeight:
    return PackedWeight(func(weight.packed, **options), func(weight.scales, **options), weight.shape)


@_handles(aten.slice.Tensor)
def _rows(func: Any, weight: PackedWeight, dim: int = 0, start: int | None = None, end: int | None = None) -> PackedWeight:
    if dim != 0:
        raise NotImplementedError("a packed weight is sharded by rows")
    return PackedWeight(weight.packed[start:end], weight.scales[start:end])


@_handles(aten.split.Tensor)
def _split(func: Any, weight: PackedWeight, size: int, dim: int = 0) -> list[PackedWeight]:
    if dim != 0:
        raise NotImplementedError("a packed weight is sharded by rows")
    return [PackedWeight(*both) for both in zip(weight.packed.split(size), weight.scales.split(size), strict=True)]


@_handles(aten.new_zeros.default)
def _zeros(func: Any, weight: PackedWeight, size: list[int], **options: Any) -> PackedWeight:
    n, k = size
    return PackedWeight(weight.packed.new_zeros(n, k // 2), weight.scales.new_zeros(n, k // BLOCK))


@_handles(aten.copy_.default)
def _copy(func: Any, target: PackedWeight, source: PackedWeight, non_blocking: bool = False) -> PackedWeight:
    target.packed.copy_(source.packed, non_blocking)
    target.scales.copy_(source.scales, non_blocking)
    return target


@_handles(aten._to_copy.default)
def _to(func: Any, weight: PackedWeight, *, dtype: Any = None, device: Any = None, **options: Any) -> PackedWeight:
    if dtype not in (None, torch.bfloat16):
        raise NotImplementedError(f"a packed weight has no values in {dtype}: decode it")
    return PackedWeight(weight.packed.to(device), weight.scales.to(device), weight.shape)


@_handles(aten.view.default, aten.as_strided.default)
def _same(func: Any, weight: PackedWeight, size: list[int], *layout: Any) -> PackedWeight:
    """The same bytes under the shape of the whole, or flat, which is how FSDP2 keeps a shard."""
    flat = [weight.numel()]
    if list(size) not in ([-1], flat, [weight.packed.shape[0], weight.packed.shape[1] * 2]):
        raise NotImplementedError(f"a packed weight of shape {list(weight.shape)} has no view of shape {list(size)}")
    return PackedWeight(weight.packed, weight.scales, torch.Size(flat if list(size) == [-1] else size))


class ShardedMXFP4Linear(MXFP4Linear):
    """An MXFP4 layer whose weight is a parameter, `weight`, that FSDP2 shards; in all else the same."""

    def __init__(self, layer: MXFP4Linear, ranks: int) -> None:
        """Take the bytes of a layer, with zero rows after the last so that every one of `ranks` gets as many."""
        nn.Module.__init__(self)
        self._shape = (layer.out_features, layer.in_features)
        rows = -layer.out_features % ranks
        packed, scales = (pad(tensor, (0, 0, 0, rows)) for tensor in (layer.weight_packed, layer.weight_scale))
        self.weight = nn.Parameter(PackedWeight(packed, scales), requires_grad=False)
        self.bias = layer.bias
        self._small_scales = layer._small_scales
        self._decoded = None

    @property
    def in_features(self) -> int:
        return self._shape[1]

    @property
    def out_features(self) -> int:
        return self._shape[0]

    @property
    def weight_packed(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._gathered().packed[: self.out_features]

    @property
    def weight_scale(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._gathered().scales[: self.out_features]

    def _gathered(self) -> PackedWeight:
        weight = self.weight
        if isinstance(weight, DTensor):
            raise RuntimeError(
                "this packed weight is sharded: its bytes are together only during the passes, when FSDP2 gathers them"
            )
        assert isinstance(weight, PackedWeight)
        return weight


def shard_packed(module: nn.Module, ranks: int) -> None:
    """Have FSDP2 shard the packed weights below `module`, in place; to be called before `fully_shard`.

    Without it they are buffers, of which every rank holds all. With it, state dicts hold this rank's part.

    Args:
        ranks: processes that share a copy, which is the size of the mesh's shard dimension.
    """
    for name, layer in [(name, layer) for name, layer in module.named_modules() if type(layer) is MXFP4Linear]:
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, ShardedMXFP4Linear(layer, ranks))
