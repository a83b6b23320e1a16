"""The memory estimate, against the parameter counts of real models and the process sizes that were measured."""

import json
from pathlib import Path

import pytest

from turnwise.config import RLConfig
from turnwise.launch.memory import ModelShape, estimate, find_shape, read_shape

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
QWEN3_4B = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def shape_of(folder: Path, raw: dict[str, object]) -> ModelShape:
    (folder / "config.json").write_text(json.dumps(raw))
    return read_shape(folder)


def total(config: RLConfig, shape: ModelShape, process: str) -> int:
    return sum(part.total for part in estimate(config, shape) if part.process.startswith(process))


@pytest.mark.parametrize(("raw", "parameters"), [(SMOLLM2, 134_515_008), (QWEN3_4B, 4_022_458_880)])
def test_parameters_are_counted_as_the_models_have_them(tmp_path: Path, raw: dict[str, object], parameters: int):
    assert shape_of(tmp_path, raw).parameters == pytest.approx(parameters, rel=1e-4)


def test_adapter_parameters_are_those_of_peft(tmp_path: Path):
    lora = RLConfig().trainer.model.lora
    assert lora is not None
    assert shape_of(tmp_path, SMOLLM2).adapter_parameters(16, lora.target_modules) == 4_884_480


def test_the_count_matches_a_real_model(tiny_model: Path):
    from safetensors import safe_open

    with safe_open(tiny_model / "model.safetensors", "numpy") as file:
        names = file.keys()
        real = sum(file.get_tensor(name).size for name in names)
    assert read_shape(tiny_model).parameters == real


def test_full_fine_tuning_needs_far_more_than_an_adapter(tmp_path: Path):
    shape = shape_of(tmp_path, QWEN3_4B)
    lora = total(RLConfig(), shape, "trainer")
    full = total(RLConfig.model_validate({"trainer": {"model": {"lora": None}}}), shape, "trainer")
    assert full - lora > 4_000_000_000 * 12


def test_gradient_checkpointing_saves_most_of_the_activations(tmp_path: Path):
    shape = shape_of(tmp_path, QWEN3_4B)
    plain, saved = (
        next(
            size
            for part in estimate(RLConfig.model_validate({"trainer": {"model": {"gradient_checkpointing": on}}}), shape)
            if part.process == "trainer"
            for name, size in part.parts.items()
            if name.startswith("activations")
        )
        for on in (False, True)
    )
    assert saved < plain / 5


def test_sharding_divides_the_weights(tmp_path: Path):
    shape = shape_of(tmp_path, QWEN3_4B)
    parts = [
        part.parts["weights"]
        for part in estimate(RLConfig.model_validate({"gpus": {"inference": [0], "trainer": [2, 3, 4, 5, 6]}}), shape)
    ]
    assert parts[0] == shape.parameters * 2
    assert parts[1:6] == [shape.parameters * 2 // 5] * 5


def test_each_gpu_is_listed_once(tmp_path: Path):
    config = RLConfig.model_validate({"gpus": {"inference": [0, 1], "trainer": [2, 3]}, "inference": {"engine": "vllm", "tp": 2}})
    places = [(part.place, part.process) for part in estimate(config, shape_of(tmp_path, QWEN3_4B))]
    assert places == [
        ("GPU 0", "inference 0"),
        ("GPU 1", "inference 0"),
        ("GPU 2", "trainer rank 0"),
        ("GPU 3", "trainer rank 1"),
    ]


def test_a_config_json_without_a_size_is_named(tmp_path: Path):
    raw = {key: value for key, value in SMOLLM2.items() if key != "vocab_size"}
    with pytest.raises(ValueError, match=r"has no vocab_size"):
        shape_of(tmp_path, raw)


def test_a_prepared_model_that_is_not_there_yet_says_how_to_get_it(tmp_path: Path):
    with pytest.raises(ValueError, match=r"turnwise model smollm2-135m"):
        find_shape(str(tmp_path / "smollm2-135m"))


def test_a_hub_model_that_is_not_at_hand_is_said_to_be_so():
    with pytest.raises(ValueError, match=r"config.json of nobody/nothing is not at hand"):
        find_shape("nobody/nothing")
