"""The parts of vLLM that the worker extension reads, in its layout and under its class names: layers, LoRA layers, their manager.

What a rank of a tensor-parallel group holds is cut out of whole tensors here by the same rules as in vLLM; the extension has to
put it together again. `run_ranks` runs all ranks at once, each in a thread.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from support.fake_vllm_layers import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ParallelLMHead,
    QKVParallelLinear,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)

T = TypeVar("T")
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
HIDDEN, HEADS, HEAD, INNER, VOCAB, LAYERS = 8, 4, 2, 12, 10, 2
DEADLINE_S = 20.0


class Group:
    """A rank of a tensor-parallel group whose ranks are threads."""

    def __init__(self, rank: int, world: int, shared: dict[int, Tensor], barrier: threading.Barrier) -> None:
        self.rank_in_group, self.world_size = rank, world
        self._shared, self._barrier = shared, barrier

    def all_gather(self, input_: Tensor, dim: int = -1) -> Tensor:
        self._shared[self.rank_in_group] = input_
        self._barrier.wait(DEADLINE_S)
        result = torch.cat([self._shared[rank] for rank in range(self.world_size)], dim)
        self._barrier.wait(DEADLINE_S)
        return result


def run_ranks(world: int, work: Callable[[Group], T]) -> list[T]:
    """Results of `work` of every rank, in order. Raises what a rank raised."""
    shared: dict[int, Tensor] = {}
    barrier = threading.Barrier(world)
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(Group(rank, world, shared, barrier))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [results[rank] for rank in range(world)]


# --- base weights -----------------------------------------------------------------------------------------------------


def published_model(*, kv_heads: int = 2, tied: bool = True, bias: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of a small decoder under the names of its file."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        rows = {"q_proj": HEADS * HEAD, "k_proj": kv_heads * HEAD, "v_proj": kv_heads * HEAD}
        shapes |= {f"{prefix}self_attn.{name}.weight": (size, HIDDEN) for name, size in rows.items()}
        if bias:
            shapes |= {f"{prefix}self_attn.{name}.bias": (size,) for name, size in rows.items()}
        shapes |= {f"{prefix}self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD), f"{prefix}input_layernorm.weight": (HIDDEN,)}
        shapes |= {f"{prefix}mlp.{name}.weight": (INNER, HIDDEN) for name in ("gate_proj", "up_proj")}
        shapes[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, INNER)
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def engine_model(tensors: dict[str, Tensor], *, rank: int = 0, world: int = 1, kv_heads: int = 2) -> Any:
    """The model of one rank, with the weights in it."""
    model = nn.Module()
    model.model = nn.Module()
    embedding = VocabParallelEmbedding(tensors["model.embed_tokens.weight"], rank, world)
    model.model.embed_tokens = embedding
    model.model.layers = nn.ModuleList(_decoder_layer(tensors, layer, rank, world, kv_heads) for layer in range(LAYERS))
    model.model.norm = RMSNorm(tensors["model.norm.weight"])
    model.lm_head = ParallelLMHead(tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]), rank, world)
    if "lm_head.weight" not in tensors:
        model.lm_head.weight = embedding.weight
    return model


def _decoder_layer(tensors: dict[str, Tensor], number: int, rank: int, world: int, kv_heads: int) -> nn.Module:
    def weights(part: str, *names: str) -> list[Tensor]:
        return [tensors[f"model.layers.{number}.{part}.{name}.weight"] for name in names]

    layer = nn.Module()
    layer.self_attn, layer.mlp = nn.Module(), nn.Module()
    biases = [tensors.get(f"model.layers.{number}.self_attn.{name}.bias") for name in PACKED["qkv_proj"]]
    qkv = weights("self_attn", *PACKED["qkv_proj"])
    layer.self_attn.qkv_proj = QKVParallelLinear(qkv, biases, rank, world, heads=(HEADS, kv_heads, HEAD))
    layer.self_attn.o_proj = RowParallelLinear(*weights("self_attn", "o_proj"), rank, world)
    layer.mlp.gate_up_proj = MergedColumnParallelLinear(weights("mlp", *PACKED["gate_up_proj"]), rank, world)
    layer.mlp.down_proj = RowParallelLinear(*weights("mlp", "down_proj"), rank, world)
    layer.input_layernorm = RMSNorm(tensors[f"model.layers.{number}.input_layernorm.weight"])
    return layer


# --- adapters ---------------------------------------------------------------------------------------------------------


class BaseLayerWithLoRA:
    def __init__(self, base: Any, slices: list[tuple[int, int]], slots: int, max_rank: int) -> None:
        """`slices`: rows and columns of each on this rank."""
        self.base_layer, self.tp_size = base, base.tp_size
        self.lora_a_stacked = tuple(torch.zeros(slots, 1, max_rank, columns) for _, columns in slices)
        self.lora_b_stacked = tuple(torch.zeros(slots, 1, rows, max_rank) for rows, _ in slices)

    def set_lora(self, slot: int, lora_a: list[Tensor | None], lora_b: list[Tensor | None]) -> None:
        for index, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
            if a is not None and b is not None:
                a, b = self.cut(a, b, index)
                self.lora_a_stacked[index][slot, 0, : a.shape[0]] = a
                self.lora_b_stacked[index][slot, 0, :, : b.shape[1]] = b

    def cut(self, a: Tensor, b: Tensor, index: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


class BaseLinearLayerWithLoRA(BaseLayerWithLoRA): ...


class ColumnParallelLinearWithLoRA(BaseLinearLayerWithLoRA):
    def cut(self, a: Tensor, b: Tensor, index: int) -> tuple[Tensor, Tensor]:
        return a, self.base_layer.shard(b, index)


class MergedColumnParallelLinearWithLoRA(ColumnParallelLinearWithLoRA): ...


class MergedQKVParallelLinearWithLoRA(MergedColumnParallelLinearWithLoRA): ...


class RowParallelLinearWithLoRA(BaseLinearLayerWithLoRA):
    def cut(self, a: Tensor, b: Tensor, index: int) -> tuple[Tensor, Tensor]:
        return self.base_layer.shard(a), b


class VocabParallelEmbeddingWithLoRA(BaseLayerWithLoRA):
    """Its slots are single tensors."""

    def __init__(self, slots: int, max_rank: int) -> None:
        self.lora_a_stacked = torch.zeros(slots, VOCAB, max_rank)
        self.lora_b_stacked = torch.zeros(slots, 1, HIDDEN, max_rank)


WRAPPERS: dict[type, type[BaseLayerWithLoRA]] = {
    QKVParallelLinear: MergedQKVParallelLinearWithLoRA,
    MergedColumnParallelLinear: MergedColumnParallelLinearWithLoRA,
    RowParallelLinear: RowParallelLinearWithLoRA,
}


@dataclass
class Adapter:
    """vLLM's `LoRAModel`: whole tensors by the engine's names, those of fused layers in lists."""

    loras: dict[str, Any]

    def get_lora(self, name: str) -> Any:
        return self.loras.get(name)


@dataclass
class Manager:
    """vLLM's `LoRAModelManager`."""

    model: Any
    slots: int = 3
    max_rank: int = 8
    lora_config: Any = field(default_factory=lambda: SimpleNamespace(fully_sharded_loras=False))

    def __post_init__(self) -> None:
        self.lora_index_to_id: list[int | None] = [None] * self.slots
        self.modules: dict[str, Any] = {"model.embed_tokens": VocabParallelEmbeddingWithLoRA(self.slots, self.max_rank)}
        self.packed_modules: dict[str, list[str]] = {}
        self._adapters: dict[int, Adapter] = {}
        for path, layer in self.model.named_modules():
            if isinstance(layer, (ColumnParallelLinear, RowParallelLinear)):
                self.modules[path] = WRAPPERS[type(layer)](layer, layer.slices, self.slots, self.max_rank)
                parent, _, last = path.rpartition(".")
                if last in PACKED:
                    self.packed_modules[path] = [f"{parent}.{name}" for name in PACKED[last]]

    def list_adapters(self) -> dict[int, Adapter]:
        return dict(self._adapters)

    def load(self, number: int, tensors: dict[str, Tensor], *, slot: int) -> None:
        """Cache an adapter (PEFT's names, scale in B), and copy it into a slot."""
        plain = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
        loras: dict[str, Any] = {}
        for path, module in self.modules.items():
            names = self.packed_modules.get(path, [path])
            a = [plain.get(f"{name}.lora_A.weight") for name in names]
            b = [plain.get(f"{name}.lora_B.weight") for name in names]
            if any(tensor is not None for tensor in a):
                packed = len(names) > 1
                loras[path] = SimpleNamespace(lora_a=a if packed else a[0], lora_b=b if packed else b[0])
                module.set_lora(slot, a, b)
        self._adapters[number] = Adapter(loras)
        self.lora_index_to_id[slot] = number
