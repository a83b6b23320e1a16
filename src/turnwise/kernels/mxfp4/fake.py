"""Fake quantisation for full fine-tuning: compute with MXFP4 values, train the weights behind them.

Straight-through estimator (arXiv 1308.3432): rounding has no useful derivative, so the gradient with respect to the quantised
weight is taken for that of the master weight. The layer's function is that of the quantised weight in both passes: Y = X Wq^T,
and dX = dY Wq, since X acts on the loss through Wq. dX = dY W would be the gradient of another function.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from turnwise.kernels.mxfp4.format import ScaleMode, check_scale_mode, check_weight
from turnwise.kernels.mxfp4.ops import dequantize, mxfp4_product, mxfp4_product_dx, quantize_unchecked


def fake_quantize(weight: Float[Tensor, "n k"], *, scale_mode: ScaleMode = "even") -> Float[Tensor, "n k"]:
    """The weight's MXFP4 values in its own dtype; the gradient passes straight through.

    Raises:
        ValueError: no matrix of floats, K not a multiple of 32, an unknown mode.

    """
    check_weight(weight)
    packed, scales = quantize_unchecked(weight.detach(), scale_mode)
    values = dequantize(packed, scales, weight.dtype)
    return _StraightThrough.apply(weight, values)


def fake_quantize_linear(
    x: Float[Tensor, "*batch k"],
    master: Float[Tensor, "n k"],
    bias: Float[Tensor, " n"] | None = None,
    *,
    scale_mode: ScaleMode = "even",
) -> Float[Tensor, "*batch n"]:
    """X Wq^T + bias in the dtype of X, where Wq is `master` in MXFP4; dW = dY^T X goes to `master`.

    Autograd holds X and the packed bytes, no second weight in 16 bits. The bytes are those of `quantize(master)`; whoever
    publishes them must quantise the same tensor in the same dtype, since a copy in bfloat16 has other block maxima than its
    float32 original. A master that is not finite gives NaN.

    Raises:
        ValueError: no matrix of floats, K not a multiple of 32, an unknown mode, or an X that does not fit.

    """
    check_weight(master)
    y = _FakeQuantizedProduct.apply(x, master, check_scale_mode(scale_mode))
    return y if bias is None else y + bias


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _FakeQuantizedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, master: Tensor, scale_mode: ScaleMode) -> Tensor:
        packed, scales = quantize_unchecked(master, scale_mode)
        ctx.save_for_backward(x, packed, scales)
        ctx.master_dtype = master.dtype
        return mxfp4_product(x, packed, scales)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, packed, scales = ctx.saved_tensors
        grad = grads[0]
        grad_x = mxfp4_product_dx(grad, packed, scales) if ctx.needs_input_grad[0] else None
        grad_master = None
        if ctx.needs_input_grad[1]:
            rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
            grad_master = (rows.T @ inputs).to(ctx.master_dtype)
        return grad_x, grad_master, None
