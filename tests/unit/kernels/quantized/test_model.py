"""Models from folders of MXFP4 weights: packed layers and decoded ones compute the same, and damage is named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from support.quantized import quantize_folder
from turnwise.kernels.mxfp4 import MXFP4Linear, reference
from turnwise.kernels.quantized.layout import LayoutError
from turnwise.kernels.quantized.model import load_decoded, load_packed

IDS = torch.arange(40).reshape(2, 20)
DOWN = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return quantize_folder(tiny_model, tmp_path_factory.mktemp("packed") / "tiny")


@pytest.fixture
def own_copy(packed_folder: Path, tmp_path: Path) -> Path:
    """The folder again, to be damaged."""
    for path in packed_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def rounded(folder: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    """The plain model, its linear layers rounded to MXFP4 by the specification."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
            original = load_file(folder / "model.safetensors")[f"{name}.weight"]
            module.weight.data = reference.dequantize(*reference.quantize(original), dtype)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_and_decoded_models_compute_what_a_rounded_model_does(packed_folder: Path, tiny_model: Path, dtype: torch.dtype):
    packed = load_packed(packed_folder, dtype)
    decoded, codes = load_decoded(packed_folder, dtype)
    assert sum(isinstance(module, MXFP4Linear) for module in packed.modules()) == len(codes) == 14
    assert not any(isinstance(module, MXFP4Linear) for module in decoded.modules())
    with torch.no_grad():
        expected = rounded(tiny_model, dtype)(IDS).logits
        assert torch.equal(decoded(IDS).logits, expected)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(packed(IDS).logits, expected, rtol=0, atol=tolerance)
        assert (AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype)(IDS).logits - expected).abs().max() > 0.01
    assert packed.dtype == decoded.dtype == dtype
    assert not any(parameter.requires_grad for parameter in (*packed.parameters(), *decoded.parameters()))
    assert packed.get_output_embeddings().weight is packed.get_input_embeddings().weight


def test_every_layer_holds_the_bytes_of_the_file(packed_folder: Path):
    stored = load_file(packed_folder / "model.safetensors")
    _, codes = load_decoded(packed_folder, "auto")
    held = dict(load_packed(packed_folder, "auto").named_buffers())
    for name, (packed, scales) in codes.items():
        for kind, tensor in (("weight_packed", packed), ("weight_scale", scales)):
            assert torch.equal(held[f"{name}.{kind}"], stored[f"{name}.{kind}"])
            assert torch.equal(tensor, stored[f"{name}.{kind}"])


def test_biases_untied_output_layers_and_several_types_are_kept(tmp_path: Path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 96}
    config = Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    model = Qwen2ForCausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.q_proj.bias.data.normal_()
    model.save_pretrained(tmp_path / "model")
    packed = load_packed(quantize_folder(tmp_path / "model", tmp_path / "q"), torch.float32)
    with torch.no_grad():
        expected = rounded(tmp_path / "model", torch.float32)(IDS).logits
        torch.testing.assert_close(packed(IDS).logits, expected, rtol=0, atol=1e-5)
    assert packed.get_output_embeddings().weight is not packed.get_input_embeddings().weight


def drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (drop("model.norm.weight"), r"lacks 1 tensors of LlamaForCausalLM, the first is model\.norm\.weight"),
        (drop(f"{DOWN}.weight_scale"), "weight_packed is there without"),
        (
            lambda t: (drop(f"{DOWN}.weight_scale")(t), drop(f"{DOWN}.weight_packed")(t)),
            rf"lacks 1 tensors .* the first is {DOWN}\.weight",
        ),
        (
            lambda t: t.update({"model.other.weight": torch.zeros(1)}),
            r"holds model\.other\.weight, which LlamaForCausalLM has not",
        ),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), r"model\.norm\.weight has shape \[3\] .* expected \[64\]"),
        (
            lambda t: t.update({f"{DOWN}.weight_scale": torch.zeros(64, 3, dtype=torch.uint8)}),
            rf"{DOWN}: MXFP4 codes .* do not fit",
        ),
        (
            lambda t: t.update(
                {
                    "model.q.weight_packed": t[f"{DOWN}.weight_packed"].clone(),
                    "model.q.weight_scale": t[f"{DOWN}.weight_scale"].clone(),
                }
            ),
            r"holds MXFP4 weights for model\.q, which is no linear layer of LlamaForCausalLM",
        ),
        (
            lambda t: t.update(
                {f"{DOWN}.weight_{kind}": t[f"{DOWN}.weight_{kind}"][:32].clone() for kind in ("packed", "scale")}
            ),
            rf"{DOWN} has weights of shape \[32, 128\] in .* expected \[64, 128\]",
        ),
    ],
    ids=["lost", "no scales", "no layer", "unknown", "wrong shape", "wrong scales", "not linear", "other rows"],
)
def test_a_folder_that_does_not_fit_the_model_is_refused(
    own_copy: Path, change: Callable[[dict[str, Tensor]], object], says: str
):
    tensors = load_file(own_copy / "model.safetensors")
    change(tensors)
    save_file(tensors, own_copy / "model.safetensors")
    for load in (load_packed, load_decoded):
        with pytest.raises(LayoutError, match=says):
            load(own_copy, torch.float32)


def test_the_type_of_config_json_counts_where_none_is_given(own_copy: Path):
    config = json.loads((own_copy / "config.json").read_text())
    (own_copy / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert load_packed(own_copy, "auto").dtype == torch.bfloat16
