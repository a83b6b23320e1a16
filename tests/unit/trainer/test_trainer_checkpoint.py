"""Checkpoints of a real learner: round trip, damage, a full disk, and the forms others read."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.batches import ConfigOf, make_batch
from turnwise.config import RLConfig
from turnwise.trainer import checkpoint
from turnwise.trainer.checkpoint import load_checkpoint, save_checkpoint
from turnwise.trainer.checkpoint_index import CheckpointError, check_checkpoint, latest_valid_checkpoint
from turnwise.trainer.publish import PublishError, full_tensors, publish
from turnwise.trainer.step import Learner
from turnwise.transport import Progress, RunDir, Served, WeightsStore, tensor_digest

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"model": {"lora": {"rank": 4}}},
    "lora with dropout": {"model": {"lora": {"rank": 4, "dropout": 0.3}}},
    "full": {"model": {"lora": None}},
}
PROGRESS = Progress(next_group=7, pending=[5], state={"seen": 3})
# peft asks transformers by a name that is about to go
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def trained(config: RLConfig, device: torch.device, *steps: int) -> Learner:
    torch.manual_seed(0)
    learner = Learner(config, device)
    for step in steps:
        learner.step(make_batch(step))
    return learner


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_four_steps_equal_two_and_a_checkpoint_and_two_to_the_bit(
    config_of: ConfigOf, device: torch.device, variant: dict[str, Any]
) -> None:
    config = config_of(variant)
    run_dir = RunDir(config.output_dir)
    straight = trained(config, device, 1, 2)
    save_checkpoint(straight, run_dir, 2, PROGRESS)
    expected = [straight.step(make_batch(step)) for step in (3, 4)]
    resumed = trained(config, device)
    torch.rand(5)
    assert load_checkpoint(resumed, run_dir, 2) == PROGRESS
    found = [resumed.step(make_batch(step)) for step in (3, 4)]
    assert found == expected
    for name, parameter in straight.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name])


def test_a_checkpoint_before_the_first_step_is_complete(config_of: ConfigOf, device: torch.device) -> None:
    config = config_of()
    first = trained(config, device)
    save_checkpoint(first, RunDir(config.output_dir), 0, Progress())
    again = trained(config, device)
    load_checkpoint(again, RunDir(config.output_dir), 0)
    assert first.step(make_batch(1)) == again.step(make_batch(1))


def test_the_adapter_in_a_checkpoint_gives_peft_the_same_logits(
    config_of: ConfigOf, device: torch.device, tiny_model: Path
) -> None:
    config = config_of()
    learner = trained(config, device, 1, 2, 3)
    folder = save_checkpoint(learner, RunDir(config.output_dir), 3, PROGRESS)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids = torch.arange(30)[None]
    from turnwise.trainer.attention import Layout

    with torch.no_grad():
        plain = base(ids).logits
        logits = PeftModel.from_pretrained(base, folder / "adapter")(ids).logits
        mine = learner.policy.model(ids, layout=Layout((30,), (-1,)), use_cache=False).logits
    torch.testing.assert_close(logits, mine, rtol=1e-5, atol=1e-5)
    assert (logits - plain).abs().max() > 1e-3
    described = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(tiny_model)


def test_the_model_in_a_checkpoint_of_full_fine_tuning_loads_by_itself(config_of: ConfigOf, device: torch.device) -> None:
    config = config_of({"model": {"lora": None}})
    learner = trained(config, device, 1)
    folder = save_checkpoint(learner, RunDir(config.output_dir), 1, PROGRESS)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model")
    for name, parameter in learner.parameters.items():
        assert torch.equal(loaded.get_parameter(name), parameter)
    assert (folder / "model" / "tokenizer.json").exists()


def test_a_corrupt_shard_is_named_and_refused(config_of: ConfigOf, device: torch.device) -> None:
    config = config_of()
    learner = trained(config, device)
    folder = save_checkpoint(learner, RunDir(config.output_dir), 1, PROGRESS)
    shard = folder / "trainer" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp is corrupt.*remove .*step_1"):
        load_checkpoint(learner, RunDir(config.output_dir), 1)


def test_a_missing_checkpoint_is_named(config_of: ConfigOf, device: torch.device) -> None:
    config = config_of()
    with pytest.raises(CheckpointError, match=r"step_9/meta\.json is missing"):
        load_checkpoint(trained(config, device), RunDir(config.output_dir), 9)


def test_a_checkpoint_of_another_rank_is_refused_with_a_reason(config_of: ConfigOf, device: torch.device) -> None:
    config = config_of({"model": {"lora": {"rank": 4}}})
    save_checkpoint(trained(config, device), RunDir(config.output_dir), 1, PROGRESS)
    other = trained(config_of({"model": {"lora": {"rank": 8}}}), device)
    with pytest.raises(CheckpointError, match=r"does not fit this configuration \(Size mismatch"):
        load_checkpoint(other, RunDir(config.output_dir), 1)


@pytest.mark.parametrize("victim", ["shards", "rest"])
def test_a_full_disk_leaves_the_older_checkpoint_and_a_clear_error(
    config_of: ConfigOf, device: torch.device, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    config = config_of()
    run_dir = RunDir(config.output_dir)
    learner = trained(config, device)
    save_checkpoint(learner, run_dir, 1, PROGRESS)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if victim == "shards":
        monkeypatch.setattr("torch.distributed.checkpoint.filesystem._write_item", full)
    else:
        monkeypatch.setattr(checkpoint, "write_policy", full)
    with pytest.raises(CheckpointError, match=r"step_2 could not be written: .*No space left on device.*rl --resume"):
        save_checkpoint(learner, run_dir, 2, PROGRESS)
    assert [path.name for path in run_dir.checkpoints.iterdir()] == ["step_1"]
    assert latest_valid_checkpoint(run_dir.root) == 1
    monkeypatch.undo()
    save_checkpoint(learner, run_dir, 2, PROGRESS)
    assert check_checkpoint(run_dir.checkpoint(2), contents=True).step == 2


@pytest.mark.parametrize("variant", [VARIANTS["lora"], VARIANTS["full"]], ids=["lora", "full"])
def test_the_digest_of_a_published_version_is_that_of_its_file(
    config_of: ConfigOf, device: torch.device, variant: dict[str, Any]
) -> None:
    config = config_of(variant)
    store = WeightsStore(RunDir(config.output_dir).weights)
    publish(trained(config, device, 1), store, 1, {"actor/loss": 0.5}, keep=2)
    ready = store.poll(1)
    assert ready is not None
    assert ready.kind == ("lora" if variant["model"]["lora"] else "full")
    assert ready.metrics == {"actor/loss": 0.5}
    tensors = load_file(next(Path(ready.path).glob("*.safetensors")))
    assert tensor_digest(tensors) == ready.digest
    if ready.kind == "lora":
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_an_adapter_for_vllm_has_its_scale_in_b(config_of: ConfigOf, device: torch.device) -> None:
    """vLLM multiplies it in on the CPU otherwise, tensor by tensor. The checkpoint keeps the adapter as PEFT would write it."""
    config = config_of({"model": {"lora": {"rank": 4, "alpha": 12}}}, inference={"engine": "vllm"})
    learner = trained(config, device, 1)
    store = WeightsStore(RunDir(config.output_dir).weights)
    publish(learner, store, 1, {}, keep=2)
    ready = store.poll(1)
    assert ready is not None
    folder = Path(ready.path)
    served, held = load_file(next(folder.glob("*.safetensors"))), full_tensors(learner)
    assert json.loads((folder / "adapter_config.json").read_text())["lora_alpha"] == 4
    assert tensor_digest(served) == ready.digest
    for name, tensor in held.items():
        scale = 3 if "lora_B" in name else 1
        torch.testing.assert_close(served[name], tensor.to(learner.dtype) * scale, rtol=0, atol=0)
    save_checkpoint(learner, RunDir(config.output_dir), 1, PROGRESS)
    (description,) = RunDir(config.output_dir).checkpoint(1).rglob("adapter_config.json")
    assert json.loads(description.read_text())["lora_alpha"] == 12


def test_every_version_of_whole_weights_has_the_tokenizer(config_of: ConfigOf, device: torch.device) -> None:
    config = config_of(VARIANTS["full"])
    store = WeightsStore(RunDir(config.output_dir).weights)
    learner = trained(config, device)
    for version in (0, 1):
        publish(learner, store, version, {}, keep=9)
        served, own = (AutoTokenizer.from_pretrained(folder) for folder in (store.path(version), config.model.name))
        assert (served.get_vocab(), served.chat_template) == (own.get_vocab(), own.chat_template)


def test_versions_that_no_engine_needs_are_pruned(config_of: ConfigOf, device: torch.device) -> None:
    config = config_of()
    store = WeightsStore(RunDir(config.output_dir).weights)
    learner = trained(config, device)
    for version in range(5):
        publish(learner, store, version, {}, keep=2)
        store.acknowledge(Served(version))
    publish(learner, store, 5, {}, keep=2)
    assert store.versions() == [3, 4, 5]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("IoError: No space left on device")]
)
def test_a_full_disk_while_publishing_shows_no_version(
    config_of: ConfigOf, device: torch.device, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    config = config_of()
    store = WeightsStore(RunDir(config.output_dir).weights)
    learner = trained(config, device)

    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("turnwise.trainer.publish.save_adapter", full)
    with pytest.raises(PublishError, match=r"version 1 could not be published: .*No space left on device.*rl --resume"):
        publish(learner, store, 1, {}, keep=2)
    assert store.versions() == []
    assert list(store.root.iterdir()) == []


def test_a_model_that_is_saved_under_other_names_is_refused(
    config_of: ConfigOf, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers does with some mixtures of experts, whose weights it fuses in memory."""
    learner = trained(config_of({"model": {"lora": None}}), device)
    model = learner.policy.model
    save = model.save_pretrained

    def renaming(folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        renamed = {name.replace("model.norm", "model.norms.0"): tensor for name, tensor in state_dict.items()}
        save(folder, state_dict=renamed)

    monkeypatch.setattr(model, "save_pretrained", renaming)
    with pytest.raises(PublishError, match=r"other tensor names than it has in memory \(model\.norm"):
        checkpoint.write_policy(tmp_path, learner, full_tensors(learner))
