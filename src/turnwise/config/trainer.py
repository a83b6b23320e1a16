"""`[trainer]`: model, optimiser, loss."""

from typing import Literal

from pydantic import Field

from turnwise.config.base import Config

LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class LoraConfig(Config):
    """Low-rank adapters on the linear layers; the base weights stay frozen."""

    rank: int = Field(default=16, ge=1)
    """Rank of the update B·A."""

    alpha: float = Field(default=32.0, gt=0)
    """The update is scaled by alpha / rank."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before A. Not 0 means that trainer and engine disagree; for ablations only."""

    target_modules: list[str] = Field(default_factory=lambda: list(LINEAR_LAYERS))
    """Names of the linear layers that get an adapter."""


class QuantConfig(Config):
    """Four-bit weights of linear layers. Under LoRA the frozen base is held packed; with `lora` unset all parameters train under
    fake quantisation, with a straight-through estimator. Embeddings, norms and the output layer keep their type."""

    kind: Literal["mxfp4"] = "mxfp4"
    """`mxfp4`: E2M1 codes, and one E8M0 scale for each 32 weights along the input dimension (OCP Microscaling v1.0)."""

    scale_mode: Literal["even", "floor", "rceil", "ceil"] = "even"
    """How a block's scale follows from its largest weight: `floor` is OCP's, `even` first rounds the mantissa (as
    compressed-tensors does), `rceil` and `ceil` never saturate."""

    target_modules: list[str] = Field(default_factory=lambda: list(LINEAR_LAYERS), min_length=1)
    """Names of the linear layers that are quantised."""

    shard_base: bool = False
    """Shard the packed base of LoRA over the trainer processes, for bases beyond 32B; each holds all of it when false."""


class TrainerModelConfig(Config):
    """What of the model is trained, and how it is held."""

    lora: LoraConfig | None = LoraConfig()
    """Unset (`--no-trainer.model.lora`, or `lora = "None"`) trains all parameters."""

    quant: QuantConfig | None = None
    """Set the table to quantise the linear layers, in the trainer and in the engines alike."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: slower, far less memory."""

    checkpoint_scope: Literal["layer", "mlp"] = "layer"
    """What `gradient_checkpointing` recomputes: whole layers, or (selective) their feed-forward blocks alone, which hold more
    than half of the activations for a third of the operations."""

    compile: bool = False
    """`torch.compile` the decoder layers: a minute at the start, then faster and with less memory; for GPUs and longer runs."""

    shard: bool = True
    """FSDP2 over the trainer processes; one process has nothing to shard."""

    replicas: int | None = Field(default=None, ge=1)
    """Copies of the sharded model (HSDP): each is sharded over processes / replicas processes, and gradients are summed over all.
    One a node when unset."""


class OptimConfig(Config):
    """AdamW and its schedule."""

    lr: float = Field(default=1e-5, gt=0)
    """Peak learning rate."""

    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)

    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up from 0."""

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay after the warm-up, down to `min_lr_ratio * lr` at the last step."""

    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)

    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm; no clipping when unset."""

    offload: bool = False
    """Keep the moments in the CPU's memory and bring them to the GPU for the update, 8 bytes a trained parameter. The numbers
    stay the same to the bit; an update takes as long as the transfer, about 0.4 s for a billion parameters on one GPU."""


class LossConfig(Config):
    """The policy-gradient loss; formulas in docs/loss.md."""

    kind: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"] = "grpo"
    """Objective and aggregation."""

    clip_low: float = Field(default=0.2, ge=0)
    """Ratios below 1 - clip_low are clipped."""

    clip_high: float = Field(default=0.2, ge=0)
    """Ratios above 1 + clip_high are clipped (0.28 is DAPO's clip-higher); for `cispo` the absolute bound of the ratio."""

    dual_clip: float | None = Field(default=None, gt=1)
    """Bound of the loss for negative advantages, as a multiple of |A| (3 in the literature)."""

    kl_beta: float = Field(default=0.0, ge=0)
    """Weight of the KL penalty against the reference policy (the model without its adapter, or the initial weights)."""

    kl_kind: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that KL."""

    old_logprobs: Literal["auto", "behaviour", "proximal"] = "auto"
    """What ratios are taken against: `behaviour`, the policy that sampled, noise included, as the engine returned it; `proximal`,
    the trainer's own before the first update, which corrects for nothing that the engine did. `auto` is `proximal` with
    `importance_sampling`, with several updates a batch and with `[inference.noise]`, else `behaviour`."""

    importance_sampling: Literal["none", "truncate", "mask"] = "none"
    """Correction for the engine's mismatch, weight exp(proximal - behaviour); needs the trainer's own logprobs."""

    importance_cap: float = Field(default=2.0, gt=0)
    """Largest importance weight: larger ones are cut to it (`truncate`) or their tokens left out (`mask`)."""

    max_completion_tokens: int | None = Field(default=None, ge=1)
    """Denominator of `dr_grpo`; the rollout's token limit when unset."""

    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of an entropy bonus per sampled token."""


class TrainerConfig(Config):
    """The trainer: torchrun, FSDP2, packed sequences."""

    model: TrainerModelConfig = TrainerModelConfig()
    optim: OptimConfig = OptimConfig()
    loss: LossConfig = LossConfig()

    processes: int | None = Field(default=None, ge=1)
    """Trainer processes on a CPU; on GPUs one for each of `gpus.trainer`."""

    threads: int | None = Field(default=None, ge=1)
    """CPU threads of each process; cores / processes when unset."""

    micro_batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens of one packed forward pass; `seq_len` when unset."""

    updates_per_batch: int = Field(default=1, ge=1)
    """Optimiser updates taken on one batch (PPO epochs)."""

    rehearse: bool | None = None
    """Before the first step, and after a resume, run the longest micro-batches that there can be forward and backward, so that
    memory runs out then or never. On GPUs when unset."""

    canaries: int = Field(default=2, ge=0)
    """Sequences of a batch that travel with the version made from it, with the trainer's logprobs before and after the step: an
    engine that does not answer with the logprobs of the new policy stops the run. 0 for none."""

    canary_interval: int = Field(default=1, ge=1)
    """Steps from one with canaries to the next. Their three short forward passes, `timing/canary_s`, are about 2 % of a step of
    many tokens, and more of one of few."""

    weight_transfer: Literal["auto", "files", "broadcast"] = "auto"
    """How full weights reach the engines: as `files`, or by `broadcast` from the trainer's memory into theirs (NCCL between GPUs,
    gloo on CPUs). `auto` broadcasts where trainer and engines have GPUs of their own. LoRA adapters always travel as files."""

    timeout_s: float = Field(default=1800.0, gt=0)
    """Deadline of a collective, in seconds."""
