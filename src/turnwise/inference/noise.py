"""The schedule of adaptive quantisation noise (AQN; QeRL, arXiv 2510.11696): sigma as a function of the optimiser step.

Pure functions, without torch. A step is the number of optimiser steps taken, which is the version of the policy that samples.
"""

from collections.abc import Callable
from dataclasses import dataclass

from turnwise.config import NoiseConfig

FEWEST_STAGES = 3  # with 1 there is none with noise, and between the ends of 2 - 1 stages no ratio can be formed


@dataclass(frozen=True)
class Stage:
    """What the schedule says of a step."""

    number: int  # 0 is the one without noise
    sigma: float


Schedule = Callable[[int], Stage]


def noise_schedule(config: NoiseConfig, *, max_steps: int, steps_per_epoch: int) -> Schedule:
    """The schedule of a run.

    Args:
        config: its ends and stages.
        max_steps: optimiser steps of the run.
        steps_per_epoch: optimiser steps of one pass over the training tasks, rounded down; the epoch-aware variant needs it.

    Raises:
        ValueError: the stages cannot be laid out.
    """
    ends, stages = (config.sigma_start, config.sigma_end), config.stages
    _check(stages, max_steps)
    if not config.epoch_aware:
        return lambda step: run_stage(step, steps=max_steps, stages=stages, ends=ends)
    if steps_per_epoch < 1:
        raise ValueError(
            "inference.noise.epoch_aware = true divides epochs into stages, and one step takes more than an epoch of rollouts; "
            "use a smaller orchestrator.batch_size, or epoch_aware = false"
        )
    epochs = -(-max_steps // steps_per_epoch)  # those that begin
    return lambda step: epoch_stage(step, steps_per_epoch=steps_per_epoch, epochs=epochs, stages=stages, ends=ends)


def run_stage(step: int, *, steps: int, stages: int, ends: tuple[float, float]) -> Stage:
    """The stage of a step where `stages` of equal length fill the run: the first without noise, then from ends[0] to ends[1].

        stage = int(min(step, steps) // (steps / stages));  trend[i] = s0 (s1 / s0)^(i / (stages - 2));  sigma = trend[stage - 1]

    Raises:
        ValueError: there are too few stages, or no steps.
    """
    _check(stages, steps)
    number = min(int(min(step, steps) // (steps / stages)), stages - 1)
    return Stage(number, 0.0 if number == 0 else geometric(ends, number - 1, stages - 1))


def epoch_stage(step: int, *, steps_per_epoch: int, epochs: int, stages: int, ends: tuple[float, float]) -> Stage:
    """The stage of a step where every epoch has its own: one interval without noise, then `stages` intervals with it.

    Epoch e of E begins at b_e = s0 (s1 / s0)^(e / E) and falls geometrically to b_(e+1), both included. A step after the last
    epoch is in its last stage.

    Raises:
        ValueError: there are too few stages, or no steps.
    """
    _check(stages, steps_per_epoch * epochs)
    epoch = min(step // steps_per_epoch, epochs - 1)
    within = min(step - epoch * steps_per_epoch, steps_per_epoch)
    number = min(int(within // (steps_per_epoch / (stages + 1))), stages)
    if number == 0:
        return Stage(0, 0.0)
    begin, end = (geometric(ends, e, epochs + 1) for e in (epoch, epoch + 1))
    return Stage(number, geometric((begin, end), number - 1, stages))


def geometric(ends: tuple[float, float], index: int, count: int) -> float:
    """Value `index` of `count` that go from ends[0] to ends[1] by a constant ratio; `count` is 2 or more."""
    first, last = ends
    if index == count - 1:
        return last
    return first * (last / first) ** (index / (count - 1))


def _check(stages: int, steps: int) -> None:
    if stages < FEWEST_STAGES:
        raise ValueError(f"inference.noise.stages = {stages}: noise needs at least {FEWEST_STAGES} stages; 10 is usual")
    if steps < 1:
        raise ValueError(f"noise over {steps} steps has no stages; a run has at least one step")
