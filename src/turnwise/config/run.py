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


Artifacts = Literal["none", "adapter", "checkpoints"]


class WandbConfig(Config):
    """Weights & Biases."""

    project: str = "turnwise"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = Field(default_factory=list)
    mode: Literal["online", "offline", "disabled"] = "online"
    """`offline` writes under `outputs/wandb` without an account, for `wandb sync`."""

    samples: int = Field(default=4, ge=0)
    """Rollouts of a step and of an evaluation, from best to worst, in the tables `samples/train` and `samples/held_out`."""

    samples_interval: int | None = Field(default=None, ge=1)
    """Steps between rows of `samples/train`; a hundredth of `max_steps` when unset: W&B shows a table's last 100 additions."""

    artifacts: Artifacts = "adapter"
    """What of each checkpoint is uploaded: the LoRA adapter, all of it (optimiser state too, to resume from), or nothing."""


class MlflowConfig(Config):
    """MLflow."""

    tracking_uri: str | None = None
    """Server as `http://host:port`, or whatever store MLflow takes; MLFLOW_TRACKING_URI when unset."""

    experiment: str = "turnwise"
    """Experiment that the run belongs to; made where there is none."""

    tags: dict[str, str] = Field(default_factory=dict)
    """Tags of the run."""

    artifacts: Artifacts = "adapter"
    """What of each checkpoint is uploaded, as in `[wandb]`."""


class MonitorConfig(Config):
    """Where metrics go besides metrics.jsonl."""

    tensorboard: bool = True
    """Event files under `outputs/tensorboard`."""

    log_samples: int = Field(default=2, ge=0)
    """Rollouts printed to the orchestrator's log at each step."""

    upload_timeout_s: float = Field(default=300.0, gt=0)
    """Seconds that the end of a run waits for what is still to be uploaded to W&B or MLflow."""
