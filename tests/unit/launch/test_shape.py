"""The sizes of a model, against the parameter counts of real ones."""

import json
from pathlib import Path

import pytest

from support.shapes import QWEN3_4B, QWEN3_8B, SMOLLM2_135M
from turnwise.config import RLConfig
from turnwise.launch.shape import ModelShape, find_shape, known_shape, read_shape


def shape_of(folder: Path, raw: dict[str, object]) -> ModelShape:
    (folder / "config.json").write_text(json.dumps(raw))
    return read_shape(folder)


@pytest.mark.parametrize(
    ("raw", "parameters"),
    [(SMOLLM2_135M, 134_515_008), (QWEN3_4B, 4_022_468_096), (QWEN3_8B, 8_190_735_360)],
    ids=["SmolLM2-135M", "Qwen3-4B", "Qwen3-8B"],
)
def test_parameters_are_counted_to_the_last_as_the_models_have_them(tmp_path: Path, raw: dict[str, object], parameters: int):
    assert shape_of(tmp_path, raw).parameters == parameters


def test_adapter_parameters_are_those_of_peft(tmp_path: Path):
    lora = RLConfig().trainer.model.lora
    assert lora is not None
    assert shape_of(tmp_path, SMOLLM2_135M).adapter_parameters(16, lora.target_modules) == 4_884_480


def test_the_count_matches_a_real_model(tiny_model: Path):
    from safetensors import safe_open

    with safe_open(tiny_model / "model.safetensors", "numpy") as file:
        names = file.keys()
        real = sum(file.get_tensor(name).size for name in names)
    assert read_shape(tiny_model).parameters == real


def test_keys_and_values_of_a_token_in_qwen3_4b_take_144_kib(tmp_path: Path):
    # 2 x 36 layers x 8 heads x 128 x 2 bytes
    assert shape_of(tmp_path, QWEN3_4B).cache_bytes_per_token("bfloat16") == 147_456


def test_a_config_json_without_a_size_is_named(tmp_path: Path):
    raw = {key: value for key, value in SMOLLM2_135M.items() if key != "vocab_size"}
    with pytest.raises(ValueError, match=r"has no vocab_size"):
        shape_of(tmp_path, raw)


def test_a_prepared_model_that_is_not_there_yet_says_how_to_get_it(tmp_path: Path):
    with pytest.raises(ValueError, match=r"turnwise model smollm2-135m"):
        find_shape(str(tmp_path / "smollm2-135m"))
    assert "turnwise model smollm2-135m" in str(known_shape(str(tmp_path / "smollm2-135m")))


def test_a_hub_model_that_is_not_at_hand_is_said_to_be_so():
    with pytest.raises(ValueError, match=r"config.json of nobody/nothing is not at hand"):
        find_shape("nobody/nothing")
