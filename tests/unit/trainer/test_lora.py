"""Our LoRA layer against PEFT's."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from turnwise.config import LoraConfig
from turnwise.trainer.lora import ADAPTER_FILE, adapters_off, add_lora, lora_parameters, save_adapter
from turnwise.trainer.lora_layer import LoraLinear

# peft asks transformers by a name that is about to go
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CONFIG = LoraConfig(rank=4, alpha=12.0)
IDS = torch.arange(40).reshape(2, 20)


def plain(folder: Path, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def ours(folder: Path, dtype: torch.dtype = torch.float32, config: LoraConfig = CONFIG):
    model = plain(folder, dtype)
    add_lora(model, config, seed=3)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.lora_B.data.normal_(std=0.1, generator=generator)
    return model


def theirs(folder: Path, model: nn.Module, dtype: torch.dtype = torch.float32):
    """PEFT's model with the parameters of ours."""
    peft = get_peft_model(
        plain(folder, dtype), PeftConfig(r=4, lora_alpha=12, target_modules=CONFIG.target_modules, task_type="CAUSAL_LM")
    )
    values = {name.replace(".weight", ".default.weight"): p.data for name, p in lora_parameters(model)}
    named = dict(peft.named_parameters())
    assert {name for name, p in named.items() if p.requires_grad} == set(values)
    for name, value in values.items():
        assert named[name].dtype == value.dtype == torch.float32
        named[name].data.copy_(value)
    return peft


def test_logits_and_gradients_equal_those_of_peft(tiny_model: Path) -> None:
    model = ours(tiny_model)
    peft = theirs(tiny_model, model)
    results = []
    for network in (model, peft):
        logits = network(IDS).logits
        logits.square().mean().backward()
        results.append(logits.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    expected = {name.replace(".default", ""): p.grad for name, p in peft.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in lora_parameters(model)}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_over_a_bfloat16_base_it_agrees_with_peft_as_closely_as_bfloat16_allows(tiny_model: Path) -> None:
    model = ours(tiny_model, torch.bfloat16)
    peft = theirs(tiny_model, model, torch.bfloat16)
    with torch.no_grad():
        exact = ours(tiny_model)(IDS).logits
        error = (model(IDS).logits.float() - exact).abs().mean()
        their_error = (peft(IDS).logits.float() - exact).abs().mean()
    assert error < 1.5 * their_error


def test_gradcheck_of_the_fused_layer() -> None:
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(5, 3), LoraConfig(rank=2)).double()
    layer.lora_B.data.normal_()
    x = torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)

    def value(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, (x,))

    assert torch.autograd.gradcheck(value, (x, layer.lora_A, layer.lora_B))


def test_the_frozen_base_gets_no_gradient_and_the_first_policy_is_the_base(tiny_model: Path) -> None:
    model = plain(tiny_model)
    expected = model(IDS).logits.detach()
    add_lora(model, CONFIG, seed=0)
    logits = model(IDS).logits
    logits.sum().backward()
    assert torch.equal(logits.detach(), expected)
    assert all(p.grad is None for name, p in model.named_parameters() if "lora_" not in name)
    assert all(p.grad is not None for _, p in lora_parameters(model))


def test_adapters_off_gives_the_base_model_and_switches_back(tiny_model: Path) -> None:
    model = ours(tiny_model)
    with torch.no_grad():
        adapted, base = model(IDS).logits, plain(tiny_model)(IDS).logits
        with adapters_off(model):
            assert torch.equal(model(IDS).logits, base)
        assert torch.equal(model(IDS).logits, adapted)
    assert not torch.equal(adapted, base)


def test_dropout_acts_in_training_only(tiny_model: Path) -> None:
    model = ours(tiny_model, config=LoraConfig(rank=4, alpha=12.0, dropout=0.5))
    with torch.no_grad():
        without = model.eval()(IDS).logits
        with_dropout = model.train()(IDS).logits
    torch.testing.assert_close(without, ours(tiny_model)(IDS).logits.detach(), rtol=1e-5, atol=1e-6)
    assert (with_dropout - without).abs().max() > 1e-4


