"""Base weights read back from a vLLM worker, and new ones put into it."""

import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from support.fake_vllm import PACKED, Group, engine_model, published_model, run_ranks
from support.fake_vllm_layers import LinearBase, ParallelLMHead
from turnwise.inference.vllm_base import resident_weights
from turnwise.inference.vllm_layers import CannotRead
from turnwise.inference.vllm_load import load_into_model, repack_outputs_after_reload, used_as_published
from turnwise.transport import tensor_digest

Tensors = dict[str, torch.Tensor]
Change = Callable[[Any], None]


def read(tensors: Tensors, *, world: int = 1, kv_heads: int = 2, change: Change = lambda model: None) -> list[Tensors]:
    """What each rank reads back from its part of the model, after `change(model)`."""

    def work(group: Group) -> Tensors:
        model = engine_model(tensors, rank=group.rank_in_group, world=group.world_size, kv_heads=kv_heads)
        change(model)
        return dict(resident_weights(model, PACKED, group))

    return run_ranks(world, work)


@settings(deadline=None, max_examples=30)
@given(world=st.sampled_from([1, 2, 4]), kv_heads=st.sampled_from([1, 2, 4]), tied=st.booleans(), bias=st.booleans())
def test_every_rank_reads_back_the_published_model(world: int, kv_heads: int, tied: bool, bias: bool) -> None:
    """Whole, unfused, without the padding of the vocabulary, tied weights once."""
    tensors = published_model(kv_heads=kv_heads, tied=tied, bias=bias)
    found = read(tensors, world=world, kv_heads=kv_heads)
    assert [tensor_digest(each) for each in found] == [tensor_digest(tensors)] * world


def pack(model: Any) -> None:
    """What vLLM does to a model on a CPU when it has loaded it."""
    for layer in model.modules():
        if hasattr(layer, "quant_method"):
            layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_a_cpu_packed_are_read_back_through_its_kernel(tied: bool) -> None:
    tensors = published_model(tied=tied, bias=True)
    assert [tensor_digest(each) for each in read(tensors, world=2, change=pack)] == [tensor_digest(tensors)] * 2


def test_an_output_layer_that_still_multiplies_with_the_old_embedding_is_refused() -> None:
    def change(model: Any) -> None:
        pack(model)
        model.model.embed_tokens.weight.data.mul_(2.0)

    with pytest.raises(CannotRead, match="lm_head: this CPU engine computes logits with other weights"):
        read(published_model(), change=change)


def test_layers_wrapped_for_adapters_keep_the_names_of_the_model() -> None:
    class Wrapper(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base_layer = base

    def change(model: Any) -> None:
        for layer in model.model.layers:
            layer.self_attn.qkv_proj = Wrapper(layer.self_attn.qkv_proj)
            layer.mlp.down_proj = Wrapper(layer.mlp.down_proj)

    tensors = published_model(bias=True)
    assert tensor_digest(read(tensors, change=change)[0]) == tensor_digest(tensors)


def test_an_output_layer_that_lost_its_tie_shows() -> None:
    def change(model: Any) -> None:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)

    assert "lm_head.weight" in read(published_model(), change=change)[0]


