"""Whether a noisy series has risen since its start, or fallen from its best, beyond what its own noise explains.

The noise of batches is correlated: a policy that drifts, tasks that come in an order. So the standard error of a mean over a
window is not taken from the scatter of single values, but from how the means of neighbouring blocks differ: the long-run variance
of Wu and Zhao (2007), "Inference of trends in time series", J. R. Statist. Soc. B 69, with three changes. Differences are second
ones, which a steady rise leaves at 0, at all places (Hadamard's variance, of clocks). The largest estimate over block lengths
counts, since nobody knows how long the memory is. And as many of the largest differences as a jump makes are left out: learning
and collapse look like that, and would count as noise.
How often verdicts are wrong is simulated by `benchmarks/verdict.py`; figures in docs/metrics.md.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

FEWEST = 18  # values; of fewer there are no blocks of two, and correlated noise is taken for a trend
FEWEST_BLOCKS = 9  # of which the noise is estimated
JUMP = 2  # second differences between blocks that a jump makes large
SHORTEST = 4  # values of a window
ERRORS = 3.8  # standard errors of a rise in a long series: windows of many lengths are tried, and every step is a new look
SHORT_SERIES = 7.0  # values with which twice the errors are asked for: few blocks tell little about noise
FALL_FACTOR = 1.15  # of the errors of a rise: the best window was picked among many places
HOLD = ((20, 10), (10, 20))  # a change must have shown n / 20 and n / 10 values ago too, or 10 and 20, whichever is less

FloatArray: TypeAlias = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Shift:
    """Two windows of a series, and the difference of their means."""

    before: float
    after: float
    steps_before: tuple[int, int]  # first and last step of the window
    steps_after: tuple[int, int]
    errors: float  # the difference, after less before, in its standard errors

    @property
    def difference(self) -> float:
        return self.after - self.before


@dataclass(frozen=True)
class Trend:
    """What can be said about a series of at least `FEWEST` values."""

    values: int
    noise: float  # long-run standard deviation of one value
    first: float  # mean of the first third
    last: float  # mean of the last third
    rise: Shift  # from the start to now, over the windows where it is most certain; may be negative
    fall: Shift | None  # from the best to now, likewise, where as much was lost as was asked for
    rose: bool
    fell: bool
    detectable: float  # the difference between the first and the last third that would be called a rise, now or a few values ago


def errors_needed(values: int) -> float:
    """Standard errors from which a rise in a series of so many values is called one."""
    return ERRORS * (1 + SHORT_SERIES / values)


def trend(steps: Sequence[int], values: Sequence[float], *, least_fall: float = 0.0, share_lost: float = 0.5) -> Trend | None:
    """The trend of a series; None when it is shorter than `FEWEST`.

    Args:
        steps: of the values, ascending.
        values: finite.
        least_fall: falls by less are none.
        share_lost: of what had been gained over the start: falls by less are none.
    """
    size = len(values)
    if size < FEWEST:
        return None
    series = np.asarray(values, dtype=np.float64)
    now = _Windows.of(steps, series)
    lags = {min(size // share, most) for share, most in HOLD}
    looks = [now, *(_Windows.of(steps, series[: max(FEWEST, size - lag)]) for lag in lags)]
    rises = [look.rise() for look in looks]
    falls = [look.fall(least_fall, share_lost) for look in looks]
    third = now.third
    return Trend(
        values=size,
        noise=now.noise,
        first=now.mean(0, third),
        last=now.mean(size - third, third),
        rise=rises[0],
        fall=falls[0],
        rose=all(rise.errors >= errors_needed(look.size) for look, rise in zip(looks, rises, strict=True)),
        fell=all(
            fall is not None and -fall.errors >= FALL_FACTOR * errors_needed(look.size)
            for look, fall in zip(looks, falls, strict=True)
        ),
        detectable=min(look.detectable for look in looks),
    )


def long_run_deviation(series: FloatArray) -> float:
    """Standard deviation that one value would have, were all independent and their means as uncertain as they are.

    With L the length of a block and A its mean, L / 6 * mean of (A[i-L] - 2 A[i] + A[i+L])**2 over all places i is the variance;
    the largest over L = 1, 2, 4, ... that leave `FEWEST_BLOCKS`. For L = 1 all differences count too: a jump is little among so
    many, and where rewards are rare, nothing else may be left.
    """
    sums = np.concatenate([[0.0], np.cumsum(series - series.mean())])
    largest, length = float(np.square(np.diff(series, n=2)).mean()) / 6, 1
    while length == 1 or len(series) // length >= FEWEST_BLOCKS:
        means = (sums[length:] - sums[:-length]) / length
        differences = means[: -2 * length] - 2 * means[length:-length] + means[2 * length :]
        left_out = JUMP / (len(series) / length - 2)
        largest = max(largest, length / 6 * _trimmed_mean_square(differences, left_out))
        length *= 2
    return math.sqrt(largest)


def _trimmed_mean_square(values: FloatArray, left_out: float) -> float:
    """Mean square without this share of the values, the largest ones, corrected to be that of all where they are normal."""
    count = len(values) - math.ceil(left_out * len(values))
    squares = np.partition(np.square(values), count - 1)[:count]
    kept = count / len(values)
    bound = NormalDist().inv_cdf((1 + kept) / 2)
    share = 1 - 2 * bound * NormalDist().pdf(bound) / kept  # variance of a standard normal variable within the bound
    return float(squares.mean()) / share


@dataclass(frozen=True)
class _Windows:
    """Means over any window of a series, from its sums."""

    steps: Sequence[int]
    sums: FloatArray  # of the values less `offset`, so that large rewards lose no digits
    offset: float
    noise: float

    @classmethod
    def of(cls, steps: Sequence[int], series: FloatArray) -> "_Windows":
        sums = np.concatenate([[0.0], np.cumsum(series - series[0])])
        return cls(steps, sums, float(series[0]), long_run_deviation(series))

    @property
    def size(self) -> int:
        return len(self.sums) - 1

    @property
    def third(self) -> int:
        return max(SHORTEST, self.size // 3)

    @property
    def detectable(self) -> float:
        """The difference between the first and the last third that would be called a rise."""
        return errors_needed(self.size) * self.noise * math.sqrt(2 / self.third)

    def mean(self, start: int, width: int) -> float:
        return self.offset + float(self.sums[start + width] - self.sums[start]) / width

    def rise(self) -> Shift:
        """From a window at the start to one at the end, of the lengths where it is most certain."""
        widths = list(self._widths())
        pairs = (self._shift(0, before, self.size - after, after) for before in widths for after in widths)
        return max(pairs, key=lambda shift: shift.errors)

    def fall(self, least: float, share_lost: float) -> Shift | None:
        """From the best window to one of its length at the end, likewise; None where too little was lost."""
        found = (self._fall(width) for width in self._widths())
        enough = (shift for shift, gained in found if -shift.difference > max(least, share_lost * gained, 0.0))
        return min(enough, key=lambda shift: shift.errors, default=None)

    def _fall(self, width: int) -> tuple[Shift, float]:
        """The fall from the best window of a width, and what had been gained there over the start."""
        totals = (self.sums[width:] - self.sums[:-width])[: self.size - 2 * width + 1]
        shift = self._shift(int(totals.argmax()), width, self.size - width, width)
        return shift, shift.before - self.mean(0, width)

    def _widths(self) -> Iterator[int]:
        """A third of the series, a sixth, ... down to half its square root: shorter ones would follow single outliers."""
        width = self.third
        while width >= max(SHORTEST, round(math.sqrt(self.size) / 2)):
            yield width
            width //= 2

    def _shift(self, start: int, before: int, end: int, after: int) -> Shift:
        means = self.mean(start, before), self.mean(end, after)
        error = self.noise * math.sqrt(1 / before + 1 / after)
        return Shift(
            *means,
            steps_before=(self.steps[start], self.steps[start + before - 1]),
            steps_after=(self.steps[end], self.steps[end + after - 1]),
            errors=_in_errors(means[1] - means[0], error),
        )


def _in_errors(difference: float, error: float) -> float:
    """The difference in standard errors; a series without noise shows any difference beyond doubt."""
    if error > 0:
        return difference / error
    return 0.0 if difference == 0 else math.copysign(math.inf, difference)
