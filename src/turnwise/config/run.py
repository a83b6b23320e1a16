"""The tables about the run itself: checkpoints, stop conditions, tracking."""

from typing import Literal

from pydantic import Field

from turnwise.config.base import Config


class CkptConfig(Config):
    """Checkpoints under `checkpoints/step_N`; one is always written at the end and on Ctrl-C."""

    interval: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; only at the end when unset."""

    keep_last: int | None = Field(default=3, ge=1)
    """Newest checkpoints kept; all when unset."""

    keep_best: int = Field(default=1, ge=0)
    """Checkpoints kept for the best held-out reward, beyond the newest."""


class StopConfig(Config):
    """When a run has succeeded, and when it is hopeless. Expressions over metrics of metrics.jsonl."""

    success_when: str | None = None
    """`running_mean(total_reward) > 1.5 and running_mean(feedback_reward) > 0.0`: marks the first checkpoint where it holds."""

    stop_on_success: bool = False
    """End the run there, after a last evaluation."""

    abort_when: str | None = None
    """Ends the run with exit code 4 where it holds, for example `running_mean(step_time) > 80`."""

    window: int = Field(default=20, ge=1)
    """Steps of a running mean."""

    patience: int | None = Field(default=500, ge=1)
    """Steps without a better running mean of the reward after which the run is called stuck; never when unset."""

    on_stuck: Literal["warn", "stop"] = "warn"
    """What to do about a stuck or collapsed run."""


class WandbConfig(Config):
    """Weights & Biases."""

    project: str = "turnwise"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = Field(default_factory=list)
    mode: Literal["online", "offline", "disabled"] = "online"
    """`offline` writes under `outputs/wandb` without an account."""


class MonitorConfig(Config):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = True
    """Event files under `outputs/tensorboard`."""

    log_samples: int = Field(default=2, ge=0)
    """Rollouts printed to the orchestrator's log at each step."""
