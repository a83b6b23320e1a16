"""The sizes of a model, from its config.json alone."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
HUB_TIMEOUT_S = 5.0
QK_NORM_MODELS = ("qwen3",)  # model types whose layers have q_norm and k_norm, which no size in config.json tells


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
    qk_norm: bool = False  # queries and keys are normalised head by head

    @property
    def layer_parameters(self) -> int:
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def embedding_parameters(self) -> int:
        """Of the input embedding, and of the output layer where that is another."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.embedding_parameters + self.hidden

    def adapter_parameters(self, rank: int, targets: list[str]) -> int:
        """Parameters of LoRA at this rank on these linear layers of every decoder layer."""
        return self.layers * rank * sum(sum(self._sides[name]) for name in targets if name in self._sides)

    def linear_parameters(self, targets: list[str]) -> int:
        """Weights of these linear layers of every decoder layer."""
        return self.layers * sum(self._weights(targets))

    def largest_linear(self, targets: list[str]) -> int:
        """Weights of the largest of these linear layers."""
        return max(self._weights(targets), default=0)

    def _weights(self, targets: list[str]) -> list[int]:
        return [math.prod(self._sides[name]) for name in targets if name in self._sides]

    @property
    def _sides(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the linear layers of a decoder layer."""
        query, key_value = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, query),
            "k_proj": (self.hidden, key_value),
            "v_proj": (self.hidden, key_value),
            "o_proj": (query, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    def cache_bytes_per_token(self, dtype: str) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * BYTES[dtype]


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
            qk_norm=str(raw.get("model_type", "")).startswith(QK_NORM_MODELS),
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


def known_shape(model: str) -> ModelShape | str:
    """As `find_shape`, but says why where it is not known."""
    try:
        return find_shape(model)
    except ValueError as error:
        return str(error)


def _known_dtype(name: object) -> str:
    text = str(name or "float32").removeprefix("torch.")
    return text if text in BYTES else "float32"
