"""The whole configuration of a run: what `rl @ FILE` reads and `outputs/config.toml` holds."""

from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field, model_validator

from turnwise.config.base import Config
from turnwise.config.containers import ContainersConfig
from turnwise.config.inference import InferenceConfig
from turnwise.config.model import GpusConfig, ModelConfig
from turnwise.config.orchestrator import OrchestratorConfig
from turnwise.config.run import CkptConfig, MlflowConfig, MonitorConfig, StopConfig, WandbConfig
from turnwise.config.trainer import TrainerConfig


def shared_gpu_reserve(total: int) -> int:
    """Bytes of a shared GPU that neither engine nor trainer is given: 1.5 GiB and a fiftieth of it.

    The trainer's CUDA context takes about 0.7 GiB. vLLM goes beyond its part where its start measured nothing: logprobs of a
    canary's prompt, CUDA graphs larger than foreseen.
    """
    return 3 * 2**29 + total // 50


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
    containers: ContainersConfig = ContainersConfig()
    stop: StopConfig = StopConfig()
    ckpt: CkptConfig = CkptConfig()
    monitor: MonitorConfig = MonitorConfig()
    wandb: WandbConfig | None = None
    """Set the table to track the run in Weights & Biases."""

    mlflow: MlflowConfig | None = None
    """Set the table to track the run in MLflow."""

    @model_validator(mode="before")
    @classmethod
    def _gpus_mean_vllm(cls, tables: Any) -> Any:
        """Inference GPUs choose the engine that can use them, where nobody chose one."""
        if not isinstance(tables, dict):
            return tables
        given = cast(dict[str, Any], tables)
        gpus, inference = given.get("gpus"), given.get("inference", {})
        if isinstance(gpus, dict) and gpus.get("inference") and isinstance(inference, dict) and "engine" not in inference:
            return {**given, "inference": {**inference, "engine": "vllm"}}
        return given

    @property
    def weight_transfer(self) -> Literal["files", "broadcast"]:
        """How weights reach the engines."""
        if self.trainer.weight_transfer != "auto" and self.trainer.model.lora is None:
            return self.trainer.weight_transfer
        apart = bool(self.gpus.inference and self.gpus.trainer) and not set(self.gpus.inference) & set(self.gpus.trainer)
        return "broadcast" if self.trainer.model.lora is None and apart else "files"

    @property
    def broadcast_backend(self) -> Literal["nccl", "gloo"]:
        """What carries a broadcast: NCCL where both ends are GPUs."""
        return "nccl" if self.gpus.inference and self.gpus.trainer else "gloo"

    @property
    def replicas(self) -> int:
        """Engines: as many as `inference.dp` says, or one for each group of `inference.tp` GPUs, or one on a CPU."""
        return self.inference.dp or max(1, len(self.gpus.inference) // self.inference.tp)

    @property
    def engine_workers(self) -> int:
        """Processes that hold the model, over all engines."""
        return self.replicas * self.inference.tp

    @property
    def pack_tokens(self) -> int:
        """Most tokens of one packed forward pass of the trainer."""
        return self.trainer.micro_batch_tokens or self.seq_len

    @property
    def adapter_slots(self) -> int:
        """Adapter versions that an engine keeps loaded: an evaluation holds one beside those of training."""
        return self.inference.max_loras or self.orchestrator.max_staleness + 3

    @property
    def deterministic(self) -> bool:
        """Whether the embedded engine's replies repeat to the bit."""
        chosen = self.inference.embedded.deterministic
        return self.orchestrator.max_staleness == 0 if chosen is None else chosen

    @property
    def request_seeds(self) -> bool:
        """Whether requests of training rollouts have seeds."""
        chosen = self.orchestrator.sampling.request_seeds
        return self.inference.engine == "embedded" if chosen is None else chosen

    @property
    def engine_memory(self) -> float | None:
        """Fraction of a GPU's memory that each engine takes; None leaves it to vLLM."""
        passed = self.inference.vllm
        return passed.get("gpu_memory_utilization", passed.get("gpu-memory-utilization", self.gpus.inference_memory))

    def trainer_memory(self, gpu: int, total: int) -> int | None:
        """Bytes that the trainer's allocator may take of GPU `gpu` of `gpus.trainer`, which has `total`; None where it is alone.

        What is left beside both parts is `shared_gpu_reserve`.
        """
        if gpu not in self.gpus.shared or self.engine_memory is None:
            return None
        return int(total * (1 - self.engine_memory)) - shared_gpu_reserve(total)
