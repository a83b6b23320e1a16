"""Which share of the trainer's change an engine shows, and how surely: the statistics of the canary alarm.

Over the tokens of canaries let t be the trainer's logprobs under the announced version, o those under an origin (the version
before, or the model without its adapter), and e the engine's under the announced version. The least-squares slope of e - o on
t - o,

    share = sum (e - o)(t - o) / sum (t - o)^2,

is 1 for an engine that serves the announced version, 0 for one that serves the origin, and 0.5 for half of the change.

Rounding noise. All three carry it. With a variance of s^2 in each of t and o and a mean squared change of C, the share is
(C + s^2) / (C + 2 s^2) on average for an engine that serves the announced version, and s^2 / (C + 2 s^2) for one that serves the
origin: where the change drowns in noise both approach 0.5, one from above and the other from below, however noisy the engine
itself is. So a share is compared with 0.5, and a change too small to be judged gives no alarm instead of a wrong one.

How much noise there can be in t is known from the last step: the mean of (t - before)^2 is its change and 2 s^2 together. So a
right share is at least floor = 1 - sum (t - before)^2 / (2 sum (t - o)^2): 0.5 where the origin is the version before, and nearly
1 for an adapter that many steps made. The limit is half-way between 0.5 and that floor: half of such an adapter is found too.

Standard error. The share is a ratio of sums over blocks of neighbouring tokens, and its error is that of the delete-one-block
jackknife (Efron and Stein, Ann. Statist. 9, 1981). Tokens of a block have their context in common, and at improbable tokens both
change and noise are large; the textbook error of a slope knows neither and is too small.

Evidence adds up over versions. The alarm is given when, over the newest 1, 2, 4, ... versions, the share is below the limit by
more than ERRORS standard errors, and by more of them where blocks are few.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf, sqrt

import numpy as np
from jaxtyping import Float

from turnwise.transport import Canary

BLOCK = 8  # tokens
MOST_VERSIONS = 64  # whose evidence is kept
LEAST_BLOCKS = 16.0  # effective ones, below which a standard error says nothing
ERRORS = 6.0  # by chance 1e-9 for a normal variable
SMALL_SAMPLE = 8.0  # over blocks: with 16 of them 9 errors are needed, by chance 1e-7 for Student's t with 15 degrees of freedom
HALF = 0.5

Vector = Float[np.ndarray, " values"]


@dataclass(frozen=True)
class Shown:
    """What an engine shows of a change, over some versions."""

    share: float  # 1 when it serves what was announced
    error: float  # standard error of the share
    blocks: float  # effective number: blocks of equal weight that would say as much
    floor: float  # the least that rounding leaves of a right share
    versions: int

    @property
    def limit(self) -> float:
        """The share below which something is wrong."""
        return (HALF + max(HALF, self.floor)) / 2

    @property
    def wrong(self) -> bool:
        """Whether the share is below the limit beyond doubt."""
        margin = ERRORS * (1 + SMALL_SAMPLE / max(self.blocks, 1.0)) * self.error
        return self.blocks >= LEAST_BLOCKS and self.share + margin < self.limit


@dataclass(frozen=True)
class Blocks:
    """The sums of one version, by block of tokens."""

    product: Vector  # of (e - o)(t - o)
    square: Vector  # of (t - o)^2
    step: Vector  # of (t - before)^2

    @classmethod
    def of(cls, engine: Sequence[float], canary: Canary, origin: Sequence[float]) -> "Blocks":
        """One canary.

        Raises:
            ValueError: the logprobs are of different numbers of tokens.
        """
        e, t, o, before = (np.asarray(values, dtype=np.float64) for values in (engine, canary.logprobs, origin, canary.before))
        if not e.shape == t.shape == o.shape:
            raise ValueError(f"logprobs of {len(e)}, {len(t)} and {len(o)} tokens; they must be of the same ones")
        starts = np.arange(0, len(t), BLOCK)
        sums = (np.add.reduceat(values, starts) for values in ((e - o) * (t - o), (t - o) ** 2, (t - before) ** 2))
        return cls(*sums)

    @classmethod
    def join(cls, parts: Sequence["Blocks"]) -> "Blocks":
        """All blocks of several."""
        joined = (np.concatenate([getattr(part, name) for part in parts]) for name in ("product", "square", "step"))
        return cls(*joined)


class Evidence:
    """What one engine shows of one kind of change, version by version."""

    def __init__(self) -> None:
        self._versions: deque[Blocks] = deque(maxlen=MOST_VERSIONS)

    def add(self, canaries: Sequence[Blocks]) -> None:
        """Take in the canaries of the next version."""
        self._versions.append(Blocks.join(canaries))

    def over(self, versions: int) -> Shown | None:
        """What the newest versions say together; None when nothing changed."""
        newest = list(self._versions)[-versions:]
        return shown(Blocks.join(newest), len(newest)) if newest else None

    def everything(self) -> Shown | None:
        """What all versions say together."""
        return self.over(MOST_VERSIONS)

    def against(self) -> Shown | None:
        """The fewest newest versions by which the engine is wrong; None when none are."""
        found = (self.over(versions) for versions in self._windows())
        return next((share for share in found if share is not None and share.wrong), None)

    def _windows(self) -> Iterator[int]:
        versions = 1
        while versions < 2 * len(self._versions):
            yield versions
            versions *= 2


def shown(blocks: Blocks, versions: int) -> Shown | None:
    """The share with its standard error; None when nothing changed."""
    total = float(blocks.square.sum())
    if total <= 0:
        return None
    share = float(blocks.product.sum()) / total
    effective = total**2 / float((blocks.square**2).sum())
    rest = total - blocks.square  # without one block each
    if len(rest) < 2 or float(rest.min()) <= 0:
        error = inf
    else:
        shifts = (blocks.product - share * blocks.square) / rest
        error = sqrt((1 - 1 / len(rest)) * float((shifts**2).sum()))
    return Shown(share, error, effective, 1 - float(blocks.step.sum()) / (2 * total), versions)
