"""What `[inference.noise]` comes to in a run, in a sentence."""

from turnwise.config import ConfigError, RLConfig
from turnwise.inference.noise import noise_schedule
from turnwise.launch.arithmetic import Arithmetic


def check_noise(arithmetic: Arithmetic, config: RLConfig) -> None:
    """Raises ConfigError when the stages of the noise cannot be laid out over the steps of the run."""
    if config.inference.noise is None:
        return
    try:
        noise_schedule(config.inference.noise, max_steps=arithmetic.max_steps, steps_per_epoch=arithmetic.steps_per_epoch)
    except ValueError as error:
        raise ConfigError(f"{error}.") from error


def noise_lines(arithmetic: Arithmetic, config: RLConfig) -> list[str]:
    """The stages of the noise; none where there is none. Raises ConfigError as `check_noise`."""
    noise, steps = config.inference.noise, arithmetic.max_steps
    if noise is None:
        return []
    check_noise(arithmetic, config)
    per_epoch = arithmetic.steps_per_epoch
    where = f"{noise.stages} stages of {steps / noise.stages:.3g} steps, the first without"
    if noise.epoch_aware:
        length = per_epoch / (noise.stages + 1)
        where = f"{noise.stages} stages of {length:.3g} steps in each epoch, after {length:.3g} steps without"
    return [
        f"noise in the norms of the policy that samples: sigma {noise.sigma_start:g} to {noise.sigma_end:g} in {where}; "
        "evaluations see none, and have the engines to themselves"
    ]
