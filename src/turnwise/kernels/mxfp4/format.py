"""MXFP4 as OCP Microscaling v1.0 defines it: 4-bit floats in blocks of 32 that share a power of two.

A code is E2M1: bit 3 is the sign, bits 0-2 select one of eight magnitudes. A scale byte b is E8M0: 2^(b - 127), 255 is NaN, and
there is no zero. A weight [N, K] becomes `packed` uint8 [N, K/2], two codes a byte with the lower nibble for the even k, and
`scales` uint8 [N, K/32]: 0.53125 bytes a weight. gpt-oss stores the same bytes as [N, K/32, 16].
"""

from typing import Literal, get_args

import torch
from jaxtyping import UInt8
from torch import Tensor

BLOCK = 32  # weights along K that share a scale
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0 to 7; 8 to 15 are their negatives
VALUES = (*MAGNITUDES, *(-value for value in MAGNITUDES))

SCALE_BIAS = 127
SCALE_NAN = 255
SMALLEST_SCALE, LARGEST_SCALE = 1, 252  # what quantisation writes: 2^-126 to 2^125, so that 6 times a scale is below 2^128
ZERO_BLOCK_SCALE = 127  # any scale would do for a block of zeros; 1.0 is what others write

ScaleMode = Literal["even", "floor", "rceil", "ceil"]
SCALE_MODES: tuple[ScaleMode, ...] = get_args(ScaleMode)

# Every rule is floor(log2(amax)) - 2, where 2 is the exponent of the largest magnitude, but for when it rounds the exponent up.
# As an addend to the bits of a float32, whose mantissa then carries into the exponent:
SCALE_ADDENDS: dict[ScaleMode, int] = {
    "floor": 0,  # never (the rule of the OCP specification): amax/scale reaches 8 and saturates at 6
    "even": 0x20_0000,  # mantissa >= 1.75, which would round to the next power of two with one bit of mantissa
    "rceil": 0x3F_FFFF,  # mantissa > 1.5: ceil(log2(amax / 6)), the smallest scale at which nothing saturates
    "ceil": 0x7F_FFFF,  # mantissa > 1
}


def check_scale_mode(scale_mode: str) -> ScaleMode:
    """The mode, if it is one.

    Raises:
        ValueError: it is none.

    """
    for mode in SCALE_MODES:
        if scale_mode == mode:
            return mode
    raise ValueError(f"scale_mode = {scale_mode!r} is no rule for MXFP4 scales; use one of {', '.join(SCALE_MODES)}")


def check_weight(weight: Tensor) -> None:
    """Whether a tensor can be quantised.

    Raises:
        ValueError: it is not a matrix of floats whose second dimension is a multiple of 32.

    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"MXFP4 quantises matrices [out, in] of floats; this is {weight.dtype} of shape {list(weight.shape)}")
    if weight.shape[1] == 0 or weight.shape[1] % BLOCK:
        raise ValueError(
            f"MXFP4 needs an input dimension that is a multiple of {BLOCK}; this weight has shape {list(weight.shape)}: "
            "leave its layer in bfloat16"
        )


def check_packed(packed: UInt8[Tensor, "n half_k"], scales: UInt8[Tensor, "n blocks"]) -> None:
    """Whether two tensors belong together.

    Raises:
        ValueError: wrong dtype or shape; the message gives both and the rule.

    """
    if packed.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(f"MXFP4 codes and scales are uint8; these are {packed.dtype} and {scales.dtype}")
    fits = packed.ndim == scales.ndim == 2 and packed.shape[0] == scales.shape[0]
    if not fits or packed.shape[1] * 2 != scales.shape[1] * BLOCK:
        raise ValueError(
            f"MXFP4 codes [N, K/2] and scales [N, K/{BLOCK}] do not fit: they have shapes {list(packed.shape)} and "
            f"{list(scales.shape)}; view blocks of gpt-oss, [N, K/32, 16], as [N, K/2]"
        )


def check_operand(x: Tensor, size: int, what: str, rule: str) -> None:
    """Whether a tensor can be multiplied with a weight.

    Raises:
        ValueError: it is not of floats, or its last dimension is not `size`.
    """
    if x.ndim == 0 or x.shape[-1] != size or not x.is_floating_point():
        raise ValueError(f"{what} is {x.dtype} of shape {list(x.shape)}; it must be of floats and end in {size}, {rule}")
