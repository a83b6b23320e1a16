"""How far quantised weights are from what they were."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from turnwise.kernels.mxfp4.ops import dequantize

CHUNK_WEIGHTS = 1 << 22


@dataclass(frozen=True)
class ErrorReport:
    """Error of one weight, or of several together."""

    weights: int
    nonzero: int
    signal: float  # sum of squares of the weights
    noise: float  # sum of squares of the errors
    relative: float  # sum of |error| / |weight| over the weights that are not zero

    @property
    def frobenius(self) -> float:
        """||W - Wq|| / ||W||, 0 for a weight of zeros."""
        return math.sqrt(self.noise / self.signal) if self.signal else 0.0

    @property
    def sqnr_db(self) -> float:
        """Signal to quantisation noise, in decibels."""
        return 10 * math.log10(self.signal / self.noise) if self.noise and self.signal else math.inf

    @property
    def mean_relative(self) -> float:
        """Mean of |error| / |weight| over the weights that are not zero."""
        return self.relative / self.nonzero if self.nonzero else 0.0

    def __add__(self, other: "ErrorReport") -> "ErrorReport":
        return ErrorReport(
            self.weights + other.weights,
            self.nonzero + other.nonzero,
            self.signal + other.signal,
            self.noise + other.noise,
            self.relative + other.relative,
        )

    def __str__(self) -> str:
        return f"Frobenius {self.frobenius:.1%}, SQNR {self.sqnr_db:.1f} dB, mean relative error {self.mean_relative:.1%}"


def error_report(
    weight: Float[Tensor, "n k"], packed: UInt8[Tensor, "n half_k"], scales: UInt8[Tensor, "n blocks"]
) -> ErrorReport:
    """Error of `packed` and `scales` as an approximation of `weight`; sums in float64. Reports of several layers add up with `+`.

    Raises:
        ValueError: the shapes do not belong together.

    """
    if weight.shape != (packed.shape[0], packed.shape[1] * 2):
        raise ValueError(f"a weight of shape {list(weight.shape)} has no codes of shape {list(packed.shape)}")
    totals = torch.zeros(4, dtype=torch.float64, device=weight.device)
    rows = max(1, CHUNK_WEIGHTS // max(1, weight.shape[1]))
    for part, codes, scale in zip(weight.split(rows), packed.split(rows), scales.split(rows), strict=True):
        exact = part.double()
        error = (exact - dequantize(codes, scale, torch.float32)).abs_()
        magnitude = exact.abs()
        relative = torch.where(magnitude > 0, error / magnitude, 0.0)
        totals += torch.stack([(magnitude > 0).sum().double(), exact.square().sum(), error.square().sum(), relative.sum()])
    nonzero, signal, noise, relative = totals.tolist()
    return ErrorReport(weight.numel(), int(nonzero), signal, noise, relative)
