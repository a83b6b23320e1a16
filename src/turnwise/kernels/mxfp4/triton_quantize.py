"""Quantise in Triton: one pass over the weight, the same bits as the reference."""
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from jaxtyping import Float, UInt8
from torch import Tensor

from turnwise.kernels.mxfp4.format import (
    BLOCK,
    LARGEST_SCALE,
    SCALE_ADDENDS,
    SCALE_NAN,
    SMALLEST_SCALE,
    ZERO_BLOCK_SCALE,
    ScaleMode,
)

WARPS = 4
BLOCKS = 64  # blocks of 32 weights of one program: 16 values a thread

_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
_LARGEST_SCALE = tl.constexpr(LARGEST_SCALE)
_ZERO_BLOCK_SCALE = tl.constexpr(ZERO_BLOCK_SCALE)
_SCALE_NAN = tl.constexpr(SCALE_NAN)


@triton.jit
def _quantize_kernel(weight_ptr, words_ptr, scales_ptr, blocks, ADDEND: tl.constexpr, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    live = block < blocks
    weight = tl.load(weight_ptr + block[:, None] * 32 + tl.arange(0, 32)[None, :], mask=live[:, None], other=0.0)
    if weight_ptr.dtype.element_ty == tl.bfloat16:  # by its bits: Triton's interpreter converts subnormals wrongly
        bits = weight.to(tl.int16, bitcast=True).to(tl.int32) << 16
    else:
        bits = weight.to(tl.float32).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF

    # Magnitudes of floats are ordered like their bits, NaN above infinity above all others.
    amax = tl.max(magnitude, axis=1)
    byte = tl.minimum(tl.maximum(((amax + ADDEND) >> 23) - 2, _SMALLEST_SCALE), _LARGEST_SCALE)
    byte = tl.where(amax == 0, _ZERO_BLOCK_SCALE, byte)
    finite = amax < 0x7F800000
    byte = tl.where(finite, byte, _SCALE_NAN)

    reciprocal = ((254 - tl.where(finite, byte, 127)) << 23).to(tl.float32, bitcast=True)
    scaled = magnitude.to(tl.float32, bitcast=True) * reciprocal[:, None]
    # Below 1 the codes are multiples of 0.5, the spacing of floats at 2^22: an addition rounds to the nearest, ties to even. From
    # 1 on they are floats with one bit of mantissa: rounding the bits carries into the exponent, as it should.
    below = (scaled + 4194304.0).to(tl.int32, bitcast=True) & 7
    scaled_bits = scaled.to(tl.int32, bitcast=True)
    above = ((scaled_bits + 0x1FFFFF + ((scaled_bits >> 22) & 1)) >> 22) - 252
    code = tl.minimum(tl.where(scaled < 1.0, below, above), 7) | ((bits >> 28) & 8)
    code = tl.where(finite[:, None], code, 0)

    eights = tl.reshape(code, (BLOCKS, 4, 8)) << (tl.arange(0, 8) * 4)[None, None, :]
    words = tl.sum(eights, axis=2)  # the bits are disjoint
    tl.store(words_ptr + block[:, None] * 4 + tl.arange(0, 4)[None, :], words, mask=live[:, None])
    tl.store(scales_ptr + block, byte.to(tl.uint8), mask=live)


def quantize(weight: Float[Tensor, "n k"], scale_mode: ScaleMode) -> tuple[UInt8[Tensor, "n half_k"], UInt8[Tensor, "n blocks"]]:
    """Codes and scale bytes of a contiguous weight with K a multiple of 32; a block that is not finite gets the NaN scale."""
    n, k = weight.shape
    packed = torch.empty(n, k // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(n, k // BLOCK, dtype=torch.uint8, device=weight.device)
    blocks = scales.numel()
    if blocks:
        grid = (triton.cdiv(blocks, BLOCKS),)
        addend = SCALE_ADDENDS[scale_mode]
        _quantize_kernel[grid](weight, packed.view(torch.int32), scales, blocks, ADDEND=addend, BLOCKS=BLOCKS, num_warps=WARPS)
    return packed, scales
