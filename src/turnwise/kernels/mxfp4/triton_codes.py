"""What the Triton kernels share: decoding eight codes at a time, two to a register.

A word of 32 bits holds the codes of eight neighbouring k. Shifted by six bits, the three magnitude bits of a code are exponent
and mantissa of a bfloat16 that is 2^-126 times too small (0.5 is subnormal there), and two codes that lie 16 bits apart are
decoded by the same operations: per word 7 shifts, 8 logical operations and, to scale, 4 multiplications of pairs. Every product
is exact.

Triton's interpreter knows no inline assembly and computes `tl.dot` of bfloat16 wrongly, hence the two branches on INTERPRETED.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")

SIGNS = tl.constexpr(0x8000_8000)  # of a pair of bfloat16
MAGNITUDES = tl.constexpr(0x01C0_01C0)  # three bits of each, where code << 6 leaves them
TWO_POW_126 = tl.constexpr(0x7E80_7E80)  # as a pair
NAN = tl.constexpr(0x7FC0_7FC0)
ONE_EXPONENT = tl.constexpr(0x0080_0080)  # times b: 2^(b - 127) as a pair, but for b = 0 and 255
MINUS_ONE_EXPONENT_BIAS = tl.constexpr(0x3F00_3F00)  # added to that: 2^(b - 1)
SUBNORMAL_SCALE = tl.constexpr(0x0040_0040)  # 2^-127

SHIFTED_RIGHT = tl.constexpr("shr.u32 $0, $1, 6;")
MULTIPLY = tl.constexpr("{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }")

LARGEST_SMALL_SCALE = tl.constexpr(128)  # 2^(128 - 1) is still a bfloat16


@triton.jit
def multiply_pairs(a, b):
    """Products of bfloat16 pairs in uint32."""
    if INTERPRETED:
        lower = (a << 16).to(tl.float32, bitcast=True) * (b << 16).to(tl.float32, bitcast=True)
        upper = (a & 0xFFFF0000).to(tl.float32, bitcast=True) * (b & 0xFFFF0000).to(tl.float32, bitcast=True)
        return (upper.to(tl.uint32, bitcast=True) & 0xFFFF0000) | (lower.to(tl.uint32, bitcast=True) >> 16)
    else:
        # a * b + (-0): `mul` would need compute capability 9.0, `fma` needs 8.0.
        return tl.inline_asm_elementwise(MULTIPLY, "=r,r,r", [a, b], dtype=tl.uint32, is_pure=True, pack=1)


@triton.jit
def _shifted_right(words):
    """words >> 6, which the compiler cannot merge with a shift to the left. Where the integer pipe is the limit, one shift to the
    right for two codes is better: on Hopper shifts to the left run beside logical operations, those to the right between them."""
    if INTERPRETED:
        return words >> 6
    else:
        return tl.inline_asm_elementwise(SHIFTED_RIGHT, "=r,r", [words], dtype=tl.uint32, is_pure=True, pack=1)


@triton.jit
def unscaled_pairs(words, J: tl.constexpr, ONE_RIGHT_SHIFT: tl.constexpr = False):
    """Codes J and J + 4 of each word, as bfloat16 pairs times 2^-126."""
    if J == 0:
        sign = words << 12
        magnitude = words << 6
    elif J == 1:
        sign = words << 8
        magnitude = words << 2
    elif J == 2:
        sign = words << 4
        magnitude = _shifted_right(words) << 4 if ONE_RIGHT_SHIFT else words >> 2
    else:
        sign = words
        magnitude = _shifted_right(words) if ONE_RIGHT_SHIFT else words >> 6
    return (sign & SIGNS) | (magnitude & MAGNITUDES)


@triton.jit
def scaled_pairs(words, J: tl.constexpr, scale, SMALL_SCALES: tl.constexpr, ONE_RIGHT_SHIFT: tl.constexpr = False):
    """Codes J and J + 4 of each word times their scale, which comes from `scale_pairs`."""
    pairs = unscaled_pairs(words, J, ONE_RIGHT_SHIFT)
    if not SMALL_SCALES:
        pairs = multiply_pairs(pairs, tl.full(pairs.shape, TWO_POW_126, tl.uint32))
    return multiply_pairs(pairs, scale)


@triton.jit
def scale_pairs(byte, SMALL_SCALES: tl.constexpr):
    """Scale bytes (uint32) as bfloat16 pairs: 2^(b - 127), or under SMALL_SCALES 2^(b - 1), which saves a multiplication a pair.

    The second exists up to b = 128, a scale of 2; above, where the caller broke a promise, it is NaN.

    """
    if SMALL_SCALES:
        return tl.where(byte > LARGEST_SMALL_SCALE, NAN, byte * ONE_EXPONENT + MINUS_ONE_EXPONENT_BIAS)
    else:
        scale = tl.where(byte == 0, SUBNORMAL_SCALE, byte * ONE_EXPONENT)
        return tl.where(byte == 255, NAN, scale)


@triton.jit
def bfloat16_pairs(pairs):
    """[..., 2] bfloat16 of uint32 [...]: lower half first."""
    lower = (pairs & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    upper = (pairs >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.join(lower, upper)
