"""MXFP4 a second time, slowly: numpy in float64, exponents from frexp, codes by looking at all of them.

Shares nothing with `turnwise.kernels.mxfp4` but the layout of the bytes.
"""

import math

import numpy as np
import torch
from torch import Tensor

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def scale_exponent(amax: float, mode: str) -> int:
    """log2 of the scale, before it is limited."""
    fraction, exponent = math.frexp(amax)  # amax = fraction * 2^exponent with 0.5 <= fraction < 1
    if mode == "floor":
        return exponent - 1 - 2
    if mode == "even":
        return exponent - 1 - 2 + (fraction >= 1.75 / 2)
    if mode == "ceil":
        return math.ceil(math.log2(fraction)) + exponent - 2 if fraction > 0.5 else exponent - 1 - 2
    smallest = exponent - 10
    while 6.0 * math.ldexp(1.0, smallest) < amax:
        smallest += 1
    return smallest


def nearest_code(magnitude: float) -> int:
    """Of the eight magnitudes the nearest, of two the one with the even code."""
    return min(range(8), key=lambda code: (abs(E2M1[code] - magnitude), code % 2))


def quantize(weight: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Codes [N, K/2] and scale bytes [N, K/32] of a finite weight."""
    values = weight.double().numpy()
    n, k = values.shape
    codes = np.zeros((n, k), dtype=np.uint8)
    scales = np.zeros((n, k // 32), dtype=np.uint8)
    for row in range(n):
        for block in range(k // 32):
            part = values[row, block * 32 : block * 32 + 32]
            amax = float(np.abs(part).max())
            byte = min(252, max(1, 127 + scale_exponent(amax, mode))) if amax > 0 else 127
            scales[row, block] = byte
            for i, value in enumerate(part):
                sign = math.copysign(1.0, value) < 0
                codes[row, block * 32 + i] = nearest_code(abs(math.ldexp(float(value), 127 - byte))) + 8 * sign
    return torch.from_numpy(codes[:, 0::2] + 16 * codes[:, 1::2]), torch.from_numpy(scales)


def value(code: int, byte: int) -> float:
    """What a code is worth under a scale byte, in bfloat16."""
    if byte == 255:
        return math.nan
    exact = math.ldexp(E2M1[code & 7], byte - 127)
    return math.copysign(exact if exact < 2.0**128 else math.inf, -1.0 if code & 8 else 1.0)


def every_byte() -> tuple[Tensor, Tensor]:
    """Codes [256, 256] and scales [256, 16]: each of the 256 code bytes under each of the 256 scale bytes."""
    byte = torch.arange(256, dtype=torch.uint8)
    return byte.repeat(256, 1), byte.unsqueeze(1).repeat(1, 16)


def every_value() -> Tensor:
    """What `every_byte` decodes to, float64 [256, 512]."""
    rows = [[value(code, byte) for pair in range(256) for code in (pair & 15, pair >> 4)] for byte in range(256)]
    return torch.tensor(rows, dtype=torch.float64)


def wide_range(n: int, k: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights whose blocks lie anywhere between 2^-140 and 2^127, some of them zero, with values half-way between codes."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(n, k // 32, 32, generator=generator)
    grid = torch.randint(-28, 29, blocks.shape, generator=generator) / 4
    blocks = torch.where(torch.rand(blocks.shape, generator=generator) < 0.4, grid, blocks)
    exponents = torch.randint(-140, 124, (n, k // 32, 1), generator=generator).float()
    blocks = (blocks.double() * torch.exp2(exponents.double())).to(dtype).double()
    limit = torch.finfo(dtype).max
    blocks = blocks.clamp(-limit, limit) * (torch.rand(n, k // 32, 1, generator=generator) < 0.95)
    return blocks.to(dtype).reshape(n, k)
