"""Whether updates are large enough to matter: beside the weights, and in the type in which engines read them.

Both cost next to nothing. No probe computes anything with the policy.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

from turnwise.kernels.mxfp4.layer import MXFP4Linear
from turnwise.kernels.mxfp4.ops import dequantize
from turnwise.kernels.mxfp4.sharded import PackedWeight, ShardedMXFP4Linear
from turnwise.trainer import fsdp
from turnwise.trainer.lora_layer import LoraLinear
from turnwise.trainer.optim import global_norm, norm_over_ranks, square_sum

LAYERS = 16  # of those with an adapter, that are looked at
STRIDE = 257  # every so many published elements one is looked at: a prime, so that all columns of a matrix have their turn


@dataclass(frozen=True)
class _Adapted:
    """A layer with an adapter, as it was before a step."""

    layer: LoraLinear
    a: Float[Tensor, "rank in"]
    b: Float[Tensor, "out rank"]


class Movement:
    """How far a step moves the weights that the policy computes with, as a share of their norm.

    Of an adapter that is the change of scale * B A against the weights under it, so that adapters and full fine-tuning are told
    by one measure. An adapter's own norm is none: B begins at 0, and A's values do not matter by themselves. Every method is a
    collective, and making one is none.
    """

    def __init__(self, policy: nn.Module, trained: Sequence[nn.Parameter], *, adapter: bool) -> None:
        layers = [module for module in policy.modules() if isinstance(module, LoraLinear)] if adapter else []
        self.layers = random.Random(0).sample(layers, min(LAYERS, len(layers)))
        self.copies = fsdp.copies(trained[0]) if trained else 1
        self._square_sum = None if adapter else square_sum(trained)  # now: a checkpoint that is read later changes the weights
        self._before: list[_Adapted] = []

    @cached_property
    def norm(self) -> float:
        """Of the weights that the run began with. Summed over ranks when first asked for: one rank alone may make a learner."""
        if self._square_sum is None:
            return math.hypot(*map(weight_norm, self.layers))
        return norm_over_ranks(self._square_sum, self.copies)

    def begin(self) -> None:
        """Keep what the step is measured against."""
        self._before = [_Adapted(layer, _copy(layer.lora_A), _copy(layer.lora_B)) for layer in self.layers]

    def ratio(self, update_norm: float) -> float | None:
        """Of the step since `begin`; None where there are no weights, or nothing but zeros.

        Args:
            update_norm: of all trained parameters.
        """
        if self.norm == 0:
            return None
        squares = [_squared_change(one) for one in self._before]
        self._before = []
        moved = math.sqrt(float(torch.stack(squares).sum())) if squares else update_norm
        return moved / self.norm


def _copy(parameter: Tensor) -> Tensor:
    return fsdp.full(parameter).clone()


def _squared_change(before: _Adapted) -> Tensor:
    """Squared norm of the change of scale * B A = scale * (dB A' + B dA), from products with the rank as both dimensions.

    |U V|^2 = sum of (U^T U) * (V V^T), and the two terms keep the digits that a difference of products would lose.
    """
    a, b = fsdp.full(before.layer.lora_A), fsdp.full(before.layer.lora_B)
    u = torch.cat([b - before.b, before.b], dim=1).double()
    v = torch.cat([a, a - before.a]).double()
    return before.layer.scale**2 * ((u.T @ u) * (v @ v.T)).sum().clamp(min=0)


def weight_norm(layer: LoraLinear) -> float:
    """Norm of the weight under an adapter, packed or not, sharded or not; a collective."""
    base = layer.base
    if isinstance(base, ShardedMXFP4Linear):
        mine = fsdp.local(base.weight)
        assert isinstance(mine, PackedWeight)
        held, copies = dequantize(mine.packed, mine.scales, torch.float32), fsdp.copies(base.weight)
    elif isinstance(base, MXFP4Linear):
        held, copies = base.dequantize(torch.float32), fsdp.world_size()
    else:
        held, copies = base.weight.detach(), fsdp.copies(base.weight)
    return global_norm([held], copies=copies)


class PublishedChange:
    """The share of published elements that are other numbers than in the publication before, by a fixed sample of them."""

    def __init__(self) -> None:
        self._now: list[Tensor] = []
        self._before: Tensor | None = None

    def see(self, tensor: Tensor) -> None:
        """Take in the next tensor of a publication, as engines read it; the same ones in the same order each time."""
        self._now.append(tensor.detach().flatten()[::STRIDE].clone())

    def metrics(self) -> dict[str, float]:
        """End the publication; nothing to tell of the first."""
        now, before = torch.cat(self._now) if self._now else torch.empty(0), self._before
        self._now, self._before = [], now
        if before is None or not len(now) or before.shape != now.shape:
            return {}
        return {"actor/published_change/share": float((now != before).double().mean())}
