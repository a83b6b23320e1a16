"""Noise in vLLM's workers: the method they are called by, and norms in float32 where the engine was started so."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from support.fake_vllm import PACKED, engine_model, published_model, run_ranks
from support.noisy_engine import bare
from turnwise.inference.norms import gaussian, module_norms
from turnwise.inference.vllm_base import resident_weights
from turnwise.inference.vllm_noise import AddsNoise, make_norms_float32, make_norms_float32_at_load
from turnwise.inference.wire import FLOAT32_NORMS, noise_reports
from turnwise.transport import tensor_digest


class Worker(AddsNoise):
    """With what vLLM's worker has."""

    def __init__(self, model: nn.Module) -> None:
        self.model_runner = SimpleNamespace(get_model=lambda: model)


def test_a_worker_sets_its_norms_and_says_what_they_hold() -> None:
    model = bare()
    worker, clean = Worker(model), {norm.name: norm.read().clone() for norm in module_norms(model)}
    (report,) = noise_reports([[worker.apply_noise(0.02, 9)]])
    assert len(report.norms) == 5
    for norm in module_norms(model):
        assert torch.equal(norm.read(), clean[norm.name] + 0.02 * gaussian(norm.name, norm.read(), 9))
    (report,) = noise_reports([[worker.apply_noise(0.0, 0)]])
    assert {norm.sigma for norm in report.norms} == {0.0}
    assert report.digest == tensor_digest(clean)


def test_the_ranks_of_a_group_hold_the_same_noise() -> None:
    reports = [Worker(bare()).apply_noise(0.02, 9) for _ in range(4)]
    assert reports == [reports[0]] * 4


def test_the_extension_adds_no_name_but_its_method() -> None:
    """vLLM refuses an extension with names that its workers have."""
    assert [name for name in dir(AddsNoise) if not name.startswith("__")] == ["apply_noise"]


# --- float32 ----------------------------------------------------------------------------------------------------------


class Loader:
    """vLLM's worker as far as loading goes."""

    def __init__(self, additional_config: dict[str, Any]) -> None:
        self.vllm_config = SimpleNamespace(additional_config=additional_config)

    def load_model(self, *, load_dummy_weights: bool = False) -> str:
        model = bare().bfloat16()
        self.model_runner = SimpleNamespace(get_model=lambda: model)
        return f"loaded, dummy: {load_dummy_weights}"


@pytest.mark.parametrize(
    ("additional_config", "dtype"), [({FLOAT32_NORMS: True}, torch.float32), ({}, torch.bfloat16), ({"other": 1}, torch.bfloat16)]
)
def test_norms_become_float32_at_load_where_the_engine_was_started_so(
    additional_config: dict[str, Any], dtype: torch.dtype
) -> None:
    class Patched(Loader): ...

    make_norms_float32_at_load(Patched)
    worker = Patched(additional_config)
    assert worker.load_model(load_dummy_weights=True) == "loaded, dummy: True"
    model = worker.model_runner.get_model()
    assert {norm.read().dtype for norm in module_norms(model)} == {dtype}
    inside = {module.weight.dtype for name, module in model.named_modules() if name.endswith(("q_norm", "k_norm"))}
    assert inside == {torch.bfloat16}


def test_float32_norms_are_read_back_in_the_type_in_which_they_were_published() -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in published_model().items()}

    def work(group: Any) -> str:
        model = engine_model(tensors, rank=group.rank_in_group, world=group.world_size)
        make_norms_float32(model)
        assert {norm.read().dtype for norm in module_norms(model)} == {torch.float32}
        return tensor_digest(dict(resident_weights(model, PACKED, group)))

    assert run_ranks(2, work) == [tensor_digest(tensors)] * 2


def test_noise_in_float32_norms_shows_in_the_digest_of_the_base() -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in published_model().items()}

    def work(group: Any) -> str:
        model = engine_model(tensors)
        make_norms_float32(model)
        Worker(model).apply_noise(0.05, 1)
        return tensor_digest(dict(resident_weights(model, PACKED, group)))

    assert run_ranks(1, work) != [tensor_digest(tensors)]


def test_weights_that_are_written_in_place_become_the_clean_ones_of_float32_norms() -> None:
    """As vLLM's loaders write them: into the parameter, whatever its type."""
    tensors, new = ({name: t.bfloat16() for name, t in published_model(seed=seed).items()} for seed in (0, 1))
    model = engine_model(tensors)
    make_norms_float32(model)
    worker = Worker(model)
    worker.apply_noise(0.05, 1)
    for norm in module_norms(model):
        model.get_parameter(f"{norm.name}.weight").data.copy_(new[f"{norm.name}.weight"])
    worker.apply_noise(0.05, 2)
    worker.apply_noise(0.0, 0)
    assert all(torch.equal(norm.read(), new[f"{norm.name}.weight"].float()) for norm in module_norms(model))
