"""The folder of packed weights: when there is one, made once, known again, made anew when something changed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from support.quantized import quantize_folder
from turnwise.config import ConfigError, RLConfig
from turnwise.launch import cache
from turnwise.launch.quantized import planned_folder, quantized_model

QUANT = {"model": {"quant": {}}}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURNWISE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A model that may be changed."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    for path in tiny_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def config(trainer: dict[str, Any], **tables: Any) -> RLConfig:
    return RLConfig.model_validate({"max_steps": 1, "trainer": trainer, **tables})


def test_without_the_table_and_when_all_parameters_train_there_is_none(model: Path):
    for trainer in ({}, {"model": {"quant": {}, "lora": None}}):
        assert quantized_model(config(trainer), str(model)) is None
        assert planned_folder(config(trainer), str(model)) is None
    assert not cache.cache_root().exists()


def test_an_evaluation_of_the_untrained_policy_takes_quantised_weights_also_where_all_would_train(model: Path):
    whole = config({"model": {"quant": {}, "lora": None}})
    assert quantized_model(whole, str(model), lambda _: None, trains=False) == planned_folder(config(QUANT), str(model))


def test_it_is_made_once_and_known_again(model: Path):
    said: list[str] = []
    planned = planned_folder(config(QUANT), str(model))
    assert planned is not None
    assert not planned.exists()
    assert quantized_model(config(QUANT), str(model), said.append) == planned
    assert said[0].startswith("quantising tiny to MXFP4")
    assert any("14 linear layers" in line for line in said)
    made = (planned / "model.safetensors").stat().st_mtime_ns
    said.clear()
    assert quantized_model(config(QUANT), str(model), said.append) == planned
    assert not any("quantising" in line for line in said)
    assert any("worst layer" in line for line in said)
    assert (planned / "model.safetensors").stat().st_mtime_ns == made


def test_other_settings_and_other_weights_make_another_one(model: Path):
    first = planned_folder(config(QUANT), str(model))
    others = [{"scale_mode": "floor"}, {"target_modules": ["up_proj"]}]
    folders = {planned_folder(config({"model": {"quant": quant}}), str(model)) for quant in others}
    stat = (model / "model.safetensors").stat()
    os.utime(model / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    folders.add(planned_folder(config(QUANT), str(model)))
    assert len(folders | {first}) == 4


def test_a_damaged_one_is_made_again(model: Path):
    folder = quantized_model(config(QUANT), str(model), lambda _: None)
    assert folder is not None
    (folder / "model.safetensors").write_bytes(b"cut")
    said: list[str] = []
    assert quantized_model(config(QUANT), str(model), said.append) == folder
    assert said[0].startswith("quantising")
    assert (folder / "model.safetensors").stat().st_size > 10_000


def test_a_model_that_comes_packed_is_used_as_it_is(model: Path, tmp_path: Path):
    packed = quantize_folder(model, tmp_path / "packed")
    said: list[str] = []
    assert quantized_model(config({}), str(packed), said.append) == packed
    assert quantized_model(config(QUANT), str(packed), said.append) == packed
    assert planned_folder(config({}), str(packed)) == packed
    assert said == [f"{packed} is in MXFP4: its bytes are used as they are, whatever [trainer.model.quant] says"]
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ConfigError, match=r"holds MXFP4 weights, and trainer\.model\.lora is unset: there are no masters"):
        quantized_model(config({"model": {"lora": None}}), str(packed))


def test_what_the_export_refuses_is_told_and_leaves_nothing(model: Path):
    wrong = config({"model": {"quant": {"target_modules": ["W_pack"]}}})
    with pytest.raises(ConfigError, match=r"could not be quantised \(exit code 1\):\n(.*\n)*.*target_modules names W_pack"):
        quantized_model(wrong, str(model), lambda _: None)
    assert list((cache.cache_root() / "models").glob("[!.]*")) == []
    (model / "model.safetensors").unlink()
    for look in (quantized_model, planned_folder):
        with pytest.raises(ConfigError, match=r"has no \*\.safetensors"):
            look(config(QUANT), str(model))


def test_other_quantisations_by_compressed_tensors_are_refused(model: Path):
    table = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    settings = json.loads((model / "config.json").read_text()) | {"quantization_config": table}
    (model / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"\['pack-quantized'\]; only mxfp4-pack-quantized is known"):
        quantized_model(config({}), str(model))


def test_for_random_weights_there_is_a_folder_without_any(model: Path):
    (model / "model.safetensors").unlink()
    random = config(QUANT, model={"load_format": "dummy"}, inference={"engine": "vllm"}, gpus={"inference": [0]})
    folder = quantized_model(random, str(model), lambda _: None)
    assert folder is not None
    assert "mxfp4-pack-quantized" in (folder / "config.json").read_text()
    assert not list(folder.glob("*.safetensors"))
