"""Adapters read back from the slots of vLLM's LoRA layers."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.fake_vllm import HEAD, HEADS, HIDDEN, INNER, LAYERS, Group, Manager, engine_model, published_model, run_ranks
from turnwise.inference.vllm_adapters import activate, remember_requests, resident_adapter
from turnwise.inference.vllm_layers import CannotRead
from turnwise.transport import served_adapter, tensor_digest

Tensors = dict[str, torch.Tensor]
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapter(*, rank: int = 5, kv_heads: int = 2, modules: tuple[str, ...] = MODULES, seed: int = 0) -> Tensors:
    """Random tensors under PEFT's names."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = HEADS * HEAD, kv_heads * HEAD
    shapes = {"q_proj": (queries, HIDDEN), "k_proj": (keys, HIDDEN), "v_proj": (keys, HIDDEN), "o_proj": (HIDDEN, queries)}
    shapes |= {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    tensors: Tensors = {}
    for layer in range(LAYERS):
        for module in modules:
            part = "self_attn" if module in MODULES[:4] else "mlp"
            name = f"base_model.model.model.layers.{layer}.{part}.{module}"
            rows, columns = shapes[module]
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    return tensors


def manager_of(group: Group, tensors: Tensors, *, kv_heads: int = 2) -> Manager:
    """A rank's manager with the adapter as number 7 in slot 1, and another in slot 0."""
    model = engine_model(published_model(kv_heads=kv_heads), rank=group.rank_in_group, world=group.world_size, kv_heads=kv_heads)
    manager = Manager(model)
    manager.load(6, adapter(rank=8, kv_heads=kv_heads, seed=9), slot=0)
    manager.load(7, tensors, slot=1)
    return manager


def read(
    tensors: Tensors, *, world: int = 1, kv_heads: int = 2, change: Callable[[Manager, int], None] | None = None
) -> list[Tensors]:
    """What each rank reads back, after `change(manager, rank)`."""

    def work(group: Group) -> Tensors:
        manager = manager_of(group, tensors, kv_heads=kv_heads)
        if change is not None:
            change(manager, group.rank_in_group)
        return dict(resident_adapter(manager, 7, group))

    return run_ranks(world, work)


@settings(deadline=None, max_examples=40)
@given(
    world=st.sampled_from([1, 2, 4]),
    kv_heads=st.sampled_from([1, 2, 4]),
    rank=st.integers(1, 8),
    modules=st.sets(st.sampled_from(MODULES), min_size=1),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_rank_reads_back_the_adapter_that_was_loaded(
    world: int, kv_heads: int, rank: int, modules: set[str], dtype: torch.dtype
) -> None:
    """Whatever its rank, its modules, its type, and how many ranks share a key and value head."""
    tensors = served_adapter(adapter(rank=rank, kv_heads=kv_heads, modules=tuple(sorted(modules))), dtype=dtype, scale=1.5)
    found = read({name: tensor.float() for name, tensor in tensors.items()}, world=world, kv_heads=kv_heads)
    assert [tensor_digest({n: t.to(dtype) for n, t in each.items()}) for each in found] == [tensor_digest(tensors)] * world


@settings(deadline=None, max_examples=30)
@given(world=st.sampled_from([1, 2, 4]), data=st.data())
def test_one_value_changed_in_a_slot_shows_on_the_rank_that_holds_it(world: int, data: st.DataObject) -> None:
    """Though the cache in host memory still has the right one, and though another rank holds a good copy of it."""
    tensors = adapter(kv_heads=1)
    changed = data.draw(st.integers(0, world - 1))
    path = data.draw(st.sampled_from([f"model.layers.1.self_attn.{n}" for n in ("qkv_proj", "o_proj")]))
    side = data.draw(st.sampled_from(["lora_a_stacked", "lora_b_stacked"]))

    def change(manager: Manager, rank: int) -> None:
        if rank == changed:
            getattr(manager.modules[path], side)[-1][1, 0, 0, 0] += 0.5

    found = read(tensors, world=world, kv_heads=1, change=change)
    assert tensor_digest(found[changed]) != tensor_digest(tensors)


def test_other_slots_do_not_matter() -> None:
    def change(manager: Manager, rank: int) -> None:
        for module in manager.modules.values():
            for stacked in (*module.lora_a_stacked, *module.lora_b_stacked):
                stacked[2:] = 3.0

    def ignore_embedding(manager: Manager, rank: int) -> None:
        del manager.modules["model.embed_tokens"]
        change(manager, rank)

    tensors = adapter()
    assert tensor_digest(read(tensors, change=ignore_embedding)[0]) == tensor_digest(tensors)


@pytest.mark.parametrize(
    ("path", "side", "place"),
    [
        ("model.layers.0.self_attn.qkv_proj", "lora_a_stacked", (1, 0, 5, 0)),  # beyond the rank
        ("model.layers.0.mlp.down_proj", "lora_b_stacked", (1, 0, 0, 7)),
        ("model.layers.1.mlp.gate_up_proj", "lora_b_stacked", (1, 0, 0, 0)),  # a layer that the adapter leaves alone
    ],
)
def test_values_in_the_slot_that_the_adapter_does_not_have_are_refused(path: str, side: str, place: tuple[int, ...]) -> None:
    def change(manager: Manager, rank: int) -> None:
        getattr(manager.modules[path], side)[0][place] = 1e-6

    with pytest.raises(CannotRead, match=f"{path}: the adapter's slot holds values"):
        read(adapter(modules=("q_proj", "k_proj", "v_proj", "down_proj")), change=change)


def test_a_leftover_in_the_slot_of_the_embedding_is_refused() -> None:
    def change(manager: Manager, rank: int) -> None:
        manager.modules["model.embed_tokens"].lora_a_stacked[1, 3, 0] = 1.0

    with pytest.raises(CannotRead, match="embed_tokens"):
        read(adapter(), change=change)


def without_a_slice(manager: Manager, rank: int) -> None:
    manager.packed_modules["model.layers.0.mlp.gate_up_proj"].pop()


def on_an_embedding(manager: Manager, rank: int) -> None:
    manager.list_adapters()[7].loras["model.embed_tokens"] = SimpleNamespace(lora_a=torch.ones(1, 1), lora_b=torch.ones(1, 1))


def renamed(manager: Manager, rank: int) -> None:
    manager.model.hf_to_vllm_mapper = SimpleNamespace(apply_list=lambda names: [f"language_model.{name}" for name in names])


def fully_sharded(manager: Manager, rank: int) -> None:
    manager.lora_config.fully_sharded_loras = True


def fused_without_slices(manager: Manager, rank: int) -> None:
    """As Phi-3: one adapter over both halves of `gate_up_proj`, whose ranks hold parts of each."""
    path = "model.layers.0.mlp.gate_up_proj"
    module, lora = manager.modules[path], manager.list_adapters()[7].loras[path]
    del manager.packed_modules[path]
    module.lora_a_stacked, module.lora_b_stacked = module.lora_a_stacked[:1], module.lora_b_stacked[:1]
    lora.lora_a, lora.lora_b = lora.lora_a[0], lora.lora_b[0]


@pytest.mark.parametrize(
    ("change", "world", "words"),
    [
        (without_a_slice, 1, "gate_up_proj: adapters of MergedColumnParallelLinearWithLoRA cannot be read back"),
        (on_an_embedding, 1, "embed_tokens: adapters of VocabParallelEmbeddingWithLoRA"),
        (renamed, 1, "other names in vLLM than in its files"),
        (fully_sharded, 2, "fully_sharded_loras"),
        (fused_without_slices, 2, r"inference\.tp = 1"),
    ],
)
def test_what_cannot_be_read_back_is_refused_by_every_rank_before_any_collective(
    change: Callable[[Manager, int], None], world: int, words: str
) -> None:
    def work(group: Group) -> str:
        manager = manager_of(group, adapter())
        change(manager, group.rank_in_group)
        with pytest.raises(CannotRead) as refused:
            next(resident_adapter(manager, 7, group))
        return str(refused.value)

    for message in run_ranks(world, work):
        assert re.search(words, message)


def test_a_mapper_that_only_names_fused_layers_is_no_renaming() -> None:
    def change(manager: Manager, rank: int) -> None:
        fused = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}

        def apply_list(names: list[str]) -> list[str]:
            return [next((n.replace(old, new) for old, new in fused.items() if old in n), n) for n in names]

        manager.model.hf_to_vllm_mapper = SimpleNamespace(apply_list=apply_list)

    modules = ("q_proj", "k_proj", "v_proj", "o_proj")
    assert tensor_digest(read(adapter(modules=modules), change=change)[0]) == tensor_digest(adapter(modules=modules))


# --- names ------------------------------------------------------------------------------------------------------------


def worker_manager() -> Any:
    """A class with vLLM's method, which refuses a broken adapter."""

    class WorkerManager:
        def __init__(self) -> None:
            self.added: list[int] = []

        def add_adapter(self, request: Any) -> bool:
            if request.lora_name == "broken":
                raise ValueError("no tensors")
            self.added.append(request.lora_int_id)
            return True

    remember_requests(WorkerManager)
    return WorkerManager()


def request(name: str, number: int) -> Any:
    return SimpleNamespace(lora_name=name, lora_int_id=number)


def test_a_name_stands_for_its_newest_request() -> None:
    """A request of v1 that still runs, from before v1 was loaded anew, comes by with the old number at every step."""
    manager = worker_manager()
    for name, number in (("v1", 1), ("v2", 2), ("v1", 3), ("v1", 1)):
        assert manager.add_adapter(request(name, number)) is True
    assert activate(manager, "v1").lora_int_id == 3
    assert activate(manager, "v2").lora_int_id == 2
    assert manager.added[-2:] == [3, 2]  # brought into a slot as by a request


def test_a_name_that_was_never_loaded_or_failed_to_load_is_refused_with_those_that_were() -> None:
    manager = worker_manager()
    with pytest.raises(CannotRead, match="no adapter v1 was loaded into this engine; the newest loaded ones: none"):
        activate(manager, "v1")
    manager.add_adapter(request("v1", 1))
    with pytest.raises(ValueError, match="no tensors"):
        manager.add_adapter(request("broken", 2))
    with pytest.raises(CannotRead, match=r"no adapter broken was .* ones: v1"):
        activate(manager, "broken")


def test_two_engines_in_one_process_do_not_share_names() -> None:
    first = worker_manager()
    first.add_adapter(request("v1", 1))
    with pytest.raises(CannotRead, match="v1"):
        activate(type(first)(), "v1")
