"""Engine beside trainer: logprobs of the sampled tokens, and which other temperature or place would explain a difference."""

import time

import numpy as np

from turnwise.diagnose.probe_report import Agreement, Logprobs, Scanned
from turnwise.diagnose.probing.tokens import Tokens, Vector, kl, measure
from turnwise.trainer.step import Learner, Passes

TEMPERATURES = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.5, 2.0)
SHIFTS = (-1, 0, 1)


def compare(learner: Learner, passes: Passes, tokens: Tokens) -> tuple[Logprobs, Vector]:
    """The comparison, and the trainer's logprobs; a collective."""
    began = time.perf_counter()
    wanted = scanned_temperatures(passes.temperature)
    trainer, plain = measure(learner, passes, wanted)
    seconds = time.perf_counter() - began
    temperatures = [
        Scanned(value, _gap(tokens.engine, row), _gap(trainer, row)) for value, row in zip(wanted, plain, strict=True)
    ]
    shifts = [_shifted(tokens, trainer, shift) for shift in SHIFTS]
    return Logprobs(agreement(trainer, tokens.engine), temperatures, shifts, seconds), trainer


def scanned_temperatures(temperature: float) -> list[float]:
    """Hypotheses: some round ones; the configured, left out, applied twice, and multiplied instead of divided."""
    return sorted({round(value, 4) for value in (*TEMPERATURES, temperature, temperature**2, 1 / temperature)})


def agreement(a: Vector, b: Vector) -> Agreement:
    """Of logprobs `a` with logprobs `b`, by which the tokens were sampled."""
    difference = a - b
    spread = float(np.std(a) * np.std(b))
    together = float(np.mean((a - a.mean()) * (b - b.mean())))
    return Agreement(
        mean=float(np.abs(difference).mean()),
        largest=float(np.abs(difference).max()),
        bias=float(difference.mean()),
        kl=kl(a, b),
        correlation=together / spread if spread > 0 else float("nan"),
    )


def _shifted(tokens: Tokens, trainer: Vector, shift: int) -> Scanned:
    """Recorded logprobs beside those of the token `shift` places later in the same sample."""
    count = len(trainer)
    here = np.arange(max(0, -shift), min(count, count - shift))
    there = here + shift
    inside = tokens.samples[here] == tokens.samples[there]
    here, there = here[inside], there[inside]
    return Scanned(float(shift), _gap(tokens.engine[here], trainer[there]), _gap(trainer[here], trainer[there]))


def _gap(a: Vector, b: Vector) -> float:
    return float(np.abs(a - b).mean()) if len(a) else float("nan")
