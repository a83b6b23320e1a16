"""The whole configuration of a run: what `rl @ FILE` reads and `outputs/config.toml` holds."""

from pathlib import Path

from pydantic import Field

from turnwise.config.base import Config
from turnwise.config.inference import InferenceConfig
from turnwise.config.model import GpusConfig, ModelConfig
from turnwise.config.orchestrator import OrchestratorConfig
from turnwise.config.run import CkptConfig, MonitorConfig, StopConfig, WandbConfig
from turnwise.config.trainer import TrainerConfig


class RLConfig(Config):
    """Reinforcement learning of a language model in multi-turn environments."""

    output_dir: Path = Path("outputs")
    """Folder of the run; relative to where you are."""

    run_name: str | None = None
    """Name in W&B and TensorBoard; the output folder's when unset."""

    trajectories_dir: Path | None = None
    """Folder of the rollouts, one JSONL a step; `output_dir/trajectories` when unset."""

    max_steps: int | None = Field(default=None, ge=1)
    """Optimiser steps. Give this or `epochs`."""

    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training tasks, instead of `max_steps`."""

    seq_len: int = Field(default=2048, ge=8)
    """Most tokens of one training sample: prompt, replies and observations together."""

    seed: int = Field(default=0, ge=0)
    """Seed of tasks, sampling and initialisation."""

    model: ModelConfig = ModelConfig()
    gpus: GpusConfig = GpusConfig()
    inference: InferenceConfig = InferenceConfig()
    orchestrator: OrchestratorConfig = OrchestratorConfig()
    trainer: TrainerConfig = TrainerConfig()
    stop: StopConfig = StopConfig()
    ckpt: CkptConfig = CkptConfig()
    monitor: MonitorConfig = MonitorConfig()
    wandb: WandbConfig | None = None
    """Set the table to track the run in Weights & Biases."""

    @property
    def adapter_slots(self) -> int:
        """Adapter versions that an engine keeps loaded: an evaluation holds one beside those of training."""
        return self.inference.max_loras or self.orchestrator.max_staleness + 3

    @property
    def deterministic(self) -> bool:
        """Whether the embedded engine's replies repeat to the bit."""
        chosen = self.inference.embedded.deterministic
        return self.orchestrator.max_staleness == 0 if chosen is None else chosen
