"""How much memory a run will want on each device, from the model's sizes alone. An estimate, within about a third.

For the trainer: weights, adapter, gradients, the two moments of AdamW, and the activations of the longest packed batch. For an
engine: weights, adapter slots, what a forward pass needs, and the KV cache, which on a GPU is all that is left of its part.
Everything is in bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from turnwise.config import RLConfig
from turnwise.config.trainer import LINEAR_LAYERS
from turnwise.inference.launcher import lora_rank_limit
from turnwise.launch.shape import BYTES, ModelShape

GIB = 2**30
MIB = 2**20
MXFP4_BITS = 4 + 8 / 32  # of a weight: its code, and its part of a scale byte
MASTER_BYTES = 4  # float32 parameters that are trained
GRADIENT_BYTES = 4
MOMENTS_BYTES = 4 + 4
SNAPSHOT_BYTES = 4  # parameters before the step, against which several updates are measured
LOGIT_BYTES = 2 + 4 + 4 + 2  # of one chunk: logits, the same in float32, their exponentials, and those in the model's type
LOGIT_CHUNK = {"RAM": 2**22, "GPU": 2**27}  # logits that the trainer holds at a time
PROCESS_BYTES = 400 * MIB  # Python with torch and transformers loaded, measured on a CPU
HELPERS_BYTES = 450 * MIB  # orchestrator, torchrun and rl together, measured
GPU_CONTEXT_BYTES = 700 * MIB  # CUDA context and libraries
VLLM_SHARE = 0.92  # of a GPU, when nobody says otherwise
VLLM_LARGE = 70 * GIB  # GPUs from this size on get larger steps by default
VLLM_STEP = {True: (8192, 1024), False: (2048, 256)}  # tokens and sequences of one forward pass of vLLM's server
VLLM_GRAPH_BYTES = 512 * MIB  # CUDA graphs


@dataclass(frozen=True)
class Estimate:
    """One process's share of one device: what takes how many bytes."""

    place: str  # "GPU 0" or "RAM"
    process: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def certain(self) -> int:
        """What no setting of lengths or batches makes smaller: the weights."""
        return self.parts.get("weights", 0)


def estimate(config: RLConfig, shape: ModelShape, gpu_bytes: Mapping[int, int] | None = None) -> list[Estimate]:
    """Memory of every engine and trainer process, by device; `gpu_bytes` has the memory of the GPUs that are known."""
    gpus, known = config.gpus, gpu_bytes or {}
    engines: list[Estimate] = []
    for index, gpu in enumerate(gpus.inference):
        parts = gpu_engine_parts(config, shape, known.get(gpu))
        engines.append(Estimate(f"GPU {gpu}", f"inference {index // config.inference.tp}", parts))
    if not gpus.inference:
        engines = [Estimate("RAM", f"inference {i}", _cpu_engine_parts(config, shape)) for i in range(config.replicas)]
    places = [f"GPU {gpu}" for gpu in gpus.trainer] or ["RAM"] * (config.trainer.processes or 1)
    trainers = [
        Estimate(place, f"trainer rank {rank}" if len(places) > 1 else "trainer", trainer_parts(config, shape))
        for rank, place in enumerate(places)
    ]
    helpers = [Estimate("RAM", "orchestrator, torchrun, rl", {"processes": HELPERS_BYTES})]
    moments = [Estimate("RAM", "trainer", {"moments": _offloaded_bytes(config, shape)})] if config.trainer.optim.offload else []
    return [*engines, *trainers, *(moments if gpus.trainer else []), *([] if gpus.inference and gpus.trainer else helpers)]


def _offloaded_bytes(config: RLConfig, shape: ModelShape) -> int:
    """Moments of all trainer processes of this machine, pinned."""
    model = config.trainer.model
    trained = shape.adapter_parameters(model.lora.rank, model.lora.target_modules) if model.lora else shape.parameters
    copies = (model.replicas or 1) if model.shard else len(config.gpus.trainer)
    return trained * MOMENTS_BYTES * copies


