"""Noise in norms: which get it, how much, that it goes away to the bit, and what is reported about it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from support.adapters import reference_logprobs
from support.engine_support import FAMILIES, build, random_prompts
from support.noisy_engine import Deaf, bare
from turnwise.inference.embedded.decoder import Decoder
from turnwise.inference.embedded.generic_decoder import GenericDecoder
from turnwise.inference.embedded.lean import LeanModel
from turnwise.inference.embedded.lean_decoder import LeanDecoder
from turnwise.inference.norms import ModuleNorm, NormNoise, gaussian, gets_noise, module_norms
from turnwise.transport import tensor_digest

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
NAMES = ["model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"]
NAMES += ["model.layers.1.input_layernorm", "model.layers.1.post_attention_layernorm", "model.norm"]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {norm.name: norm.read().clone() for norm in module_norms(model)}


# --- which norms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_norms_of_the_layers_and_the_last_one_are_found_in_every_engine_under_the_same_names(family: str):
    """Those of queries and keys, which Qwen3 has, are not among them."""
    model = build(FAMILIES[family])
    assert sorted(norm.name for norm in module_norms(model)) == NAMES
    assert sorted(norm.name for norm in LeanModel(model, 64).norms()) == NAMES
    assert sorted(norm.name for norm in GenericDecoder(model, max_length=64).norms()) == NAMES


def test_norms_are_found_by_the_name_of_their_class():
    """vLLM's class is no relative of that of transformers, which a search by isinstance would look for."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    model = bare()
    assert not any(isinstance(module, LlamaRMSNorm) for module in model.modules())
    assert sorted(weights(model)) == NAMES


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.norm", True),
        ("model.layers.3.post_attention_layernorm", True),
        ("model.layers.3.self_attn.q_norm", False),
        ("model.layers.3.attention.query_layernorm", False),
        ("model.layers.3.linear_attn.norm", False),
    ],
)
def test_what_lies_inside_attention_is_left_out(name: str, expected: bool):
    assert gets_noise(name) is expected


def test_modules_without_a_weight_of_their_own_and_other_norms_are_passed_over():
    class RMSNormWithoutWeight(nn.Module):
        weight = torch.ones(3)

    assert module_norms(nn.ModuleDict({"a": RMSNormWithoutWeight(), "b": nn.LayerNorm(3)})) == []
    assert [norm.name for norm in module_norms(nn.ModuleDict({"c": nn.RMSNorm(3)}))] == ["c"]


# --- how much ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(rounds=st.lists(st.tuples(st.sampled_from([0.0, 1e-4, 0.01, 0.5]), st.integers(0, 2**63 - 1)), min_size=1, max_size=6))
def test_noise_is_added_to_the_clean_weights_whatever_was_there_before(rounds: list[tuple[float, int]]):
    model, noise = bare(size=16), NormNoise()
    clean = weights(model)
    for sigma, seed in rounds:
        noise.apply(module_norms(model), sigma, seed)
        for name, weight in weights(model).items():
            expected = clean[name] + sigma * gaussian(name, weight, seed) if sigma else clean[name]
            assert torch.equal(weight, expected)


def test_clean_weights_come_back_to_the_bit_and_parameters_keep_their_addresses():
    model, noise = bare().bfloat16(), NormNoise()
    clean = weights(model)
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    for seed in range(5):
        noise.apply(module_norms(model), 0.3, seed)
    noise.apply(module_norms(model), 0.0, 0)
    assert all(torch.equal(clean[name], weight) for name, weight in weights(model).items())
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == addresses


def test_weights_that_were_loaded_anew_are_the_clean_ones_from_then_on():
    """All of them, and also only some, as when a layer's tensors did not come."""
    model, other, noise = bare(seed=0), bare(seed=1), NormNoise()
    clean = weights(model)
    noise.apply(module_norms(model), 0.1, 1)
    for norm in module_norms(model)[:3]:
        norm.write(weights(other)[norm.name])
    noise.apply(module_norms(model), 0.1, 2)
    noise.apply(module_norms(model), 0.0, 0)
    for index, (name, weight) in enumerate(weights(model).items()):
        assert torch.equal(weight, weights(other)[name] if index < 3 else clean[name])


def test_every_rank_draws_the_same_noise_and_every_seed_and_norm_another():
    like = torch.ones(1000)
    assert torch.equal(gaussian("model.norm", like, 7), gaussian("model.norm", like.bfloat16(), 7))
    others = [gaussian("model.norm", like, 8), gaussian("model.layers.0.input_layernorm", like, 7)]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([gaussian("model.norm", like, 7), other]))[0, 1])) < 0.15


def test_another_process_draws_the_same_numbers():
    """Python's own hash of a string differs from process to process."""
    code = "import torch; from turnwise.inference.norms import gaussian; print(gaussian('n', torch.ones(3), 2**62).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(gaussian("n", torch.ones(3), 2**62).tolist())


def test_noise_is_gaussian_with_the_sigma_that_was_asked_for():
    numbers = gaussian("model.norm", torch.ones(200_000), 3).double()
    assert abs(float(numbers.mean())) < 0.01
    assert float(numbers.std()) == pytest.approx(1.0, abs=0.01)
    assert float((numbers.abs() < 1).double().mean()) == pytest.approx(0.6827, abs=0.005)


