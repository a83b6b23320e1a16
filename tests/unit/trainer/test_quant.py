"""MXFP4 in the trainer: packed bases under adapters, fake quantisation, and what of both is published."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM

from support.batches import ConfigOf, make_batch
from support.quantized import quantize_folder
from turnwise.config import LoraConfig, QuantConfig
from turnwise.kernels.mxfp4 import MXFP4Linear, reference
from turnwise.trainer.lora_layer import LoraLinear
from turnwise.trainer.model import ModelError, Policy, build_policy
from turnwise.trainer.packing import pack
from turnwise.trainer.publish import full_tensors
from turnwise.trainer.quant import FakeQuantLinear, pack_linears, train_quantised
from turnwise.trainer.recompute import Scope
from turnwise.trainer.step import Learner

DOWN = "model.layers.0.mlp.down_proj"
QUANT: dict[str, Any] = {"model": {"quant": {}}}
FULL_QUANT: dict[str, Any] = {"model": {"quant": {}, "lora": None}}


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return quantize_folder(tiny_model, tmp_path_factory.mktemp("packed") / "tiny")


def rounded(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return reference.dequantize(*reference.quantize(weight), dtype)


def logprobs(policy: Policy) -> Tensor:
    (batch,) = pack(make_batch(1).samples, max_tokens=10_000)[0]
    return policy.stats(batch, temperature=1.0).logprobs


def layer_pair(bias: bool) -> tuple[LoraLinear, LoraLinear, nn.Linear]:
    """An adapter over a packed base, one with the same numbers over a plain base of rounded weights, and that base."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=bias).double()
    packed = LoraLinear(MXFP4Linear.from_linear(linear), LoraConfig(rank=4)).double()
    linear.weight.data = rounded(linear.weight.data.float()).double()
    plain = LoraLinear(linear, LoraConfig(rank=4)).double()
    plain.load_state_dict({name: value for name, value in packed.state_dict().items() if "lora" in name}, strict=False)
    for layer in (packed, plain):
        layer.lora_B.data = torch.linspace(-1, 1, layer.lora_B.numel(), dtype=torch.float64).view_as(layer.lora_B)
    return packed, plain, linear


