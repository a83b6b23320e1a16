"""Adapters: agreement with peft, mixtures of versions, and folders that must be refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.adapters import reference_logprobs, write_adapter
from support.engine_support import FAMILIES, GPT2, build, random_prompts, run, save, sequence
from turnwise.inference.embedded.generic_decoder import GenericDecoder
from turnwise.inference.embedded.lean import LeanModel
from turnwise.inference.embedded.lean_decoder import LeanDecoder
from turnwise.inference.embedded.loading import load_model
from turnwise.inference.embedded.lora import AdapterError
from turnwise.transport import tensor_digest

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
ADAPTERS: dict[str, dict[str, Any]] = {
    "v0": {"seed": 1, "rank": 4, "alpha": 8.0},
    "v1": {"seed": 2, "rank": 16, "alpha": 4.0},
    "v2": {"seed": 3, "rank": 2, "alpha": 3.0, "modules": ["q_proj", "up_proj"]},
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(build(FAMILIES["qwen3"]), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folders(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: (root / name, write_adapter(model_folder, root / name, **options)) for name, options in ADAPTERS.items()}


@pytest.fixture
def decoder(model_folder: Path) -> LeanDecoder:
    return LeanDecoder(LeanModel(load_model(model_folder, torch.float32), 256), cache_bytes=2**24, deterministic=False)


@pytest.mark.parametrize("kind", ["lean", "deterministic", "generic"])
def test_versions_side_by_side_agree_with_peft(kind: str, model_folder: Path, folders: dict[str, tuple[Path, Any]]) -> None:
    model = load_model(model_folder, torch.float32)
    reference = load_model(model_folder, torch.float32)
    engine = (
        GenericDecoder(model, max_length=256)
        if kind == "generic"
        else LeanDecoder(LeanModel(model, 256), cache_bytes=2**24, deterministic=kind == "deterministic")
    )
    for name, (folder, _) in folders.items():
        engine.load_adapter(name, folder)
    names = [None, "v0", "v1", "v2"] * 3
    sequences = [sequence(p, seed=i, adapter=names[i]) for i, p in enumerate(random_prompts(12))]
    run(engine, sequences)
    for item in sequences:
        model = reference if item.adapter is None else folders[item.adapter][1]
        expected = reference_logprobs(model, item.tokens)[len(item.prompt) - 1 :]
        assert item.logprobs == pytest.approx(expected, abs=3e-5)


def test_the_digest_is_that_of_the_file_and_of_the_numbers_in_use(
    decoder: LeanDecoder, folders: dict[str, tuple[Path, Any]]
) -> None:
    for name, (folder, _) in folders.items():
        decoder.load_adapter(name, folder)
        assert decoder.digest(name) == tensor_digest(load_file(folder / "adapter_model.safetensors"))
    stacks = decoder._adapters._stacked(("v1",))  # pyright: ignore[reportPrivateUsage]
    stacks.layers[1]["down"][1][0, 0] += 1
    assert decoder.digest("v1") != tensor_digest(load_file(folders["v1"][0] / "adapter_model.safetensors"))


def test_a_prefix_of_one_version_is_not_reused_by_another(decoder: LeanDecoder, folders: dict[str, tuple[Path, Any]]) -> None:
    for name in ("v0", "v1"):
        decoder.load_adapter(name, folders[name][0])
    prompt = random_prompts(1, longest=60)[0] * 3
    run(decoder, [sequence(prompt, adapter="v0")])
    assert decoder.admit(sequence(prompt, adapter="v1")) == len(prompt)


def test_an_unloaded_name_can_be_loaded_anew(decoder: LeanDecoder, folders: dict[str, tuple[Path, Any]]) -> None:
    prompt = random_prompts(1, longest=60)[0] * 3
    for name in ("v0", "v1"):
        folder, reference = folders[name]
        decoder.load_adapter("v", folder)
        item = sequence(prompt, adapter="v")
        run(decoder, [item])
        assert item.logprobs == pytest.approx(reference_logprobs(reference, item.tokens)[len(prompt) - 1 :], abs=3e-5)
        decoder.unload_adapter("v")
        assert decoder.adapters == []


@pytest.mark.parametrize("generic", [False, True])
def test_a_name_loaded_in_place_leaves_nothing_of_the_old_adapter(
    generic: bool, decoder: LeanDecoder, model_folder: Path, folders: dict[str, tuple[Path, Any]]
) -> None:
    engine = GenericDecoder(load_model(model_folder, torch.float32), max_length=256) if generic else decoder
    prompt = random_prompts(1, longest=60)[0] * 3
    for name in ("v0", "v1"):
        folder, reference = folders[name]
        engine.load_adapter("v", folder)
        item = sequence(prompt, adapter="v")
        run(engine, [item])
        assert item.logprobs == pytest.approx(reference_logprobs(reference, item.tokens)[len(prompt) - 1 :], abs=3e-5)


def _missing_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def _missing_tensors(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def _damaged_tensors(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def _damaged_config(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def _unknown_name(folder: Path) -> None:
    _edit(
        folder, lambda tensors: tensors.update({"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 48)})
    )


def _wrong_shape(folder: Path) -> None:
    _edit(folder, lambda tensors: tensors.update({name: torch.zeros(3, 3) for name in list(tensors)[:1]}))


def _half_a_pair(folder: Path) -> None:
    _edit(folder, lambda tensors: tensors.pop(next(name for name in tensors if "lora_B" in name)))


def _nothing(folder: Path) -> None:
    _edit(folder, lambda tensors: tensors.clear())


def _dora(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))


def _edit(folder: Path, change: Any) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_missing_config, "does not exist"),
        (_missing_tensors, "does not exist"),
        (_damaged_tensors, "cannot be read"),
        (_damaged_config, "cannot be read"),
        (_unknown_name, r"layers.9.mlp.up_proj.lora_A.weight"),
        (_wrong_shape, r"has shape \(3, 3\), expected"),
        (_half_a_pair, "is there without"),
        (_nothing, "holds no tensors"),
        (_dora, "use_dora"),
    ],
)
def test_a_spoilt_folder_is_refused_and_what_was_loaded_stays(
    spoil: Any, words: str, decoder: LeanDecoder, model_folder: Path, folders: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    decoder.load_adapter("v0", folders["v0"][0])
    before = decoder.digest("v0")
    write_adapter(model_folder, tmp_path / "bad", seed=8, rank=4)
    spoil(tmp_path / "bad")
    for name in ("v0", "v9"):
        with pytest.raises(AdapterError, match=words):
            decoder.load_adapter(name, tmp_path / "bad")
    assert decoder.adapters == ["v0"]
    assert decoder.digest("v0") == before


def test_the_generic_path_refuses_tensors_that_fit_no_layer(tmp_path: Path, folders: dict[str, tuple[Path, Any]]) -> None:
    engine = GenericDecoder(build(GPT2), max_length=256)
    with pytest.raises(AdapterError, match="belongs to no linear layer"):
        engine.load_adapter("v0", folders["v0"][0])
    assert engine.adapters == []


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_the_generic_path_serves_adapters_of_another_architecture(tmp_path: Path) -> None:
    folder = save(build(GPT2), tmp_path / "gpt2")
    reference = write_adapter(folder, tmp_path / "adapter", seed=4, modules=["c_attn"])
    engine = GenericDecoder(load_model(folder, torch.float32), max_length=256)
    engine.load_adapter("v0", tmp_path / "adapter")
    tuned, plain = sequence([5, 6, 7], adapter="v0"), sequence([5, 6, 7])
    run(engine, [tuned, plain])
    assert tuned.logprobs == pytest.approx(reference_logprobs(reference, tuned.tokens)[2:], abs=3e-5)
    engine.unload_adapter("v0")
    again = sequence([5, 6, 7])
    run(engine, [again])
    assert (again.sampled, again.logprobs) == (plain.sampled, plain.logprobs)


@pytest.mark.parametrize("kind", ["lean", "generic"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_an_adapter_with_a_value_that_is_not_finite_is_refused(
    kind: str, value: float, model_folder: Path, folders: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    source, _ = folders["v0"]
    tensors = load_file(source / "adapter_model.safetensors")
    name = next(name for name in sorted(tensors) if "lora_B" in name)
    tensors[name][0, 0] = value
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    model = load_model(model_folder, torch.float32)
    decoder = (
        GenericDecoder(model, max_length=256)
        if kind == "generic"
        else LeanDecoder(LeanModel(model, 256), cache_bytes=0, deterministic=False)
    )
    with pytest.raises(
        AdapterError, match=rf"1 of \d+ tensors hold NaN or infinity, the first is {name}: the policy has diverged"
    ):
        decoder.load_adapter("v0", tmp_path)
    assert list(decoder.adapters) == []
