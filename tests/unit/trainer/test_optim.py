"""Schedules, clipping and norms."""

import math

import pytest
import torch
from torch import nn

from turnwise.config import OptimConfig
from turnwise.trainer import optim


def rates(steps: int, **options: object) -> list[float]:
    config = OptimConfig.model_validate({"lr": 1.0, **options})
    return [optim.learning_rate(config, step, steps) for step in range(1, steps + 1)]


def test_constant_after_warmup() -> None:
    assert rates(5, warmup_steps=2) == pytest.approx([0.5, 1, 1, 1, 1])


def test_linear_decay_ends_at_the_floor() -> None:
    assert rates(6, warmup_steps=2, schedule="linear", min_lr_ratio=0.2) == pytest.approx([0.5, 1, 0.8, 0.6, 0.4, 0.2])


def test_cosine_decay_is_half_way_down_in_the_middle() -> None:
    values = rates(4, schedule="cosine")
    assert values == pytest.approx([(1 + math.cos(math.pi * k / 4)) / 2 for k in range(1, 5)])
    assert values[1] == pytest.approx(0.5)
    assert values[-1] == pytest.approx(0)


def test_without_a_last_step_there_is_no_decay() -> None:
    assert optim.learning_rate(OptimConfig(lr=2.0, schedule="cosine"), 100, None) == 2.0


def test_clipping_scales_to_the_norm_and_leaves_small_gradients_alone(device: torch.device) -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    norm = optim.gradient_norm(parameters)
    assert norm == pytest.approx(5)
    optim.clip_gradients(parameters, norm, 10.0)
    optim.clip_gradients(parameters, norm, None)
    assert parameters[1].grad.tolist() == [4.0]
    optim.clip_gradients(parameters, norm, 1.0)
    assert optim.gradient_norm(parameters) == pytest.approx(1)


def test_distance_is_how_far_parameters_moved(device: torch.device) -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.ones(2, 2))]
    before = optim.snapshot(parameters)
    with torch.no_grad():
        parameters[0] += 2
        parameters[1] -= 1
    assert optim.distance(before, parameters) == pytest.approx(math.sqrt(2 * 4 + 4 * 1))


def test_norms_are_summed_in_chunks_of_any_size(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.randn(7, 3), torch.zeros(0), torch.randn(11)]
    expected = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
    assert optim.global_norm(tensors, copies=1) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(optim, "CHUNK", 4)
    assert optim.global_norm(tensors, copies=1) == pytest.approx(expected, rel=1e-12)
    assert optim.global_norm([], copies=1) == 0


def test_a_norm_of_float32_values_does_not_overflow(device: torch.device) -> None:
    assert optim.global_norm([torch.full((4,), 1e30)], copies=1) == pytest.approx(2e30, rel=1e-6)