@pytest.mark.parametrize("bias", [False, True])
def test_an_adapter_over_a_packed_base_has_the_values_and_gradients_of_one_over_the_rounded_base(bias: bool) -> None:
    packed, plain, _ = layer_pair(bias)
    x = torch.randn(3, 5, 64, dtype=torch.float64, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    for layer, value in ((packed, x), (plain, other)):
        layer(value).square().sum().backward()
    torch.testing.assert_close(packed(x), plain(other))
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(packed.lora_A.grad, plain.lora_A.grad)
    torch.testing.assert_close(packed.lora_B.grad, plain.lora_B.grad)


def test_gradcheck_of_an_adapter_over_a_packed_base() -> None:
    packed, _, _ = layer_pair(bias=True)
    x = torch.randn(2, 3, 64, dtype=torch.float64, requires_grad=True)

    def value(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.func.functional_call(packed, {"lora_A": a, "lora_B": b}, (x,))

    assert torch.autograd.gradcheck(value, (x, packed.lora_A, packed.lora_B))


def test_between_the_passes_nothing_is_held_of_the_base_but_its_bytes() -> None:
    packed, _, _ = layer_pair(bias=False)
    held: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        held.add(tensor.untyped_storage().data_ptr())
        return tensor

    x = torch.randn(5, 64, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = packed(x)
    base = packed.base
    assert isinstance(base, MXFP4Linear)
    known = {t.untyped_storage().data_ptr() for t in (x, packed.lora_A, packed.lora_B, base.weight_packed, base.weight_scale)}
    assert len(held - known) == 1  # x A^T
    y.sum().backward()


def test_the_policy_from_a_folder_holds_its_bytes_under_adapters_and_computes_with_them(
    config_of: ConfigOf, device: torch.device, packed_folder: Path, tiny_model: Path
) -> None:
    from_folder = build_policy(config_of(QUANT, model={"name": str(tiny_model), "quantized": str(packed_folder)}), device)
    from_model = build_policy(config_of(QUANT), device)
    stored = load_file(packed_folder / "model.safetensors")
    for policy in (from_folder.policy, from_model.policy):
        held = {name.replace(".base.", "."): value for name, value in policy.model.named_buffers() if "weight_" in name}
        assert held.keys() == {name for name in stored if "weight_" in name}
        assert all(torch.equal(held[name], stored[name]) for name in held)
    plain = build_policy(config_of(), device).policy
    with torch.no_grad():
        assert (logprobs(from_folder.policy) - logprobs(plain)).abs().max() > 0.01
        for module in plain.modules():
            if isinstance(module, LoraLinear):
                module.base.weight.copy_(rounded(module.base.weight))
        torch.testing.assert_close(logprobs(from_folder.policy), logprobs(plain), rtol=0, atol=1e-5)
    assert torch.equal(logprobs(from_folder.policy), logprobs(from_model.policy))
    assert list(from_folder.notes)[:2] == list(from_model.notes)[:2]


def test_names_of_adapters_are_those_over_a_plain_base(config_of: ConfigOf, device: torch.device) -> None:
    plain, packed = Learner(config_of(), device), Learner(config_of(QUANT), device)
    assert full_tensors(plain).keys() == full_tensors(packed).keys()
    assert list(plain.parameters) == list(packed.parameters)
    assert plain.meter.frozen == packed.meter.frozen
    assert not any("weight_packed" in name for name in packed.parameters)


def test_layers_that_are_packed_and_layers_with_adapters_may_be_different_ones(config_of: ConfigOf, device: torch.device) -> None:
    model = {"quant": {"target_modules": ["up_proj", "q_proj"]}, "lora": {"target_modules": ["q_proj", "v_proj"]}}
    policy = Learner(config_of({"model": model}), device).policy
    kinds = {name: type(module) for name, module in policy.layers[0].named_modules()}
    assert kinds["self_attn.q_proj.base"] is kinds["mlp.up_proj"] is MXFP4Linear
    assert kinds["self_attn.v_proj.base"] is kinds["mlp.down_proj"] is nn.Linear
    logprobs(policy).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in policy.trainable().values())


@pytest.mark.parametrize("scope", ["layer", "mlp"])
@pytest.mark.parametrize("lora", [True, False])
def test_recomputed_layers_have_the_gradients_of_plain_ones_to_the_bit(
    scope: Scope, lora: bool, config_of: ConfigOf, device: torch.device
) -> None:
    def gradients(**options: Any) -> dict[str, Tensor]:
        config = config_of({"model": {"quant": {}, **({} if lora else {"lora": None}), **options}})
        policy = build_policy(config, device).policy
        logprobs(policy).mean().backward()
        return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}

    plain, other = gradients(), gradients(gradient_checkpointing=True, checkpoint_scope=scope)
    assert plain.keys() == other.keys()
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_fake_quantisation_computes_with_rounded_weights_in_both_passes(tiny_model: Path) -> None:
    """Against a model whose weights are the rounded ones: the same outputs, and for the masters the gradients of its weights."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    twin = AutoModelForCausalLM.from_pretrained(tiny_model)
    fake = train_quantised(model, QuantConfig(), torch.float32)
    masters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in twin.named_parameters():
        parameter.data = fake.served(name, parameter.data)
    assert {name for name, parameter in twin.named_parameters() if not torch.equal(parameter, masters[name])} == fake.names
    ids = torch.arange(40).reshape(2, 20)
    for network in (model, twin):
        network(ids).logits.square().mean().backward()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, twin(ids).logits)
    expected = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-7)
        assert torch.equal(parameter, masters[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_published_is_what_the_policy_computes_with(
    config_of: ConfigOf, device: torch.device, tiny_model: Path, dtype: str
) -> None:
    """In bfloat16 masters are float32 under FSDP2, and weights rounded from them would differ from those of the forward pass."""
    learner = Learner(config_of(FULL_QUANT, model={"name": str(tiny_model), "dtype": dtype}), device)
    assert isinstance(learner.policy, FSDPModule) == (dtype == "bfloat16")
    learner.step(make_batch(1))
    published = full_tensors(learner)
    master = learner.parameters[f"{DOWN}.weight"].detach()
    master = master.full_tensor() if hasattr(master, "full_tensor") else master
    assert master.dtype == torch.float32
    assert torch.equal(published[f"{DOWN}.weight"], rounded(master.to(learner.dtype), learner.dtype))
    plain = Learner(config_of({"model": {"lora": None}}, model={"name": str(tiny_model), "dtype": dtype}), device)
    for name, parameter in plain.parameters.items():
        target = parameter.detach()
        (target.to_local() if hasattr(target, "to_local") else target).copy_(published[name])
    with torch.no_grad():
        assert torch.equal(logprobs(learner.policy), logprobs(plain.policy))


def test_rounding_the_masters_instead_would_show(tiny_model: Path) -> None:
    """The planted fault of the test above: in a few places the codes differ."""
    torch.manual_seed(0)
    master = torch.randn(256, 256)
    from_masters, from_copies = rounded(master, torch.bfloat16), rounded(master.bfloat16(), torch.bfloat16)
    assert 0 < (from_masters != from_copies).float().mean() < 0.05


def test_the_reference_of_a_kl_penalty_is_the_quantised_initial_policy(config_of: ConfigOf, device: torch.device) -> None:
    learner = Learner(config_of(FULL_QUANT | {"loss": {"kl_beta": 0.1}}), device)
    assert learner.reference is not None
    with torch.no_grad():
        torch.testing.assert_close(logprobs(learner.reference), logprobs(learner.policy), rtol=0, atol=1e-6)


def test_masters_train_although_their_codes_stay(config_of: ConfigOf, device: torch.device) -> None:
    """Steps far below a code's distance add up in the masters."""
    learner = Learner(config_of(FULL_QUANT | {"optim": {"lr": 1e-6}}), device)
    before = learner.parameters[f"{DOWN}.weight"].detach().clone()
    learner.step(make_batch(1))
    after = learner.parameters[f"{DOWN}.weight"].detach()
    assert (after != before).float().mean() > 0.9
    assert (rounded(after) != rounded(before)).float().mean() < 0.01


def test_random_weights_are_quantised_where_they_are_drawn(config_of: ConfigOf, device: torch.device, tiny_model: Path) -> None:
    loaded = build_policy(config_of(QUANT, model={"name": str(tiny_model), "load_format": "dummy"}), device)
    assert sum(isinstance(module, MXFP4Linear) for module in loaded.policy.modules()) == 14
    assert "14 linear layers" in loaded.notes[0]


def test_a_name_without_a_layer_is_refused(tiny_model: Path) -> None:
    for quantise in (pack_linears, lambda m, q: train_quantised(m, q, torch.float32)):
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        with pytest.raises(ValueError, match=r"target_modules names W_pack, of which this model has no linear layer"):
            quantise(model, QuantConfig(target_modules=["q_proj", "W_pack"]))


def test_a_folder_that_does_not_fit_is_refused_by_its_key(
    config_of: ConfigOf, device: torch.device, packed_folder: Path, tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / "config.json").write_text((packed_folder / "config.json").read_text())
    with pytest.raises(ModelError, match=rf"model\.quantized = '{tmp_path}' cannot be loaded: .* has no \*\.safetensors"):
        build_policy(config_of(QUANT, model={"name": str(tiny_model), "quantized": str(tmp_path)}), device)


def test_layers_of_fake_quantisation_keep_the_parameters_of_those_that_they_replace(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = dict(model.named_parameters())
    train_quantised(model, QuantConfig(scale_mode="ceil"), torch.float32)
    after = dict(model.named_parameters())
    assert all(after[name] is before[name] for name in before)
    assert before.keys() == after.keys()
    layers = [module for module in model.modules() if isinstance(module, FakeQuantLinear)]
    assert len(layers) == 14
    assert {layer.scale_mode for layer in layers} == {"ceil"}
