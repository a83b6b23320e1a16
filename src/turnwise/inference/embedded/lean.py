"""A lean forward pass of Llama-like decoders (Llama, Mistral, Qwen2, Qwen3) over a flat list of tokens.

It takes its weights from a transformers model and must agree with that model's own forward (tests compare them). What it
leaves out is everything between the matrix products; what it adds is fused, prepacked weights and unmerged LoRA.

Legend: T tokens of any sequences side by side, H hidden size, N attention heads, G key-value heads, D head size.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from turnwise.inference.embedded.linear import PackedLinear
from turnwise.inference.embedded.lora import LoraMix
from turnwise.kernels.mxfp4.ops import dequantize
from turnwise.kernels.quantized.layout import PACKED, SCALE
from turnwise.kernels.quantized.tensors import Packed

LEAN_TYPES = {"llama", "mistral", "qwen2", "qwen3"}
STATIC_ROPE = {"default", "linear", "llama3", "yarn"}  # cosines depend on the position alone, not on the longest sequence

Attend = Callable[[int, Tensor], Tensor]  # (layer, [T, N + 2G, D] rotated queries, keys, values) -> [T, N * D]


def why_not_lean(config: Any) -> str | None:
    """The reason why a model needs the generic path, or None if the lean one computes the same."""
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type not in LEAN_TYPES:
        return f"model type {config.model_type}"
    if getattr(config, "quantization_config", None) is not None:
        return "quantized weights"
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act}"
    if rope.get("rope_type", "default") not in STATIC_ROPE:
        return f"rope type {rope.get('rope_type')}"
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return "layers without full attention"
    if config.model_type == "mistral" and getattr(config, "sliding_window", None) is not None:
        return "sliding window"
    return None


@dataclass(slots=True)
class Layer:
    """Weights of one decoder layer; qkv and gate_up are fused along their outputs."""

    qkv: PackedLinear
    o: PackedLinear
    gate_up: PackedLinear
    down: PackedLinear
    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None


@dataclass(frozen=True, slots=True)
class LeanNorm:
    """See `turnwise.inference.norms.Norm`: whatever is written is what the forward pass uses, in its own type."""

    name: str
    holder: "LeanModel | Layer"
    attribute: str

    def read(self) -> Tensor:
        return getattr(self.holder, self.attribute)

    def write(self, value: Tensor) -> None:
        setattr(self.holder, self.attribute, value)


class LeanModel:
    """Weights and forward pass. `layers` and the attributes below are read-only, but for norms through `norms`.

    Args:
        model: the transformers model.
        max_length: positions that are computed for.
        codes: codes and scales of the linear layers whose weights are MXFP4 values, by name.
    """

    def __init__(self, model: Any, max_length: int, codes: Mapping[str, Packed] | None = None) -> None:
        config = model.config
        self.codes = dict(codes or {})
        self.source: Any = type(model)
        self.config: Any = config
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps: float = config.rms_norm_eps
        self.vocabulary: int = config.vocab_size
        self.dtype: torch.dtype = model.dtype
        self.max_length = max_length
        self.tied = bool(config.tie_word_embeddings)
        self.embedding: Tensor = model.model.embed_tokens.weight.detach()
        self.norm: Tensor = model.model.norm.weight.detach()
        self.head = PackedLinear(model.lm_head.weight)
        self.layers = [_layer(layer) for layer in model.model.layers]
        cos, sin = model.model.rotary_emb(self.embedding[:1], torch.arange(max_length)[None])
        half = self.head_dim // 2
        self.cos = cos[0].to(self.dtype).contiguous()
        # signs of the rotation folded in: rotate_half(x) * sin == x.roll(half) * signed sin
        self.sin = torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1).to(self.dtype).contiguous()

    def hidden(self, ids: Tensor, positions: Tensor, attend: Attend, lora: LoraMix | None) -> Tensor:
        """Final hidden states [T, H] of `ids` [T] at `positions` [T]; keys and values are the business of `attend`."""
        x = F.embedding(ids, self.embedding)
        cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)
        for index, layer in enumerate(self.layers):
            h = rms_norm(x, layer.input_norm, self.eps)
            qkv = layer.qkv(h)
            if lora is not None:
                qkv = lora.add(index, "qkv", h, qkv)
            heads = self._rotate(layer, qkv.view(len(ids), -1, self.head_dim), cos, sin)
            attended = attend(index, heads)
            out = layer.o(attended)
            if lora is not None:
                out = lora.add(index, "o", attended, out)
            x = x + out
            h = rms_norm(x, layer.post_norm, self.eps)
            gate_up = layer.gate_up(h)
            if lora is not None:
                gate_up = lora.add(index, "gate_up", h, gate_up)
            gate, up = gate_up.chunk(2, dim=-1)
            h = F.silu(gate).mul_(up)
            out = layer.down(h)
            if lora is not None:
                out = lora.add(index, "down", h, out)
            x = x + out
        return rms_norm(x, self.norm, self.eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [rows, vocabulary]."""
        return self.head(hidden).float()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The resident weights under their checkpoint names: in the engine's type, or as codes and scales where they are MXFP4.

        Raises:
            ValueError: the values that a layer computes with are not those of its codes.
        """
        for name, tensor in self._values():
            layer = name.removesuffix(".weight")
            if layer not in self.codes:
                yield name, tensor
                continue
            packed, scales = self.codes[layer]
            if not torch.equal(dequantize(packed, scales, tensor.dtype), tensor):
                raise ValueError(f"{layer} computes with other values than those of its MXFP4 codes; restart the engine.")
            yield f"{layer}{PACKED}", packed
            yield f"{layer}{SCALE}", scales

    def _values(self) -> Iterator[tuple[str, Tensor]]:
        """What the layers compute with."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", self.embedding
        yield "model.norm.weight", self.norm
        if not self.tied:
            yield "lm_head.weight", self.head.dense()
        for index, layer in enumerate(self.layers):
            name = f"model.layers.{index}"
            yield from _split(layer.qkv, [f"{name}.self_attn.{p}_proj" for p in "qkv"], [q, kv, kv])
            yield from _split(layer.o, [f"{name}.self_attn.o_proj"], None)
            yield from _split(layer.gate_up, [f"{name}.mlp.gate_proj", f"{name}.mlp.up_proj"], None)
            yield from _split(layer.down, [f"{name}.mlp.down_proj"], None)
            yield f"{name}.input_layernorm.weight", layer.input_norm
            yield f"{name}.post_attention_layernorm.weight", layer.post_norm
            for norm, key in ((layer.q_norm, "q_norm"), (layer.k_norm, "k_norm")):
                if norm is not None:
                    yield f"{name}.self_attn.{key}.weight", norm

    def norms(self) -> "list[LeanNorm]":
        """The norms but those of queries and keys."""
        found = [LeanNorm("model.norm", self, "norm")]
        for index, layer in enumerate(self.layers):
            name = f"model.layers.{index}"
            found.append(LeanNorm(f"{name}.input_layernorm", layer, "input_norm"))
            found.append(LeanNorm(f"{name}.post_attention_layernorm", layer, "post_norm"))
        return found

    def _rotate(self, layer: Layer, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Normalise (Qwen3) and rotate queries and keys in place."""
        n = self.heads
        if layer.q_norm is not None and layer.k_norm is not None:
            heads[:, :n] = rms_norm(heads[:, :n], layer.q_norm, self.eps)
            heads[:, n : n + self.kv_heads] = rms_norm(heads[:, n : n + self.kv_heads], layer.k_norm, self.eps)
        turned = heads[:, : n + self.kv_heads]
        swapped = turned.roll(self.head_dim // 2, dims=-1)
        turned.mul_(cos).add_(swapped.mul_(sin))
        return heads


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation, in float32 up to the multiplication by the weight, as transformers does it.

    The weight may be float32 where `x` is not: one rounding, as of a product in the type of `x`.
    """
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * h.to(x.dtype)).to(x.dtype)