# --- what is reported -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sigma", "changed"), [(0.01, 0.70), (0.0032, 0.22), (0.0018, 0.028)])
def test_in_bfloat16_noise_below_the_rounding_of_a_weight_of_one_is_reported_as_lost(sigma: float, changed: float):
    """Half a step of 2^-7, which is the distance of neighbours above 1, is reached by these shares of a Gaussian."""
    model = nn.ModuleDict({"norm": nn.RMSNorm(400_000)}).bfloat16()
    with torch.no_grad():
        model["norm"].weight.fill_(1 + 2**-6)
    (found,) = NormNoise().apply(module_norms(model), sigma, 0)["norms"]
    assert found["changed"] == pytest.approx(changed, abs=0.01)
    assert abs(found["sigma"] - sigma) < found["resolution"]
    assert found["elements"] == 400_000
    assert found["magnitude"] == pytest.approx(1 + 2**-6)


def test_in_float32_all_of_it_arrives():
    found = NormNoise().apply(module_norms(bare()), 1e-4, 0)
    assert all(norm["changed"] > 0.99 for norm in found["norms"])
    assert all(norm["sigma"] == pytest.approx(1e-4, rel=0.2) for norm in found["norms"])
    assert all(norm["resolution"] < 1e-6 for norm in found["norms"])


def test_the_digest_is_that_of_the_weights_as_they_are():
    model, noise = bare(), NormNoise()
    clean = tensor_digest(weights(model))
    noisy = noise.apply(module_norms(model), 0.01, 3)["digest"]
    assert noisy == tensor_digest(weights(model)) != clean
    assert noise.apply(module_norms(model), 0.0, 0)["digest"] == clean


def test_a_norm_that_keeps_what_it_has_is_reported_unchanged():
    model = bare()
    name = "model.layers.1.input_layernorm"
    norms = [Deaf(n.name, model.get_submodule(n.name)) if n.name == name else n for n in module_norms(model)]
    found = {norm["name"]: norm for norm in NormNoise().apply(norms, 0.01, 3)["norms"]}
    assert (found[name]["sigma"], found[name]["changed"]) == (0, 0)
    assert found["model.norm"]["sigma"] == pytest.approx(0.01, rel=0.2)


# --- in the embedded engine -------------------------------------------------------------------------------------------


def decoder(kind: str, model: nn.Module) -> Decoder:
    if kind == "generic":
        return GenericDecoder(model, max_length=256)
    return LeanDecoder(LeanModel(model, 256), cache_bytes=2**20, deterministic=False)


@pytest.mark.parametrize("kind", ["lean", "generic"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_an_embedded_engine_computes_with_the_noise_and_without_it_as_before(kind: str, family: str):
    """Against transformers with the same noise put into its norms by hand."""
    model, noise, sigma, seed = build(FAMILIES[family]), NormNoise(), 0.05, 11
    prompt = random_prompts(1, longest=40)[0] * 2
    noisy = build(FAMILIES[family])
    for name, module in noisy.named_modules():
        if name in NAMES:
            module.weight += sigma * gaussian(name, module.weight, seed)
    engine = decoder(kind, model)
    clean, digest = engine.prompt_logprobs(prompt, None), engine.digest(None)
    noise.apply(engine.norms(), sigma, seed)
    found = engine.prompt_logprobs(prompt, None)
    assert max(abs(a - b) for a, b in zip(found, reference_logprobs(noisy, prompt), strict=True)) < 2e-5
    assert max(abs(a - b) for a, b in zip(found, clean, strict=True)) > 1e-3
    assert engine.digest(None) != digest
    noise.apply(engine.norms(), 0.0, 0)
    assert engine.prompt_logprobs(prompt, None) == clean
    assert engine.digest(None) == digest


def test_the_lean_engine_holds_noisy_norms_in_float32_and_clean_ones_in_its_own_type():
    model = LeanModel(build(FAMILIES["llama"], dtype=torch.bfloat16), 64)
    before, noise = [norm.read().clone() for norm in model.norms()], NormNoise()
    report = noise.apply(model.norms(), 1e-4, 5)
    assert {norm.read().dtype for norm in model.norms()} == {torch.float32}
    assert all(norm["changed"] > 0.99 for norm in report["norms"])
    prompt = torch.tensor([5, 6, 7])
    decoder = LeanDecoder(model, cache_bytes=0, deterministic=False)
    assert len(decoder.prompt_logprobs(prompt.tolist(), None)) == 2
    noise.apply(model.norms(), 0.0, 0)
    assert all(
        torch.equal(norm.read(), was) and norm.read().dtype == torch.bfloat16
        for norm, was in zip(model.norms(), before, strict=True)
    )


def test_a_float32_weight_without_noise_gives_the_bits_of_the_bfloat16_one():
    from turnwise.inference.embedded.lean import rms_norm

    x, weight = torch.randn(7, 64).bfloat16(), (1 + 0.1 * torch.randn(64)).bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-6), rms_norm(x, weight.float(), 1e-6))


def test_new_full_weights_of_the_embedded_engine_are_clean_ones(tiny_model: Path):
    from turnwise.inference.embedded.loading import load_model

    noise = NormNoise()
    engine = LeanDecoder(LeanModel(load_model(tiny_model, torch.float32), 64), cache_bytes=0, deterministic=False)
    clean = engine.digest(None)
    noise.apply(engine.norms(), 0.1, 1)
    engine.reload(tiny_model)
    assert engine.digest(None) == clean
    noise.apply(engine.norms(), 0.1, 2)
    noise.apply(engine.norms(), 0.0, 0)
    assert engine.digest(None) == clean


def test_module_norms_write_in_place():
    module = nn.RMSNorm(4)
    norm, held = ModuleNorm("norm", module), module.weight
    norm.write(torch.full((4,), 2.0, dtype=torch.float64))
    assert module.weight is held
    assert torch.equal(held.detach(), torch.full((4,), 2.0))
