"""Models written anew in MXFP4: bytes, names, what stays as it was, other layouts, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from support.tiny_model import build_tiny_model
from turnwise.config.trainer import LINEAR_LAYERS
from turnwise.kernels.mxfp4 import reference
from turnwise.kernels.quantized.export import export, export_shape
from turnwise.kernels.quantized.layout import LayoutError, is_packed
from turnwise.kernels.quantized.report import read_lines

UP = "model.layers.1.mlp.up_proj"


def quiet(_: str) -> None:
    """For progress that nobody watches."""


def written(source: Path, folder: Path, modules: list[str] = LINEAR_LAYERS, **options: str) -> dict[str, Tensor]:
    """The tensors that `export` writes for a model."""
    folder.mkdir()
    export(source, folder, scale_mode=options.get("scale_mode", "even"), target_modules=modules, progress=quiet)  # pyright: ignore[reportArgumentType]
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def originals(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("mode", ["even", "floor", "rceil", "ceil"])
def test_each_linear_layer_becomes_the_codes_and_scales_of_the_specification(tiny_model: Path, tmp_path: Path, mode: str):
    found, before = written(tiny_model, tmp_path / "q", scale_mode=mode), originals(tiny_model)
    linears = [name.removesuffix(".weight") for name in before if name.split(".")[-2] in LINEAR_LAYERS]
    assert len(linears) == 14
    for name in linears:
        packed, scales = reference.quantize(before[f"{name}.weight"], scale_mode=mode)  # pyright: ignore[reportArgumentType]
        assert torch.equal(found.pop(f"{name}.weight_packed"), packed)
        assert torch.equal(found.pop(f"{name}.weight_scale"), scales)
    others = {name: tensor for name, tensor in before.items() if name.removesuffix(".weight") not in linears}
    assert found.keys() == others.keys()
    assert all(torch.equal(found[name], others[name]) for name in others)


def test_config_json_says_how_and_everything_else_is_there(tiny_model: Path, tmp_path: Path):
    written(tiny_model, tmp_path / "q")
    names = {path.name for path in (tmp_path / "q").iterdir()}
    assert names == {path.name for path in tiny_model.iterdir()} | {"mxfp4.json"}
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    table = config.pop("quantization_config")
    assert config == json.loads((tiny_model / "config.json").read_text())
    assert (table["quant_method"], table["format"], table["ignore"]) == (
        "compressed-tensors",
        "mxfp4-pack-quantized",
        ["lm_head"],
    )
    assert table["config_groups"]["group_0"]["weights"]["group_size"] == 32
    assert is_packed(tmp_path / "q")
    assert not is_packed(tiny_model)


def test_layers_that_are_not_named_keep_their_type_and_are_listed_for_vllm(tiny_model: Path, tmp_path: Path):
    found = written(tiny_model, tmp_path / "q", ["gate_proj", "up_proj"])
    assert {name.rpartition(".")[0].split(".")[-1] for name in found if name.endswith("weight_packed")} == {
        "gate_proj",
        "up_proj",
    }
    ignored = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["ignore"]
    kept = [name for name in found if name.endswith("_proj.weight")]
    assert sorted(ignored) == sorted(["lm_head", *(name.removesuffix(".weight") for name in kept)])
    assert len(kept) == 10


def test_a_layer_whose_inputs_do_not_divide_into_blocks_keeps_its_type(tmp_path: Path):
    """Hidden size 48: only the layers that read the feed-forward block, of 96, can be quantised."""
    source = build_tiny_model(tmp_path / "odd", hidden=48)
    found = written(source, tmp_path / "q")
    assert {name.split(".")[-2] for name in found if name.endswith("weight_packed")} == {"down_proj"}


def test_the_report_counts_what_was_quantised_and_names_the_worst_layer(tmp_path: Path):
    source = build_tiny_model(tmp_path / "model")
    tensors = originals(source)
    tensors[f"{UP}.weight"][:, ::32] *= 50  # one outlier a block: the others lose their bits
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    written(source, tmp_path / "q")
    lines = read_lines(tmp_path / "q" / "mxfp4.json")
    assert "14 linear layers" in lines[0]
    assert "73,728 weights" in lines[0]
    assert lines[1].startswith(f"worst layer: {UP}, Frobenius ")
    layers = json.loads((tmp_path / "q" / "mxfp4.json").read_text())["layers"]
    assert max(layers, key=lambda name: layers[name]["mean_relative"]) == UP
    assert layers["model.layers.0.mlp.up_proj"]["frobenius"] == pytest.approx(
        0.113, abs=0.005
    )  # Gaussian weights, scales by even
    assert layers["model.layers.0.mlp.up_proj"]["sqnr_db"] == pytest.approx(18.9, abs=0.4)


def test_a_model_in_several_files_stays_in_several_files(tiny_model: Path, tmp_path: Path):
    source = tmp_path / "sharded"
    source.mkdir()
    tensors = originals(tiny_model)
    parts = [dict(list(tensors.items())[:7]), dict(list(tensors.items())[7:])]
    index: dict[str, str] = {}
    for number, part in enumerate(parts):
        save_file(part, source / f"part-{number}.safetensors")
        index |= dict.fromkeys(part, f"part-{number}.safetensors")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (source / "config.json").write_text((tiny_model / "config.json").read_text())
    found, whole = written(source, tmp_path / "q"), written(tiny_model, tmp_path / "whole")
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    places = json.loads((tmp_path / "q" / "model.safetensors.index.json").read_text())["weight_map"]
    assert places.keys() == found.keys()
    assert places[f"{UP}.weight_packed"] == index[f"{UP}.weight"]


@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_the_bytes_of_a_model_in_the_layout_of_gpt_oss_are_kept(tiny_model: Path, tmp_path: Path, suffix: str):
    """Also where codes and scales are in different files."""
    source = tmp_path / "blocks"
    source.mkdir()
    codes: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in written(tiny_model, tmp_path / "packed", scale_mode="ceil").items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight_packed":
            codes[f"{layer}{suffix}_blocks"] = tensor.unflatten(1, (-1, 16))
        else:
            others[f"{layer}{suffix}_scales" if kind == "weight_scale" else name] = tensor
    save_file(codes, source / "codes.safetensors")
    save_file(others, source / "others.safetensors")
    (source / "config.json").write_text((tiny_model / "config.json").read_text())
    found, expected = written(source, tmp_path / "q"), written(tiny_model, tmp_path / "again", scale_mode="ceil")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "MXFP4 as the model came: 14 linear layers" in read_lines(tmp_path / "q" / "mxfp4.json")[0]


def damaged(folder: Path, source: Path, change: dict[str, Tensor]) -> Path:
    folder.mkdir()
    save_file(originals(source) | change, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def test_what_cannot_be_quantised_is_refused_with_the_name_of_the_tensor(tiny_model: Path, tmp_path: Path):
    infinite = originals(tiny_model)[f"{UP}.weight"].clone()
    infinite[3, 5] = torch.inf
    with pytest.raises(LayoutError, match=rf"{UP}\.weight: .* is not finite in 1 blocks of 32, the first in row 3"):
        written(damaged(tmp_path / "inf", tiny_model, {f"{UP}.weight": infinite}), tmp_path / "a")
    with pytest.raises(LayoutError, match=rf"{UP}_blocks is there without {UP}_scales"):
        written(damaged(tmp_path / "half", tiny_model, {f"{UP}_blocks": torch.zeros(1)}), tmp_path / "b")
    experts = {"e_blocks": torch.zeros(2, 4, 1, 16, dtype=torch.uint8), "e_scales": torch.zeros(2, 4, 1, dtype=torch.uint8)}
    with pytest.raises(LayoutError, match="the experts of a mixture are no linear layers"):
        written(damaged(tmp_path / "experts", tiny_model, experts), tmp_path / "c")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(LayoutError, match="damaged"):
        written(tmp_path / "cut", tmp_path / "d")
    with pytest.raises(LayoutError, match=r"target_modules names W_pack, of which .* it has down_proj, gate_proj"):
        written(tiny_model, tmp_path / "e", ["q_proj", "W_pack"])
    with pytest.raises(LayoutError, match=r"has no \*\.safetensors"):
        written(tmp_path, tmp_path / "f")
    odd = build_tiny_model(tmp_path / "odd", hidden=48)
    with pytest.raises(LayoutError, match=r"target_modules names q_proj, of which .* a multiple of 32"):
        written(odd, tmp_path / "g", ["q_proj"])


def test_for_random_weights_the_configuration_is_enough(tiny_model: Path, tmp_path: Path):
    (tmp_path / "q").mkdir()
    export_shape(tiny_model, tmp_path / "q")
    assert is_packed(tmp_path / "q")
    assert not list((tmp_path / "q").glob("*.safetensors"))
    assert (tmp_path / "q" / "tokenizer.json").is_file()


def test_other_formats_of_compressed_tensors_are_refused(tiny_model: Path, tmp_path: Path):
    (tmp_path / "q").mkdir()
    export_shape(tiny_model, tmp_path / "q")
    text = (tmp_path / "q" / "config.json").read_text()
    (tmp_path / "q" / "config.json").write_text(text.replace("mxfp4-pack-quantized", "nvfp4-pack-quantized"))
    with pytest.raises(LayoutError, match=r"\['nvfp4-pack-quantized'\]; only mxfp4-pack-quantized is known"):
        is_packed(tmp_path / "q")