def test_the_saved_adapter_is_what_peft_loads(tiny_model: Path, tmp_path: Path) -> None:
    model = ours(tiny_model)
    save_adapter(tmp_path, dict(lora_parameters(model)), CONFIG, str(tiny_model))
    peft = PeftModel.from_pretrained(plain(tiny_model), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(peft(IDS).logits, model(IDS).logits, rtol=1e-5, atol=1e-6)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in load_file(tmp_path / ADAPTER_FILE)


def test_the_same_seed_draws_the_same_adapter_and_leaves_the_global_generator_alone(tiny_model: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = (plain(tiny_model) for _ in range(2))
    add_lora(first, CONFIG, seed=1)
    state = torch.get_rng_state()
    torch.rand(3)
    add_lora(second, CONFIG, seed=1)
    assert torch.equal(before, state)
    for (_, a), (_, b) in zip(lora_parameters(first), lora_parameters(second), strict=True):
        assert torch.equal(a, b)


def test_a_target_that_matches_no_layer_is_named_with_those_there_are(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match=r"target_modules names \['qkv'\].*it has .*q_proj"):
        add_lora(plain(tiny_model), LoraConfig(target_modules=["q_proj", "qkv"]), seed=0)


class Block(nn.Module):
    """Layers under the names of a transformer's, of which q, k and v read one input, and gate and up another."""

    def __init__(self) -> None:
        super().__init__()
        for name, inputs, outputs in (("q", 8, 8), ("k", 8, 7), ("v", 8, 1), ("o", 8, 8), ("gate", 8, 5), ("up", 8, 5)):
            setattr(self, f"{name}_proj", nn.Linear(inputs, outputs, bias=False))
        self.down_proj = nn.Linear(5, 8, bias=False)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        seen = x if other is None else other
        mixed = self.q_proj(x) + torch.cat([self.k_proj(seen), self.v_proj(seen)], dim=-1)
        hidden = self.o_proj(mixed)
        return self.down_proj(self.gate_proj(hidden).sigmoid() * self.up_proj(hidden))


def block(*, shared: bool = True) -> Block:
    torch.manual_seed(0)
    made = Block().double()
    add_lora(made, LoraConfig(rank=3), seed=0)
    for module in made.modules():
        if isinstance(module, LoraLinear):
            module.double().lora_B.data.normal_()
            module.shared = module.shared if shared else None
    return made


def outcome(model: nn.Module, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Result and every gradient, the inputs' too."""
    leaves = [given.clone().requires_grad_() for given in inputs]
    result = model(*leaves)
    result.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": result.detach(), **found, **{f"x{i}": leaf.grad for i, leaf in enumerate(leaves) if leaf.grad is not None}}


@pytest.mark.parametrize("inputs", [1, 2], ids=["all read one input", "k and v read another input than q"])
def test_layers_that_share_a_product_give_what_they_give_alone(inputs: int) -> None:
    given = [torch.randn(3, 4, 8, dtype=torch.float64) for _ in range(inputs)]
    torch.testing.assert_close(outcome(block(), *given), outcome(block(shared=False), *given))


def test_siblings_read_their_input_once_and_hold_nothing_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    rows_of_a: list[int] = []

    def counted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows_of_a.append(weight.shape[0])
        return x @ weight.T

    model = block()
    monkeypatch.setattr("turnwise.trainer.lora_layer.product", counted)
    with torch.no_grad():
        model(torch.randn(3, 8, dtype=torch.float64))
    assert sorted(rows for rows in rows_of_a if rows % 3 == 0) == [3, 3, 6, 9]  # A of o, of down, of gate and up, of q, k and v
    groups = [model.q_proj.shared, model.gate_proj.shared]
    assert all(group._x is None and not group._waiting for group in groups)
    assert model.o_proj.shared is None
