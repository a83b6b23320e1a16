"""MXFP4 in plain torch: the specification. Every kernel gives the same bits."""

import math

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from turnwise.kernels.mxfp4.format import (
    BLOCK,
    LARGEST_SCALE,
    SCALE_ADDENDS,
    SCALE_BIAS,
    SCALE_NAN,
    SMALLEST_SCALE,
    VALUES,
    ZERO_BLOCK_SCALE,
    ScaleMode,
    check_packed,
    check_weight,
)

CHUNK_WEIGHTS = 1 << 20  # weights that are worked on at a time: temporaries of a few MB, whatever the matrix
MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between the magnitudes of codes 0 and 1, 1 and 2, ...


def quantize(
    weight: Float[Tensor, "n k"], *, scale_mode: ScaleMode = "even"
) -> tuple[UInt8[Tensor, "n half_k"], UInt8[Tensor, "n blocks"]]:
    """Codes and scale bytes of a weight, computed in float32. A block with an infinity or a NaN gets the NaN scale and codes 0.

    A negative weight keeps its sign bit when it rounds to zero (code 8).

    Raises:
        ValueError: not a matrix of floats with K a multiple of 32.

    """
    check_weight(weight)
    n, k = weight.shape
    packed = torch.empty(n, k // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(n, k // BLOCK, dtype=torch.uint8, device=weight.device)
    rows = max(1, CHUNK_WEIGHTS // k)
    for first in range(0, n, rows):
        part = slice(first, first + rows)
        blocks = weight[part].detach().float().reshape(-1, k // BLOCK, BLOCK)
        byte = scale_bytes(blocks.abs().amax(-1), scale_mode)
        scales[part] = byte.to(torch.uint8)
        reciprocal = ((2 * SCALE_BIAS - byte) << 23).view(torch.float32).unsqueeze(-1)  # 2^(127 - b), exact
        code = codes(blocks * reciprocal).masked_fill((byte == SCALE_NAN).unsqueeze(-1), 0).view(-1, k // 2, 2)
        packed[part] = code[..., 0] | code[..., 1] << 4
    return packed, scales


def scale_bytes(amax: Float[Tensor, "*blocks"], scale_mode: ScaleMode) -> Int32[Tensor, "*blocks"]:
    """Scale bytes of blocks whose largest magnitude is `amax`, float32."""
    exponent = (amax.view(torch.int32) + SCALE_ADDENDS[scale_mode]) >> 23  # 127 for 1.0
    byte = (exponent - 2).clamp(SMALLEST_SCALE, LARGEST_SCALE)
    byte = byte.masked_fill(amax == 0, ZERO_BLOCK_SCALE)
    return byte.masked_fill(~amax.isfinite(), SCALE_NAN)


def codes(scaled: Float[Tensor, "*weights"]) -> UInt8[Tensor, "*weights"]:
    """Nearest code of each value, ties to the even code; beyond 6 the code of 6."""
    size = scaled.abs()
    magnitude = torch.zeros_like(size, dtype=torch.uint8)
    for upper, middle in enumerate(MIDDLES, start=1):
        magnitude += size >= middle if upper % 2 == 0 else size > middle
    return magnitude | torch.signbit(scaled).to(torch.uint8) << 3


def dequantize(
    packed: UInt8[Tensor, "n half_k"], scales: UInt8[Tensor, "n blocks"], dtype: torch.dtype = torch.bfloat16
) -> Float[Tensor, "n k"]:
    """Values by the table, for every scale byte: 255 gives NaN, magnitudes from 2^128 infinity, all others are exact in bfloat16.

    Raises:
        ValueError: tensors that are no MXFP4 pair.

    """
    check_packed(packed, scales)
    n, half = packed.shape
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).view(n, half * 2 // BLOCK, BLOCK)
    values = torch.tensor(VALUES, device=packed.device)[nibbles.int()]
    return (values * scale_values(packed.device)[scales.int()].unsqueeze(-1)).view(n, 2 * half).to(dtype)


def scale_values(device: torch.device) -> Float[Tensor, "256"]:
    """2^(b - 127) for each scale byte b; 2^-127 is subnormal in float32, and exact."""
    return torch.tensor([2.0 ** (byte - SCALE_BIAS) for byte in range(SCALE_NAN)] + [math.nan], device=device)
