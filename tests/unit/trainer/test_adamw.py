"""The update against PyTorch's own, and moments in the CPU's memory against moments beside the parameters."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from support.batches import ConfigOf, make_batch
from turnwise.config import OptimConfig
from turnwise.trainer import adamw
from turnwise.trainer.adamw import ALIGNMENT, AdamW
from turnwise.trainer.checkpoint import load_checkpoint, save_checkpoint
from turnwise.trainer.step import Learner
from turnwise.transport import Progress, RunDir

SHAPES = [(5,), (3, 7), (64,), (1,), (40, 9), (2, 3, 4)]
CONFIG = OptimConfig(lr=0.1, weight_decay=0.01, betas=(0.8, 0.95))


def make_parameters(shapes: list[tuple[int, ...]], seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(parameters: list[nn.Parameter], step: int, *, without: int | None = None) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for index, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if index == without else gradient


def trained(config: OptimConfig, shapes: list[tuple[int, ...]], steps: int = 3) -> tuple[list[nn.Parameter], AdamW, list[Tensor]]:
    parameters = make_parameters(shapes)
    optimizer = AdamW(parameters, config)
    moved: list[Tensor] = []
    for step in range(steps):
        set_gradients(parameters, step)
        moved.append(optimizer.step())
    return parameters, optimizer, moved


def test_it_takes_the_steps_of_pytorchs_adamw_to_the_bit(device: torch.device) -> None:
    mine, optimizer, _ = trained(CONFIG, SHAPES)
    bare = make_parameters(SHAPES)
    theirs = torch.optim.AdamW(bare, lr=0.1, betas=CONFIG.betas, eps=CONFIG.eps, weight_decay=0.01)
    for step in range(3):
        set_gradients(bare, step)
        theirs.step()
    for a, b in zip(mine, bare, strict=True):
        assert torch.equal(a, b)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[a][key], theirs.state[b][key])


@settings(deadline=None, max_examples=40)
@given(
    shapes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), min_size=1, max_size=7),
    bucket=st.sampled_from([ALIGNMENT, 2 * ALIGNMENT, 1 << 25]),
    arena=st.sampled_from([ALIGNMENT, 4 * ALIGNMENT, 1 << 28]),
)
def test_offloaded_moments_change_no_bit(shapes: list[tuple[int, ...]], bucket: int, arena: int) -> None:
    """Parameters in several buckets, buckets with several parameters, arenas that are full: whatever the sizes are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adamw, "BUCKET", bucket)
        patch.setattr(adamw, "ARENA", arena)
        plain, of_plain, moved = trained(CONFIG, shapes)
        offloaded, of_offloaded, moved_too = trained(CONFIG.model_copy(update={"offload": True}), shapes)
    assert moved == moved_too
    for a, b in zip(plain, offloaded, strict=True):
        assert torch.equal(a, b)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(of_plain.state[a][key], of_offloaded.state[b][key])
            assert of_offloaded.state[b][key].shape == of_plain.state[a][key].shape


def test_offloaded_moments_are_views_of_arenas_and_travel_through_two_slots(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adamw, "BUCKET", 2 * ALIGNMENT)
    parameters, optimizer, _ = trained(CONFIG.model_copy(update={"offload": True}), SHAPES, steps=1)
    assert optimizer.staging is not None
    homes = {buffer.untyped_storage().data_ptr() for arena in optimizer.staging.arenas for buffer in arena.values()}
    moments = [optimizer.state[parameter][name] for parameter in parameters for name in ("exp_avg", "exp_avg_sq")]
    assert {moment.untyped_storage().data_ptr() for moment in moments} <= homes
    assert len(optimizer.staging.slots) == 2
    assert {buffer.numel() for slot in optimizer.staging.slots for buffer in slot.values()} == {2 * ALIGNMENT}
    assert len(optimizer.buckets) > 2  # slots are used again


@pytest.mark.parametrize("offload", [False, True])
def test_a_parameter_without_a_gradient_stays_as_it_is(device: torch.device, offload: bool) -> None:
    parameters = make_parameters(SHAPES)
    optimizer = AdamW(parameters, CONFIG.model_copy(update={"offload": offload}))
    before = [parameter.detach().clone() for parameter in parameters]
    set_gradients(parameters, 0, without=4)
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, parameters, strict=True)]
    assert changed == [index != 4 for index in range(len(SHAPES))]
    assert optimizer.state[parameters[4]]["step"] == 0
    assert optimizer.state[parameters[3]]["step"] == 1


def test_the_change_that_a_step_reports_is_the_distance_moved(device: torch.device) -> None:
    parameters = make_parameters(SHAPES)
    optimizer = AdamW(parameters, CONFIG)
    before = [parameter.detach().double() for parameter in parameters]
    set_gradients(parameters, 0)
    moved = math.sqrt(float(optimizer.step()))
    expected = math.sqrt(sum(float((p.detach() - old).square().sum()) for p, old in zip(parameters, before, strict=True)))
    assert moved == pytest.approx(expected, rel=1e-6)
    optimizer.zero_grad()
    assert float(optimizer.step()) == 0


@pytest.mark.parametrize("model", [{"lora": {"rank": 4}}, {"lora": None}], ids=["lora", "full"])
@pytest.mark.parametrize("first", [False, True], ids=["off then on", "on then off"])
def test_a_run_goes_on_to_the_bit_when_offload_is_switched_at_a_resume(
    config_of: ConfigOf, device: torch.device, tmp_path: Path, model: dict[str, Any], first: bool
) -> None:
    def learner(offload: bool) -> Learner:
        return Learner(config_of({"model": model, "optim": {"lr": 1e-3, "offload": offload}}), device)

    straight = learner(first)
    for step in (1, 2):
        straight.step(make_batch(step))
    run_dir = RunDir(tmp_path / "run")
    save_checkpoint(straight, run_dir, 2, Progress())
    switched = learner(not first)
    load_checkpoint(switched, run_dir, 2)
    assert straight.step(make_batch(3)) == switched.step(make_batch(3))
    for name, parameter in straight.parameters.items():
        assert torch.equal(parameter, switched.parameters[name])
        for key, moment in straight.optimizer.state[parameter].items():
            assert torch.equal(moment, switched.optimizer.state[switched.parameters[name]][key])