def _layer(layer: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        qkv=_fuse(attention.q_proj, attention.k_proj, attention.v_proj),
        o=_fuse(attention.o_proj),
        gate_up=_fuse(mlp.gate_proj, mlp.up_proj),
        down=_fuse(mlp.down_proj),
        input_norm=layer.input_layernorm.weight.detach(),
        post_norm=layer.post_attention_layernorm.weight.detach(),
        q_norm=attention.q_norm.weight.detach() if hasattr(attention, "q_norm") else None,
        k_norm=attention.k_norm.weight.detach() if hasattr(attention, "k_norm") else None,
    )


def _fuse(*linears: Any) -> PackedLinear:
    biases = [linear.bias for linear in linears]
    bias = None if biases[0] is None else torch.cat([b.detach() for b in biases])
    return PackedLinear(torch.cat([linear.weight.detach() for linear in linears]), bias)


def _split(linear: PackedLinear, names: list[str], sizes: list[int] | None) -> Iterator[tuple[str, Tensor]]:
    dense = linear.dense()
    parts = dense.chunk(len(names)) if sizes is None else dense.split(sizes)
    biases = None if linear.bias is None else [linear.bias.chunk(len(names)) if sizes is None else linear.bias.split(sizes)][0]
    for i, name in enumerate(names):
        yield f"{name}.weight", parts[i]
        if biases is not None:
            yield f"{name}.bias", biases[i]
