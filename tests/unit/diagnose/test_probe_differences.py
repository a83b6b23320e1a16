"""Finite differences on small copies: of the losses, and of architectures."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from support.probed import probed_config, scored_batch
from turnwise.diagnose.probe_report import Differences
from turnwise.diagnose.probing import differences, small_copy
from turnwise.diagnose.probing.differences import finite_differences, relative_error
from turnwise.diagnose.probing.small_copy import VOCABULARY, small_shape
from turnwise.trainer import fsdp
from turnwise.transport import Batch

CISPO = {"kind": "cispo", "clip_high": 1.0}


@pytest.fixture(scope="module")
def batch(tiny_model: Path) -> Batch:
    return scored_batch(tiny_model, groups=1, group_size=2)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(differences, "STEPS", (1e-5,))
    monkeypatch.setattr(differences, "RANDOM", 0)


def measured(folder: Path, tiny_model: Path, batch: Batch, **trainer: Any) -> Differences:
    torch.set_num_threads(1)
    with fsdp.process_group(cuda=False, timeout_s=60.0):
        return finite_differences(probed_config(folder, tiny_model, trainer=trainer), batch, folder / "copy")


def worst(found: Differences) -> float:
    assert found.trouble == ""
    return max(one.error for one in found.directions)


LOSSES: dict[str, dict[str, Any]] = {
    "cispo": CISPO,
    "everything": {"kl_beta": 0.2, "importance_sampling": "truncate", "entropy_coef": 0.05, "dual_clip": 3.0},
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses_agree_with_their_gradients(loss: dict[str, Any], tmp_path: Path, tiny_model: Path, batch: Batch) -> None:
    found = measured(tmp_path, tiny_model, batch, loss=loss)
    assert worst(found) < 1e-6
    assert [one.direction for one in found.directions] == ["LoRA A, along the gradient", "LoRA B, along the gradient"]
    assert all(one.autograd > 1e-3 for one in found.directions)


def test_weights_that_a_loss_detaches_must_be_held_for_that(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path, batch: Batch
) -> None:
    start = differences._Objective.__init__  # pyright: ignore[reportPrivateUsage]

    def forgetful(self: Any, passes: Any) -> None:
        start(self, passes)
        self.detached = False

    monkeypatch.setattr(differences._Objective, "__init__", forgetful)  # pyright: ignore[reportPrivateUsage]
    assert worst(measured(tmp_path, tiny_model, batch, loss=CISPO)) > 0.01


def test_float32_inside_the_model_would_show(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path, batch: Batch
) -> None:
    monkeypatch.setattr(small_copy._KeepDouble, "CONVERSIONS", ())  # pyright: ignore[reportPrivateUsage]
    assert worst(measured(tmp_path, tiny_model, batch)) > 1e-6


def test_a_model_that_cannot_be_copied_is_told_and_ends_nothing(tmp_path: Path, batch: Batch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such thing"}))
    found = measured(tmp_path, tmp_path, batch)
    assert found.directions == []
    assert "no such thing" in found.trouble


def test_relative_errors_are_of_the_larger_number() -> None:
    assert relative_error(2.0, 1.0, smallest=0.0) == 0.5
    assert relative_error(1e-9, 0.0, smallest=1e-3) == pytest.approx(1e-6)
    assert relative_error(0.0, 0.0, smallest=0.0) == 0.0


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "rope_theta": 1e4}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    "qwen3_moe": {"num_hidden_layers": 48, "num_experts": 128, "num_experts_per_tok": 8},
    "gemma3_text": {"num_hidden_layers": 26},  # a kind of attention for each layer
    "phi3": {"rope_parameters": LONG, "original_max_position_embeddings": 4096, "max_position_embeddings": 131072},
}


@pytest.mark.parametrize("kind", SHAPES)
def test_a_copy_has_the_architecture_and_a_small_size(kind: str) -> None:
    config = small_shape(AutoConfig.for_model(kind, **SHAPES[kind]))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    assert model.config.num_hidden_layers == 2
    assert model.config.vocab_size == VOCABULARY
    assert model.config.model_type == kind
