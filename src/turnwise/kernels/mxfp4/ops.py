"""Operators of torch for MXFP4 weights: they have fake implementations and gradients, so `torch.compile` keeps a graph whole.

A quantised weight is frozen: products differentiate with respect to their other operand, and save the packed bytes alone.
"""

from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from turnwise.kernels.mxfp4 import backends
from turnwise.kernels.mxfp4.format import BLOCK, SCALE_NAN, ScaleMode, check_operand, check_packed, check_scale_mode, check_weight


def quantize(
    weight: Float[Tensor, "n k"], *, scale_mode: ScaleMode = "even"
) -> tuple[UInt8[Tensor, "n half_k"], UInt8[Tensor, "n blocks"]]:
    """Codes and scale bytes of a weight; see `turnwise.kernels.mxfp4.format` for their layout, `reference` for the arithmetic.

    Raises:
        ValueError: no matrix of floats, K not a multiple of 32, an unknown mode, or a weight that is not finite.

    """
    check_weight(weight)
    packed, scales = quantize_unchecked(weight, scale_mode)
    wrong = (scales == SCALE_NAN).nonzero()
    if len(wrong):
        row, block = wrong[0].tolist()
        first = block * BLOCK
        raise ValueError(
            f"a weight of shape {list(weight.shape)} is not finite in {len(wrong)} blocks of {BLOCK}, the first in row {row}, "
            f"columns {first} to {first + BLOCK - 1}; MXFP4 has no infinity, and a NaN takes its block with it: mend the weights"
        )
    return packed, scales


def quantize_unchecked(
    weight: Float[Tensor, "n k"], scale_mode: ScaleMode = "even"
) -> tuple[UInt8[Tensor, "n half_k"], UInt8[Tensor, "n blocks"]]:
    """The same without waiting for the device: a block that is not finite gets scale byte 255 and decodes to NaN."""
    return torch.ops.turnwise.mxfp4_quantize(weight, check_scale_mode(scale_mode))


def dequantize(
    packed: UInt8[Tensor, "n half_k"], scales: UInt8[Tensor, "n blocks"], dtype: torch.dtype = torch.bfloat16
) -> Float[Tensor, "n k"]:
    """Values by the table, for all 256 scale bytes: 255 is NaN, magnitudes from 2^128 are infinite, all others exact in bfloat16.

    Raises:
        ValueError: tensors that are no MXFP4 pair.

    """
    check_packed(packed, scales)
    return torch.ops.turnwise.mxfp4_dequantize(packed, scales, dtype)


def mxfp4_product(
    x: Float[Tensor, "*batch k"],
    packed: UInt8[Tensor, "n half_k"],
    scales: UInt8[Tensor, "n blocks"],
    out: Float[Tensor, "*batch n"] | None = None,
    *,
    beta: int = 0,
    small_scales: bool = False,
) -> Float[Tensor, "*batch n"]:
    """x W^T in the dtype of x; with `out`, out = x W^T + beta out in place.

    Differentiable with respect to x where `out` is None; with `out`, for the inside of autograd functions.

    Args:
        x: last dimension K.
        out: contiguous, of the product's shape and the dtype of x.
        beta: 0 or 1.
        small_scales: a promise that no scale byte exceeds 128 (a scale of 2), which spares the kernel for few tokens a
            multiplication in eight operations. Where it is broken the outputs are NaN.

    Raises:
        ValueError: shapes or dtypes that do not fit, or another beta.

    """
    check_packed(packed, scales)
    check_operand(x, packed.shape[1] * 2, "x", "the weight's K")
    if out is None:
        return torch.ops.turnwise.mxfp4_product(x, packed, scales, False, small_scales)
    return _into(out, x, packed, scales, beta, False, small_scales)


def mxfp4_product_dx(
    grad: Float[Tensor, "*batch n"],
    packed: UInt8[Tensor, "n half_k"],
    scales: UInt8[Tensor, "n blocks"],
    out: Float[Tensor, "*batch k"] | None = None,
    *,
    beta: int = 0,
) -> Float[Tensor, "*batch k"]:
    """grad W: the gradient of `mxfp4_product` with respect to x. Arguments and errors as there."""
    check_packed(packed, scales)
    check_operand(grad, packed.shape[0], "the gradient", "the weight's N")
    if out is None:
        return torch.ops.turnwise.mxfp4_product(grad, packed, scales, True, False)
    return _into(out, grad, packed, scales, beta, True, False)


def _into(out: Tensor, x: Tensor, packed: Tensor, scales: Tensor, beta: int, transposed: bool, small_scales: bool) -> Tensor:
    shape = [*x.shape[:-1], packed.shape[1] * 2 if transposed else packed.shape[0]]
    if list(out.shape) != shape or out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(
            f"out is {out.dtype} of shape {list(out.shape)}{'' if out.is_contiguous() else ', not contiguous'}; the product is "
            f"{x.dtype} of shape {shape}, contiguous"
        )
    if beta not in (0, 1):
        raise ValueError(f"beta = {beta}: the product is written (0) or added (1)")
    torch.ops.turnwise.mxfp4_product_into(out, x, packed, scales, bool(beta), transposed, small_scales)
    return out


@torch.library.custom_op("turnwise::mxfp4_quantize", mutates_args=())
def _quantize(weight: Tensor, scale_mode: str) -> tuple[Tensor, Tensor]:
    return backends.quantize(weight, check_scale_mode(scale_mode))


@_quantize.register_fake
def _(weight: Tensor, scale_mode: str) -> tuple[Tensor, Tensor]:
    n, k = weight.shape
    return weight.new_empty(n, k // 2, dtype=torch.uint8), weight.new_empty(n, k // BLOCK, dtype=torch.uint8)


@torch.library.custom_op("turnwise::mxfp4_dequantize", mutates_args=())
def _dequantize(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return backends.dequantize(packed, scales, dtype)


@_dequantize.register_fake
def _(packed: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(packed.shape[0], packed.shape[1] * 2, dtype=dtype)


@torch.library.custom_op("turnwise::mxfp4_product", mutates_args=())
def _product(x: Tensor, packed: Tensor, scales: Tensor, transposed: bool, small_scales: bool) -> Tensor:
    """x W^T, or x W where `transposed`."""
    rows = x.reshape(-1, x.shape[-1])
    if transposed:
        result = backends.product_dx(rows, packed, scales)
    else:
        result = backends.product(rows, packed, scales, small_scales=small_scales)
    return result.view(*x.shape[:-1], result.shape[-1])


@_product.register_fake
def _(x: Tensor, packed: Tensor, scales: Tensor, transposed: bool, small_scales: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[1] * 2 if transposed else packed.shape[0])


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, scales, transposed, _ = inputs
    ctx.save_for_backward(packed, scales)
    ctx.transposed = transposed


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    packed, scales = ctx.saved_tensors
    grad_x = (
        torch.ops.turnwise.mxfp4_product(grad, packed, scales, not ctx.transposed, False) if ctx.needs_input_grad[0] else None
    )
    return grad_x, None, None, None, None


_product.register_autograd(_product_backward, setup_context=_save_packed)


@torch.library.custom_op("turnwise::mxfp4_product_into", mutates_args=("out",))
def _product_into(
    out: Tensor, x: Tensor, packed: Tensor, scales: Tensor, add: bool, transposed: bool, small_scales: bool
) -> None:
    rows, target = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    if transposed:
        backends.product_dx(rows, packed, scales, out=target, add=add)
    else:
        backends.product(rows, packed, scales, out=target, add=add, small_scales=small_scales)
