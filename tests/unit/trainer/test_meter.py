"""What a step is said to cost: operations of what was really computed, tokens, and clocks that add up."""

import time

import pytest
import torch
from torch import nn

from support.batches import ConfigOf, make_batch
from turnwise.kernels.mxfp4.layer import MXFP4Linear
from turnwise.trainer import meter as meter_module
from turnwise.trainer.flops import step_flops
from turnwise.trainer.lora_layer import LoraLinear
from turnwise.trainer.meter import Meter
from turnwise.trainer.model import Loaded
from turnwise.trainer.packing import pack
from turnwise.trainer.step import Learner
from turnwise.transport import Batch, Progress


def test_operations_are_those_of_the_formula_less_logits_that_nobody_asked_for(config_of: ConfigOf, device: torch.device) -> None:
    learner = Learner(config_of({"model": {"lora": {"rank": 4}}}), device)
    meter = learner.meter
    trained = sum(p.numel() for p in learner.parameters.values())
    model = learner.policy.model
    frozen = sum(p.numel() for p in model.parameters()) - trained  # the output layer is the embedding: it counts once
    assert (meter.trainable, meter.frozen) == (trained, frozen)
    (whole,) = pack(make_batch(1).samples, max_tokens=10_000)[0]
    assert any(parent >= 0 for parent in whole.layout.parents)
    parents = [0 if parent < 0 else whole.layout.lengths[parent] for parent in whole.layout.parents]
    everywhere = step_flops(meter.size, trained, frozen, whole.layout.lengths, parents)
    assert meter.cost(whole.layout) == everywhere
    meter.begin()
    meter.count([whole, whole])
    idle = 4 * 320 * 64 * (len(whole.input_ids) - len(whole.targets))
    assert meter.flops == 2 * (everywhere - idle)
    assert meter.tokens == 2 * len(whole.input_ids)


def test_packed_weights_count_as_the_weights_that_they_stand_for(
    config_of: ConfigOf, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = Learner(config_of(), device)
    frozen = learner.meter.frozen
    for module in learner.policy.modules():
        if isinstance(module, LoraLinear):
            assert isinstance(module.base, nn.Linear)
            monkeypatch.setattr(module, "base", MXFP4Linear.from_linear(module.base))
    assert sum(p.numel() for p in learner.policy.parameters() if not p.requires_grad) < frozen
    assert Meter(Loaded(learner.policy, torch.bfloat16), device).frozen == frozen


def test_a_trained_output_layer_counts_six(config_of: ConfigOf, device: torch.device) -> None:
    meter = Learner(config_of({"model": {"lora": None}}), device).meter
    (whole,) = pack(make_batch(1).samples, max_tokens=10_000)[0]
    meter.count([whole])
    assert meter.frozen == 0
    assert meter.flops == meter.cost(whole.layout) - 6 * 320 * 64 * (len(whole.input_ids) - len(whole.targets))


def test_a_step_counts_its_passes_and_its_time(
    config_of: ConfigOf, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = Learner(config_of({"updates_per_batch": 3, "micro_batch_tokens": 60}), device)
    learner.meter.peak_flops = 1e12
    for _ in range(2):  # the second step forgets the first
        learner.step(make_batch(1))
    tokens = sum(len(batch.input_ids) for batch in pack(make_batch(1).samples, max_tokens=60, cost=learner.meter.cost)[0])
    assert learner.meter.tokens == 3 * tokens
    flops, begun = learner.meter.flops, learner.meter.begun
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: begun + 10.0)
    measured = learner.meter.metrics()
    assert measured["perf/trainer_tokens_per_s"] == pytest.approx(3 * tokens / 10)
    assert measured["perf/mfu"] == pytest.approx(flops / 10 / 1e12)
    assert measured["timing/forward_backward_s"] > measured["timing/optimizer_s"] > 0
    assert "perf/memory_peak_gib" not in measured  # of GPUs only


def test_phases_are_timed_apart(config_of: ConfigOf, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Learner(config_of(), device).meter
    clock = iter([0.0, 1.0, 4.0, 10.0, 10.5, 20.0, 22.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    meter.begin()
    with meter.phase("forward_backward"):
        pass
    with meter.phase("optimizer"):
        pass
    with meter.phase("forward_backward"):
        pass
    assert meter.seconds == {"forward_backward": 5.0, "optimizer": 0.5}


def test_a_step_without_samples_has_no_speed(config_of: ConfigOf, device: torch.device) -> None:
    learner = Learner(config_of(), device)
    learner.step(make_batch(1))
    learner.step(Batch(2, [], ["r0"], 1, 1.0, Progress()))
    assert learner.meter.metrics() == {}


def test_utilisation_is_reported_only_where_the_peak_is_known(config_of: ConfigOf, device: torch.device) -> None:
    learner = Learner(config_of(), device)
    learner.step(make_batch(1))
    assert learner.meter.peak_flops is None
    assert "perf/mfu" not in learner.meter.metrics()
