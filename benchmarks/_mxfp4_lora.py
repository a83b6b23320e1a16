"""A frozen MXFP4 layer with and without LoRA of rank 32, as the products of a training step.

The update is written first and the base product added onto it, and so is dX. "shared by 3" stands for the query, key and value
layers: one product X A^T for all three adapters.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from turnwise.kernels.mxfp4 import mxfp4_product, mxfp4_product_dx

RANK = 32
SHARING = 3

Packed = tuple[Tensor, Tensor]
Step = Callable[[Sequence[Packed]], None]  # of one layer, or of SHARING layers with the same input


def plain(x: Tensor, grad: Tensor, *, backward: bool) -> Step:
    """The frozen layers alone."""

    def step(layers: Sequence[Packed]) -> None:
        for packed in layers:
            mxfp4_product(x, *packed)
            if backward:
                mxfp4_product_dx(grad, *packed)

    return step


def adapted(x: Tensor, grad: Tensor, *, backward: bool) -> Step:
    """The same layers with adapters, and the gradients of A and B in backward."""
    n, k = grad.shape[1], x.shape[1]
    a = torch.randn(SHARING * RANK, k, dtype=x.dtype, device=x.device) / k**0.5
    b = [torch.randn(n, RANK, dtype=x.dtype, device=x.device) for _ in range(SHARING)]

    def step(layers: Sequence[Packed]) -> None:
        down = a[: RANK * len(layers)]
        low = x @ down.T
        lows = low.split(RANK, 1)
        for packed, part, up in zip(layers, lows, b, strict=False):
            mxfp4_product(x, *packed, out=part @ up.T, beta=1)
        if not backward:
            return
        grad_low = torch.empty_like(low)
        for part, grad_part, up in zip(lows, grad_low.split(RANK, 1), b, strict=False):
            grad_part.copy_(grad @ up)
            torch.mm(grad.T, part)  # of B
        torch.mm(grad_low.T, x)  # of all A
        grad_x = grad_low @ down
        for packed in layers:
            mxfp4_product_dx(grad, *packed, out=grad_x, beta=1)

    return step