def quantised(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.quant_method = type("Fp8LinearMethod", (), {})()


def with_added_tokens(model: Any) -> None:
    model.model.embed_tokens.num_added_embeddings = 2


def fused_otherwise(model: Any) -> None:
    model.model.layers[0].mlp.gate_up_proj.output_sizes = [8, 8, 8]


def renamed(model: Any) -> None:
    model.hf_to_vllm_mapper = SimpleNamespace(apply_list=lambda names: [f"language_model.{name}" for name in names])


def divided_by_its_own_loader(model: Any) -> None:
    norm = model.model.layers[1].input_layernorm
    norm.weight.weight_loader = lambda parameter, tensor: None


@pytest.mark.parametrize(
    ("change", "world", "words"),
    [
        (quantised, 1, r"layers\.0\.mlp\.down_proj .* handled by Fp8LinearMethod"),
        (with_added_tokens, 1, "2 added tokens"),
        (fused_otherwise, 1, "gate_up_proj .* fused in a way"),
        (renamed, 1, "other names in vLLM"),
        (divided_by_its_own_loader, 2, r"layers\.1\.input_layernorm .*divided among ranks"),
    ],
)
def test_what_cannot_be_put_together_is_refused_by_every_rank_before_any_collective(
    change: Change, world: int, words: str
) -> None:
    def work(group: Group) -> str:
        model = engine_model(published_model(), rank=group.rank_in_group, world=group.world_size)
        change(model)
        with pytest.raises(CannotRead) as refused:
            next(resident_weights(model, PACKED, group))
        return str(refused.value)

    for message in run_ranks(world, work):
        assert re.search(words, message)


def test_a_loader_of_its_own_does_not_matter_on_one_rank() -> None:
    tensors = published_model()
    assert tensor_digest(read(tensors, change=divided_by_its_own_loader)[0]) == tensor_digest(tensors)


# --- new weights ------------------------------------------------------------------------------------------------------


class Runner:
    """vLLM's model runner over a fake model, whose `load_weights` copies parameters that have the names of the file."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.reloaded: Tensors = {}
        model.load_weights = self._load

    def get_model(self) -> Any:
        return self.model

    def reload_weights(self, *, weights_iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.reloaded = dict(weights_iterator)

    def _load(self, pairs: Iterator[tuple[str, torch.Tensor]]) -> set[str]:
        loaded: set[str] = set()
        for name, tensor in pairs:
            self.model.get_parameter(name).data.copy_(tensor)
            loaded.add(name)
        return loaded


def plain_model() -> Any:
    torch.manual_seed(0)
    model = nn.Module()
    model.norm = nn.LayerNorm(4)
    model.out = nn.Linear(4, 3)
    return model


def through_one_buffer(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor overwrites the one before, as those of a broadcast do."""
    buffer = torch.empty(max(tensor.numel() for tensor in tensors.values()))
    for name, tensor in tensors.items():
        yield name, buffer[: tensor.numel()].view(tensor.shape).copy_(tensor)
    buffer.fill_(torch.nan)


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_new_weights_get_in_though_one_buffer_serves_them_all(device: str) -> None:
    runner = Runner(plain_model())
    wanted = {name: torch.randn_like(value) for name, value in runner.model.named_parameters()}
    places = {name: value.data_ptr() for name, value in runner.model.named_parameters()}
    load_into_model(SimpleNamespace(model_runner=runner, device=torch.device(device)), through_one_buffer(wanted))
    held = dict(runner.model.named_parameters()) if device == "cuda:0" else runner.reloaded
    assert tensor_digest(held) == tensor_digest(wanted)
    assert {name: value.data_ptr() for name, value in runner.model.named_parameters()} == places


def test_a_tensor_that_did_not_come_is_named() -> None:
    runner = Runner(plain_model())
    worker = SimpleNamespace(model_runner=runner, device=torch.device("cuda"))
    with pytest.raises(ValueError, match=r"2 tensors .* got no new values: out\.bias, out\.weight"):
        load_into_model(worker, iter([("norm.weight", torch.ones(4)), ("norm.bias", torch.ones(4))]))


class Attention(nn.Module):
    def process_weights_after_loading(self, dtype: torch.dtype) -> None: ...


class MLAAttention(Attention): ...


@pytest.mark.parametrize(
    ("layer", "plain"),
    [
        (Attention(), True),
        (LinearBase(0, 1), True),
        (MLAAttention(), False),
        (type("Experts", (nn.Module,), {"quant_method": type("UnquantizedFusedMoEMethod", (), {})()})(), False),
    ],
)
def test_weights_that_the_engine_changes_after_loading_are_not_copied_straight_to_their_places(
    layer: nn.Module, plain: bool
) -> None:
    model = plain_model()
    model.layer = layer
    assert used_as_published(model, "cuda:0") is plain
    assert not used_as_published(model, "cpu")


def test_after_a_reload_a_cpu_packs_its_output_layer_anew() -> None:
    class CpuRunner:
        def __init__(self) -> None:
            self.model = engine_model(published_model())
            pack(self.model)

        def get_model(self) -> Any:
            return self.model

        def reload_weights(self, factor: float) -> None:
            self.model.model.embed_tokens.weight.data.mul_(factor)

    repack_outputs_after_reload(CpuRunner)
    runner = CpuRunner()
    runner.reload_weights(3.0)
    (head,) = (layer for layer in runner.model.modules() if isinstance(layer, ParallelLMHead))
    x = torch.randn(2, head.embedding_dim)
    assert torch.equal(head.quant_method.apply(head, x, None), x @ runner.model.model.embed_tokens.weight.T)
