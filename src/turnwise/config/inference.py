"""`[inference]`: the engine that samples."""

from typing import Any, Literal

from pydantic import Field

from turnwise.config.base import Config


class EmbeddedConfig(Config):
    """The transformers engine that serves vLLM's routes from its own process; for CPUs and tests."""

    max_batch_size: int = Field(default=64, ge=1)
    """Sequences decoded together."""

    threads: int | None = Field(default=None, ge=1)
    """CPU threads of the engine; all cores when unset."""

    deterministic: bool | None = None
    """Make a reply a function of (prompt, seed, version) alone, whatever else is in the batch: slower, but a resumed run repeats
    to the bit. On with `orchestrator.max_staleness = 0` when unset, else off."""

    prefix_cache_mb: int = Field(default=1024, ge=0)
    """Memory for keys and values of recent prompts and replies, in MiB; the next turn of a rollout computes only what is new."""


class NoiseConfig(Config):
    """Adaptive quantisation noise (AQN, arXiv 2510.11696): N(0, sigma) on the RMSNorm weights of the policy that samples, drawn
    anew for each version. Training rollouts alone see it, evaluations never."""

    sigma_start: float = Field(default=0.01, gt=0)
    """Sigma of the first stage with noise."""

    sigma_end: float = Field(default=0.0001, gt=0)
    """Sigma of the last stage."""

    stages: int = Field(default=10, ge=3)
    """Stages of equal length over the run, the first without noise; from the second to the last sigma falls geometrically."""

    epoch_aware: bool = False
    """Lay the stages out anew in every epoch: one interval without noise, then `stages` with it, between the values that a
    geometric decay over the epochs gives."""

    float32_norms: bool = True
    """Have vLLM hold these norms in float32: in bfloat16 a sigma below 0.003 hardly changes any weight near 1. The embedded
    engine holds norms with noise in float32 in any case."""


class InferenceConfig(Config):
    """The inference engine."""

    engine: Literal["vllm", "embedded"] = "embedded"
    """`vllm` for GPUs, `embedded` (transformers in a process of its own) for CPUs alone; `vllm` when `gpus.inference` names GPUs
    and this is unset."""

    host: str = "127.0.0.1"
    """Address the engine listens on."""

    port: int | None = Field(default=None, ge=1, le=65535)
    """Port of the first replica; a free one is taken when unset."""

    dp: int | None = Field(default=None, ge=1)
    """Replicas; one for each group of `tp` inference GPUs when unset, one on a CPU."""

    tp: int = Field(default=1, ge=1)
    """Tensor parallelism of one replica."""

    max_loras: int | None = Field(default=None, ge=2)
    """Adapter versions kept loaded; `orchestrator.max_staleness + 3` when unset: one for an evaluation that runs beside."""

    startup_timeout_s: float = Field(default=900.0, gt=0)
    """Seconds an engine may take until `/health` answers."""

    request_timeout_s: float = Field(default=600.0, gt=0)
    """Deadline of one generation request, in seconds."""

    max_retries: int = Field(default=3, ge=0)
    """Repetitions of a request that failed in transport, on another replica where there is one."""

    max_waiting_share: float = Field(default=0.25, ge=0)
    """No rollout begins while more requests wait in the engines' queues than this share of those that run there, or while an
    engine with a full KV cache preempts requests; rollouts in progress go on. `inf` leaves `orchestrator.max_inflight` alone to
    limit them."""

    noise: NoiseConfig | None = None
    """Set the table to explore with noise in the weights."""

    embedded: EmbeddedConfig = EmbeddedConfig()

    vllm: dict[str, Any] = Field(default_factory=dict)
    """Passed through to vLLM's server: `[inference.vllm] gpu_memory_utilization = 0.8`."""