def gpu_engine_parts(config: RLConfig, shape: ModelShape, total: int | None) -> dict[str, int]:
    """A vLLM engine on one GPU. The KV cache is the rest of its part, or where `total` is unknown what running rollouts need."""
    parts = gpu_engine_needs(config, shape, total)
    if total is None:
        running = _running(config)
        parts[f"KV cache ({running} x {config.seq_len} tokens)"] = running * config.seq_len * cache_bytes(config, shape)
    else:
        rest = max(0, int(total * (config.engine_memory or VLLM_SHARE)) - sum(parts.values()))
        parts[f"KV cache (the rest: {rest // cache_bytes(config, shape):,} tokens)"] = rest
    return parts


def gpu_engine_needs(config: RLConfig, shape: ModelShape, total: int | None = None) -> dict[str, int]:
    """A vLLM engine on one GPU of `total` bytes, its KV cache aside."""
    width = BYTES[_dtype(config, shape)]
    tokens, sequences = _vllm_step(config, large=total is None or total >= VLLM_LARGE)
    step = tokens * (4 * shape.intermediate + 6 * shape.hidden) * width // config.inference.tp
    logits = sequences * shape.vocabulary * 2 * 4  # float32, twice
    parts = {"weights": _frozen_bytes(config, shape, width) // config.inference.tp}
    lora = config.trainer.model.lora
    if lora:  # slots are as large as the largest adapter that they may hold, whatever the adapter leaves out
        slot = shape.adapter_parameters(lora_rank_limit(lora.rank), LINEAR_LAYERS) * width
        parts[f"{config.adapter_slots} adapter slots"] = config.adapter_slots * slot
    parts["forward pass and CUDA graphs"] = step + logits + VLLM_GRAPH_BYTES
    parts["process"] = GPU_CONTEXT_BYTES
    return parts


def cache_bytes(config: RLConfig, shape: ModelShape) -> int:
    """Keys and values of one token on one GPU of an engine."""
    return shape.cache_bytes_per_token(_dtype(config, shape)) // config.inference.tp


def trainer_parts(config: RLConfig, shape: ModelShape) -> dict[str, int]:
    """One process of the trainer."""
    model, width = config.trainer.model, BYTES[_dtype(config, shape)]
    place = "GPU" if config.gpus.trainer else "RAM"
    ranks = len(config.gpus.trainer) or config.trainer.processes or 1
    shards = max(1, ranks // (model.replicas or 1)) if model.shard else 1
    tokens = config.pack_tokens
    snapshot = SNAPSHOT_BYTES if config.trainer.updates_per_batch > 1 else 0
    moments = 0 if config.trainer.optim.offload and place == "GPU" else MOMENTS_BYTES
    trained_bytes = GRADIENT_BYTES + snapshot + moments
    if model.lora:
        trained = shape.adapter_parameters(model.lora.rank, model.lora.target_modules)
        state = trained * (MASTER_BYTES + trained_bytes) // shards
        weights = _frozen_bytes(config, shape, width, shards, 1 if model.quant is None or not model.quant.shard_base else shards)
        parts = {"weights": weights, "adapter and its optimiser": state}
        if targets := packed_layers(config):
            parts["a decoded layer"] = shape.largest_linear(targets) * width
    else:
        state = shape.parameters * trained_bytes // shards
        parts = {"weights": shape.parameters * MASTER_BYTES // shards, "gradients and optimiser": state}
        if model.quant is not None:  # codes of a forward pass wait for the backward pass
            codes = _packed_bytes(shape, model.quant.target_modules)
            parts["quantised weights"] = codes // shape.layers if model.gradient_checkpointing else codes
        if config.trainer.loss.kl_beta > 0:
            parts["reference model"] = shape.parameters * width // shards
    if shards > 1 or (model.lora is None and width < MASTER_BYTES):
        layer = shape.layer_parameters - shape.linear_parameters(packed_layers(config)) // shape.layers
        parts["gathered layers"] = (2 * layer + shape.embedding_parameters) * width
    parts[f"activations ({tokens} tokens)"] = _activations(config, shape, tokens)
    parts["logits"] = min(tokens * shape.vocabulary, LOGIT_CHUNK[place]) * LOGIT_BYTES + tokens * shape.hidden * 4
    parts["process"] = PROCESS_BYTES if place == "RAM" else GPU_CONTEXT_BYTES
    return parts


def packed_layers(config: RLConfig) -> list[str]:
    """Names of the linear layers that engines and trainer hold in MXFP4; none without quantisation or when they train."""
    quant = config.trainer.model.quant
    if config.trainer.model.lora is None or (quant is None and config.model.quantized is None):
        return []
    return LINEAR_LAYERS if quant is None else quant.target_modules


def _frozen_bytes(config: RLConfig, shape: ModelShape, width: int, shards: int = 1, packed_shards: int = 1) -> int:
    """Weights as they lie in vLLM, or under an adapter in the trainer, each divided as often as said."""
    targets = packed_layers(config)
    plain = shape.parameters - shape.linear_parameters(targets)
    return plain * width // shards + _packed_bytes(shape, targets) // packed_shards


def _packed_bytes(shape: ModelShape, targets: list[str]) -> int:
    return int(shape.linear_parameters(targets) * MXFP4_BITS / 8)


def _activations(config: RLConfig, shape: ModelShape, tokens: int) -> int:
    """What the layers keep for the backward pass, and the gradients of one of them."""
    width = BYTES[_dtype(config, shape)]
    layer = layer_activations(shape, width, on_gpu=bool(config.gpus.trainer))
    feed_forward = 4 * shape.intermediate * width  # kept, and its gradients once more
    model = config.trainer.model
    if not model.gradient_checkpointing:
        return tokens * (shape.layers * layer + feed_forward)
    if model.checkpoint_scope == "mlp":
        return tokens * (shape.layers * (layer - feed_forward) + 2 * feed_forward)
    return tokens * (shape.layers * shape.hidden * width + layer + feed_forward)


def layer_activations(shape: ModelShape, width: int, *, on_gpu: bool) -> int:
    """Bytes that one decoder layer keeps of one token; counted in the layers of transformers, which normalise in float32."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = 2 * (4 + width) * shape.hidden + (4 * (queries + keys) if shape.qk_norm else 0)
    # queries, output, and keys and values for every head; on a CPU in float32, with the output once more in the model's type
    attention = 4 * queries * (width if on_gpu else 4) + (0 if on_gpu or width == 4 else queries * width)
    return norms + attention + 4 * shape.intermediate * width


def _cpu_engine_parts(config: RLConfig, shape: ModelShape) -> dict[str, int]:
    width = BYTES[_dtype(config, shape)]
    running, embedded = _running(config), config.inference.embedded
    if config.inference.engine == "embedded":
        running = min(running, embedded.max_batch_size)
    parts = {
        "weights": _cpu_weights(config, shape, width),
        f"KV cache ({running} x {config.seq_len} tokens)": running * config.seq_len * cache_bytes(config, shape),
        "process": PROCESS_BYTES,
    }
    if config.inference.engine == "embedded":
        parts["prefix cache"] = embedded.prefix_cache_mb * MIB
    if lora := config.trainer.model.lora:
        parts["adapters"] = config.adapter_slots * shape.adapter_parameters(lora.rank, lora.target_modules) * width
    return parts


def _cpu_weights(config: RLConfig, shape: ModelShape, width: int) -> int:
    """The embedded engine keeps the values of packed weights beside their codes."""
    return shape.parameters * width // config.inference.tp + _packed_bytes(shape, packed_layers(config))


def _vllm_step(config: RLConfig, *, large: bool) -> tuple[int, int]:
    """Most tokens and sequences of one forward pass of vLLM."""
    passed = {key.replace("-", "_"): value for key, value in config.inference.vllm.items()}
    tokens, sequences = passed.get("max_num_batched_tokens"), passed.get("max_num_seqs")
    return (
        tokens if isinstance(tokens, int) else VLLM_STEP[large][0],
        sequences if isinstance(sequences, int) else VLLM_STEP[large][1],
    )


def _running(config: RLConfig) -> int:
    """Rollouts that one engine holds at a time."""
    return ceil(config.orchestrator.inflight_limit / config.replicas)


def _dtype(config: RLConfig, shape: ModelShape) -> str:
    return shape.dtype if config.model.dtype == "auto" else config.model.dtype
