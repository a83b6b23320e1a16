"""How much memory a run will want on each device, from the model's config.json alone. An estimate, within about a third.

For the trainer: weights, adapter, gradients, the two moments of AdamW, activations of the longest packed batch and its
logits, which for small models with large vocabularies are the most of it. For an engine: weights and the KV cache of
what runs at once. Everything is in bytes.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from turnwise.config import RLConfig

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
HUB_TIMEOUT_S = 5.0
ADAM_BYTES = 4 + 4 + 4  # gradient and two moments, all float32
LOGIT_BYTES = 4 + 4 + 4  # logits in float32, their log-softmax, and its gradient
PROCESS_BYTES = 400 * 2**20  # Python with torch and transformers loaded, measured on a CPU
HELPERS_BYTES = 450 * 2**20  # orchestrator, torchrun and rl together, measured
GPU_CONTEXT_BYTES = 700 * 2**20  # CUDA context and libraries
ACTIVATIONS_PER_LAYER = 34  # tensors of hidden size that one Llama layer keeps for its backward pass, as in its paper count


@dataclass(frozen=True)
class ModelShape:
    """The sizes that matter for memory."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    dtype: str

    @property
    def parameters(self) -> int:
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return self.layers * layer + self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    def adapter_parameters(self, rank: int, targets: list[str]) -> int:
        """Parameters of LoRA at this rank on these linear layers of every decoder layer."""
        query, key_value = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sides = {
            "q_proj": (self.hidden, query),
            "k_proj": (self.hidden, key_value),
            "v_proj": (self.hidden, key_value),
            "o_proj": (query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }
        return self.layers * rank * sum(sum(sides[name]) for name in targets if name in sides)

    def cache_bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * BYTES[self.dtype]


@dataclass(frozen=True)
class Estimate:
    """One device's share: what takes how many bytes."""

    place: str  # "GPU 0" or "RAM"
    process: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def read_shape(folder: Path) -> ModelShape:
    """Read config.json of a decoder-only model.

    Raises:
        ValueError: a size that is needed is not in it.
    """
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text())
    raw = {**raw, **raw.get("text_config", {})}
    try:
        hidden, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
        return ModelShape(
            layers=int(raw["num_hidden_layers"]),
            hidden=hidden,
            intermediate=int(raw["intermediate_size"]),
            heads=heads,
            kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or hidden // heads),
            vocabulary=int(raw["vocab_size"]),
            tied=bool(raw.get("tie_word_embeddings", False)),
            dtype=_known_dtype(raw.get("dtype") or raw.get("torch_dtype")),
        )
    except KeyError as error:
        raise ValueError(f"config.json of {folder} has no {error.args[0]}: memory cannot be estimated") from error


def find_shape(model: str) -> ModelShape:
    """The shape of a folder or of a hub id; of the latter only config.json is looked for, in the hub's cache and then on the hub.

    Raises:
        ValueError: it cannot be known yet; the message says why.
    """
    folder = Path(model)
    if folder.is_absolute():
        if not folder.is_dir():
            raise ValueError(f"{folder.name} is not prepared yet; `turnwise model {folder.name}` does it")
        return read_shape(folder)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return read_shape(Path(hf_hub_download(model, "config.json", etag_timeout=HUB_TIMEOUT_S)).parent)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"config.json of {model} is not at hand: {str(error).splitlines()[0]}") from error


def estimate(config: RLConfig, shape: ModelShape) -> list[Estimate]:
    """Memory of every engine and trainer process, by device."""
    engines = _engine_places(config)
    trainers = [f"GPU {gpu}" for gpu in config.gpus.trainer] or ["RAM"] * (config.trainer.processes or 1)
    return [
        *(Estimate(place, name, _engine_parts(config, shape, len(engines), place)) for name, place in engines),
        *(
            Estimate(
                place,
                f"trainer rank {rank}" if len(trainers) > 1 else "trainer",
                _trainer_parts(config, shape, len(trainers), place),
            )
            for rank, place in enumerate(trainers)
        ),
        *(
            []
            if config.gpus.inference and config.gpus.trainer
            else [Estimate("RAM", "orchestrator, torchrun, rl", {"processes": HELPERS_BYTES})]
        ),
    ]


def _engine_places(config: RLConfig) -> list[tuple[str, str]]:
    if not config.gpus.inference:
        return [(f"inference {i}", "RAM") for i in range(config.inference.dp or 1)]
    return [(f"inference {i // config.inference.tp}", f"GPU {gpu}") for i, gpu in enumerate(config.gpus.inference)]


def _engine_parts(config: RLConfig, shape: ModelShape, engines: int, place: str) -> dict[str, int]:
    width = BYTES[_dtype(config, shape)]
    orchestrator = config.orchestrator
    inflight = orchestrator.max_inflight or orchestrator.batch_size * (orchestrator.max_staleness + 1)
    replicas = max(1, engines // config.inference.tp)
    running = min(ceil(inflight / replicas), config.inference.embedded.max_batch_size)
    parts = {
        "weights": shape.parameters * width // config.inference.tp,
        f"KV cache ({running} x {config.seq_len} tokens)": running
        * config.seq_len
        * shape.cache_bytes_per_token()
        // config.inference.tp,
        "process": _overhead(place),
    }
    if config.inference.engine == "embedded":
        parts["prefix cache"] = config.inference.embedded.prefix_cache_mb * 2**20
    lora = config.trainer.model.lora
    if lora:
        parts["adapters"] = config.adapter_slots * shape.adapter_parameters(lora.rank, lora.target_modules) * width
    return parts


def _trainer_parts(config: RLConfig, shape: ModelShape, ranks: int, place: str) -> dict[str, int]:
    model, width = config.trainer.model, BYTES[_dtype(config, shape)]
    shards = ranks if model.shard else 1
    tokens = config.trainer.micro_batch_tokens or config.seq_len
    trained = shape.adapter_parameters(model.lora.rank, model.lora.target_modules) if model.lora else shape.parameters
    layer = tokens * shape.hidden * ACTIVATIONS_PER_LAYER * width // 2
    kept = layer + shape.layers * tokens * shape.hidden * width if model.gradient_checkpointing else shape.layers * layer
    return {
        "weights": shape.parameters * (width if model.lora else BYTES["float32"]) // shards,
        "adapter" if model.lora else "gradients and optimiser": trained
        * (4 + ADAM_BYTES if model.lora else ADAM_BYTES)
        // shards,
        f"activations ({tokens} tokens)": kept,
        "logits": tokens * shape.vocabulary * LOGIT_BYTES,
        "process": _overhead(place),
    }


def _overhead(place: str) -> int:
    return PROCESS_BYTES if place == "RAM" else GPU_CONTEXT_BYTES


def _dtype(config: RLConfig, shape: ModelShape) -> str:
    return shape.dtype if config.model.dtype == "auto" else config.model.dtype


def _known_dtype(name: object) -> str:
    text = str(name or "float32").removeprefix("torch.")
    return text if text in BYTES else "float32"
