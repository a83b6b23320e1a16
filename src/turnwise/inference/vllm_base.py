"""The base weights that a vLLM worker holds, whole and under the names of the Hugging Face model.

vLLM fuses the layers that read the same input (`qkv_proj`, `gate_up_proj`), pads the vocabulary, and gives each rank of a
tensor-parallel group a part. All of that is undone here. On a CPU it also packs the weights of linear layers and drops the
originals; they are then read back by multiplying with the identity, which is exact but for the sign of zeros.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from turnwise.inference.vllm_layers import CannotRead, Group, check_names, kinds, whole
from turnwise.inference.vllm_noise import PUBLISHED

PLAIN = frozenset({"UnquantizedLinearMethod", "UnquantizedEmbeddingMethod"})  # vLLM's handling of weights as they were published
DEFAULT_LOADER = "default_weight_loader"
READ_BACK_ROWS = 256  # of the identity at a time


def resident_weights(model: Any, packed: Mapping[str, Sequence[str]], group: Group) -> Iterator[tuple[str, Tensor]]:
    """Parameters of the model in the engine's type; tied ones once, under the name that comes first. A collective of the group.

    Args:
        packed: vLLM's names of fused layers, and what they are fused from: `{"qkv_proj": ["q_proj", "k_proj", "v_proj"], ...}`.

    Raises:
        CannotRead: a layer is quantised, or of a kind whose tensors cannot be put together, before any tensor is given; or, after
            all were given, the output layer of a CPU multiplies with other weights than those.
    """
    layers: list[tuple[str, Any]] = list(model.named_modules())
    for path, layer in layers:
        _check_layer(path, layer, model, packed, group)
    seen: set[int] = set()
    for path, layer in layers:
        for attribute, parameter in layer.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                names = [f"{name}.{attribute}" for name in _names(path, packed)]
                yield from _published(names, attribute, layer, parameter.detach(), group)
    for path, layer in layers:
        if "ParallelLMHead" in kinds(layer) and hasattr(layer, "cpu_linear") and not torch.equal(_read_back(layer), layer.weight):
            raise CannotRead(f"{path}: this CPU engine computes logits with other weights than it holds; restart it")


def _published(names: list[str], attribute: str, layer: Any, part: Tensor, group: Group) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors of a parameter, one a name."""
    if hasattr(layer, "cpu_linear"):  # packing for some CPU kernels makes biases float32, too
        part = _read_back(layer) if attribute == "weight" and part.numel() == 0 else part.to(layer.weight.dtype)
    kind, parallel = kinds(layer), getattr(layer, "tp_size", 1) > 1
    if "VocabParallelEmbedding" in kind:
        yield names[0], (whole(part, group, dim=0) if parallel else part)[: layer.org_vocab_size]
    elif "RowParallelLinear" in kind:
        yield names[0], whole(part, group, dim=1) if parallel and attribute == "weight" else part
    elif "ColumnParallelLinear" in kind:
        slices = part.split(_slice_sizes(layer), dim=0)
        if parallel:
            slices = [whole(s, group, dim=0, replicas=_replicas(layer, index)) for index, s in enumerate(slices)]
        yield from zip(names, slices if len(names) > 1 else [torch.cat(tuple(slices))], strict=True)
    else:
        yield names[0], part.to(getattr(layer, PUBLISHED, part.dtype))


def _names(path: str, packed: Mapping[str, Sequence[str]]) -> list[str]:
    """`model.layers.0.self_attn.qkv_proj` -> the names of q_proj, k_proj and v_proj there; `base_layer` is vLLM's, too."""
    parent, _, last = path.removesuffix(".base_layer").rpartition(".")
    prefix = f"{parent}." if parent else ""
    return [prefix + name for name in packed.get(last, [last])]


def _slice_sizes(layer: Any) -> list[int]:
    """Rows of each slice of a column-parallel layer on this rank."""
    if "QKVParallelLinear" in kinds(layer):
        heads, values = layer.head_size, getattr(layer, "v_head_size", layer.head_size)
        return [layer.num_heads * heads, layer.num_kv_heads * heads, layer.num_kv_heads * values]
    sizes: list[int] = getattr(layer, "output_sizes", None) or [layer.output_size]
    return [size // layer.tp_size for size in sizes]


def _replicas(layer: Any, index: int) -> int:
    """Ranks that hold the same keys or values."""
    return layer.num_kv_head_replicas if "QKVParallelLinear" in kinds(layer) and index > 0 else 1


def _check_layer(path: str, layer: Any, model: Any, packed: Mapping[str, Sequence[str]], group: Group) -> None:
    """Only what every rank sees alike, so that no rank waits in a collective for one that gave up."""
    parameters: dict[str, Any] = dict(layer.named_parameters(recurse=False))
    if not parameters:
        return
    kind, method = kinds(layer), getattr(layer, "quant_method", None)
    what = f"{path} ({type(layer).__name__})"
    if method is not None and type(method).__name__ not in PLAIN:
        raise CannotRead(f"{what} is handled by {type(method).__name__}: its tensors are not those that were published")
    if "VocabParallelEmbedding" in kind and layer.num_added_embeddings:
        raise CannotRead(f"{what} has {layer.num_added_embeddings} added tokens")
    if "ColumnParallelLinear" in kind:
        rows = layer.output_size // layer.tp_size
        names = packed.get(path.removesuffix(".base_layer").rpartition(".")[2], [""])
        if sum(_slice_sizes(layer)) != rows or len(names) not in (1, len(_slice_sizes(layer))):
            raise CannotRead(f"{what} is fused in a way that is not known here")
    known = kind & {"VocabParallelEmbedding", "ColumnParallelLinear", "RowParallelLinear", "ReplicatedLinear"}
    if not known and group.world_size > 1 and any(map(_has_own_loader, parameters.values())):
        raise CannotRead(f"{what} may be divided among ranks in a way that is not known here; use inference.tp = 1")
    if known and getattr(layer, "tp_size", 1) not in (1, group.world_size):
        raise CannotRead(f"{what} is divided among {layer.tp_size} of {group.world_size} ranks")
    check_names(model, path.removesuffix(".base_layer"), _names(path, packed))


def _has_own_loader(parameter: Any) -> bool:
    """Without one, a tensor of the file is copied as it is: every rank holds all of it."""
    return getattr(getattr(parameter, "weight_loader", None), "__name__", DEFAULT_LOADER) != DEFAULT_LOADER


def _read_back(layer: Any) -> Tensor:
    """The weight `[out, in]` with which the packed kernel of a CPU multiplies."""
    width: int = getattr(layer, "input_size_per_partition", None) or getattr(layer, "input_size", None) or layer.embedding_dim
    identity = torch.eye(width, dtype=layer.weight.dtype, device=layer.weight.device)
    rows = [layer.quant_method.apply(layer, part, None) for part in identity.split(READ_BACK_ROWS)]
    return torch.cat(rows).T
