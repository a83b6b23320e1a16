"""A policy that moves from version to version, what a trainer says of it in canaries, and what engines answer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from turnwise.transport import Canary, adapter_name

Fault = Literal["none", "version before", "no adapter", "half of the adapter"]


@dataclass
class MovingPolicy:
    """Logprobs of random sequences, which every version moves by `change` nats a token.

    Trainer and engine add rounding noise of `noise` nats each. Tokens differ: certain ones hardly move and are hardly rounded.
    """

    change: float = 0.1
    noise: float = 0.05
    tokens: int = 256
    count: int = 2  # canaries of a version
    seed: int = 0
    exact: dict[tuple[int, ...], dict[str, np.ndarray]] = field(default_factory=dict)  # by sequence, then by what is served

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def canaries(self, version: int) -> list[Canary]:
        """Of the announcement of a version: none of version 0."""
        return [self._canary(version) for _ in range(self.count if version else 0)]

    def engine(self, fault: Fault = "none", *, first: int = 0) -> Callable[[dict[str, Any]], list[float]]:
        """What an engine answers to a request: with a fault from version `first` on."""

        def answer(body: dict[str, Any]) -> list[float]:
            known = self.exact[tuple(body["prompt"])]
            version = int(body["model"][1:]) if body["model"].startswith("v") else None
            served = known["now"] if version is None else known[body["model"]]  # a KeyError is a request for another version
            if version is None or version >= first:
                wrong = {
                    "version before": known["before"],
                    "no adapter": known["base"],
                    "half of the adapter": (served + known["base"]) / 2,
                }
                served = wrong.get(fault, served)
            return self._rounded(served, known["scale"])

        return answer

    def _canary(self, version: int) -> Canary:
        ids = self.rng.integers(0, 256, self.tokens + 1).tolist()
        scale = self.rng.gamma(0.7, 1 / 0.7, self.tokens)
        base = -2 - scale * self.rng.exponential(1.0, self.tokens)
        before = base + scale * self.rng.normal(size=self.tokens) * self.change * np.sqrt(version - 1)
        now = before + scale * self.rng.normal(size=self.tokens) * self.change
        self.exact[tuple(ids)] = {"base": base, "before": before, "now": now, adapter_name(version): now, "scale": scale}
        return Canary(ids, *(self._rounded(values, scale) for values in (now, before, base)))

    def _rounded(self, exact: np.ndarray, scale: np.ndarray) -> list[float]:
        return (exact + self.noise * scale * self.rng.normal(size=self.tokens)).tolist()
