"""A linear layer with a LoRA update.

PEFT's layer computes the update in float32 and casts around it; over a bfloat16 base on a CPU that is a fifth of a step's time
(in float32 the two take the same). This one adds the update into the base's result in the base's type, as engines do, and keeps
float32 parameters. It holds fewer intermediate results, too. Tests compare it with PEFT, number by number.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from turnwise.config import LoraConfig
from turnwise.kernels.mxfp4.layer import MXFP4Linear
from turnwise.kernels.mxfp4.ops import mxfp4_product, mxfp4_product_dx
from turnwise.kernels.onednn import product

LINEAR = (nn.Linear, MXFP4Linear)
Stored = tuple[Tensor, ...]  # a frozen W [out, in] as it lies in memory: itself, or its codes and its scale bytes


class LoraLinear(nn.Module):
    """y = x W^T + bias + scale * (x A^T) B^T, with W frozen, and plain or packed."""

    def __init__(self, base: nn.Linear | MXFP4Linear, config: LoraConfig) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = config.alpha / config.rank
        self.dropout = config.dropout
        self.enabled = True
        self.shared: SharedInput | None = None
        self.place = 0  # among those that share
        device = _stored(base)[0].device
        self.lora_A = nn.Parameter(torch.empty(config.rank, base.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # PEFT's default; B = 0 makes the first policy the base model

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if not self.enabled:
            return self.base(x)
        if self.dropout > 0 and self.training:
            low = linear(dropout(x, self.dropout), self.lora_A.to(x.dtype)) * self.scale
            return self.base(x) + linear(low, self.lora_B.to(x.dtype))
        if self.shared is not None:
            y = _LowUpdate.apply(x, self.shared.take(self.place, x), self.lora_B, *_stored(self.base))
        else:
            y = _LoraUpdate.apply(x, self.lora_A, self.lora_B, self.scale, *_stored(self.base))
        return y if self.base.bias is None else y + self.base.bias  # pyright: ignore[reportUnnecessaryComparison, reportOptionalOperand]


class SharedInput:
    """x [A1; A2; ...]^T for layers that read the same x: computed when the first of them is called, and handed to each.

    Every product with an A reads all of x for the few columns it makes. Siblings are told by their input, the same tensor object
    for all of them; a layer that is called with another one gets a product of its own.
    """

    def __init__(self, layers: Sequence[LoraLinear]) -> None:
        self._layers = tuple(layers)
        self._forget()
        for place, layer in enumerate(layers):
            layer.shared, layer.place = self, place

    def take(self, place: int, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "rows rank"]:
        """scale * x A^T of the layer at a place. What was computed is let go of with the last layer's share."""
        if self._x is not x or place not in self._waiting:
            low = _SharedLow.apply(x, self._layers[0].scale, *(layer.lora_A for layer in self._layers))
            self._x, self._waiting = x, dict(enumerate(low.chunk(len(self._layers), dim=1)))
        share = self._waiting.pop(place)
        if not self._waiting:
            self._forget()
        return share

    def _forget(self) -> None:
        self._x: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}


class _SharedLow(torch.autograd.Function):
    """scale * x [A1; A2; ...]^T; saves x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, *a: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(rows, *a)
        ctx.scale, ctx.shape = scale, x.shape
        return product(rows, torch.cat(a).to(x.dtype)).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, *a = ctx.saved_tensors
        stacked, grad_low = torch.cat(a), grads[0] * ctx.scale
        grad_a = (grad_low.T @ rows).to(stacked.dtype).chunk(len(a))
        grad_x = (grad_low @ stacked.to(grad_low.dtype)).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, *grad_a


class _LowUpdate(torch.autograd.Function):
    """x W^T + low B^T with a low that is there already; the part of x's gradient that goes through it is `_SharedLow`'s."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, b: Tensor, *stored: Tensor) -> Tensor:
        ctx.save_for_backward(low, b, *stored)
        ctx.shape = x.shape
        return _with_base(x.reshape(-1, x.shape[-1]), stored, low, b.to(x.dtype)).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        low, b, *stored = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        grad_low = product(grad, b.to(grad.dtype).T)
        grad_b = (grad.T @ low).to(b.dtype)
        grad_x = _base_dx(grad, tuple(stored)).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return grad_x, grad_low, grad_b, *(None for _ in stored)


class _LoraUpdate(torch.autograd.Function):
    """One node for base and update: nothing is saved but x and x A^T, and sums go into the matrix products.

    A packed W is decoded in the forward pass and again in the backward pass; in between, its bytes are all there is of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float, *stored: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = product(rows, a.to(x.dtype)).mul_(scale)
        ctx.save_for_backward(rows, low, a, b, *stored)
        ctx.scale, ctx.shape = scale, x.shape
        return _with_base(rows, stored, low, b.to(x.dtype)).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, a, b, *stored = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        grad_low = product(grad, b.to(grad.dtype).T).mul_(ctx.scale)
        grad_b = (grad.T @ low).to(b.dtype)
        grad_a = (grad_low.T @ rows).to(a.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _with_base_dx(grad, tuple(stored), grad_low, a.to(grad.dtype)).view(ctx.shape)
        return grad_x, grad_a, grad_b, None, *(None for _ in stored)


def _stored(base: nn.Linear | MXFP4Linear) -> Stored:
    return (base.weight_packed, base.weight_scale) if isinstance(base, MXFP4Linear) else (base.weight,)


def _with_base(
    x: Float[Tensor, "rows in"], stored: Stored, low: Float[Tensor, "rows rank"], b: Float[Tensor, "out rank"]
) -> Float[Tensor, "rows out"]:
    """x W^T + low B^T."""
    if len(stored) == 2:
        return mxfp4_product(x, *stored, out=low @ b.T, beta=1)
    return _sum_of_products(x, stored[0], low, b)


def _with_base_dx(
    grad: Float[Tensor, "rows out"], stored: Stored, low: Float[Tensor, "rows rank"], a: Float[Tensor, "rank in"]
) -> Float[Tensor, "rows in"]:
    """grad W + low A."""
    if len(stored) == 2:
        return mxfp4_product_dx(grad, *stored, out=low @ a, beta=1)
    return _sum_of_products(grad, stored[0].T, low, a.T)


def _base_dx(grad: Float[Tensor, "rows out"], stored: Stored) -> Float[Tensor, "rows in"]:
    """grad W."""
    return mxfp4_product_dx(grad, *stored) if len(stored) == 2 else product(grad, stored[0].T)


def _sum_of_products(
    wide: Float[Tensor, "rows in"], weight: Float[Tensor, "out in"], low: Float[Tensor, "rows rank"], b: Float[Tensor, "out rank"]
) -> Float[Tensor, "rows out"]:
    """wide W^T + low B^T. On a GPU the small product goes first: the large one adds onto it as it writes."""
    if wide.is_cuda:
        return (low @ b.T).addmm_(wide, weight.T)
    return product(wide, weight).addmm_(low, b.T)
