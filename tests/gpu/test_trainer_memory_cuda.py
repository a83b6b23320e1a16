"""Memory of the trainer on a GPU: what was rehearsed is never exceeded, and moments in the CPU's memory change no bit."""

import gc
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from support.batches import make_batch
from turnwise.config import OptimConfig, RLConfig
from turnwise.trainer import adamw, fsdp
from turnwise.trainer.adamw import AdamW
from turnwise.trainer.rehearsal import OutOfMemory, rehearse
from turnwise.trainer.step import Learner

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def cuda() -> Generator[torch.device]:
    with fsdp.process_group(cuda=True, timeout_s=120.0) as device:
        yield device
    gc.collect()
    torch.cuda.empty_cache()


def config_of(model: Path, trainer: Mapping[str, Any], seq_len: int, dtype: str = "bfloat16") -> RLConfig:
    tables = {"max_steps": 9, "seq_len": seq_len, "gpus": {"trainer": [0]}, "model": {"name": str(model), "dtype": dtype}}
    return RLConfig.model_validate(tables | {"trainer": {"threads": 1, **trainer}})


def make_parameters(device: torch.device) -> list[nn.Parameter]:
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(1000, 700), (33,), (5, 7, 11), (2048, 1024), (1,)] * 6
    return [nn.Parameter(torch.randn(shape, generator=generator, device=device)) for shape in shapes]


def test_offloaded_moments_change_no_bit_and_leave_the_gpu(cuda: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets small enough that both slots are used many times; each step begins while the last copies may be on their way."""
    monkeypatch.setattr(adamw, "BUCKET", 1 << 18)
    monkeypatch.setattr(adamw, "ARENA", 1 << 22)
    results: list[list[torch.Tensor]] = []
    taken: list[int] = []
    for offload in (False, True):
        parameters = make_parameters(cuda)
        before = torch.cuda.memory_allocated()
        optimizer = AdamW(parameters, OptimConfig(lr=0.01, weight_decay=0.1, offload=offload))
        taken.append(torch.cuda.memory_allocated() - before)
        generator = torch.Generator(cuda).manual_seed(1)
        for _ in range(5):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator, device=cuda)
            optimizer.step()
        moments = [optimizer.state[p][name].cpu() for p in parameters for name in ("exp_avg", "exp_avg_sq")]
        results.append([*(parameter.detach().cpu() for parameter in parameters), *moments])
    for plain, offloaded in zip(*results, strict=True):
        assert torch.equal(plain, offloaded)
    assert taken[1] < taken[0] / 4


@pytest.mark.parametrize("lora", [{"rank": 4}, None], ids=["lora", "full"])
@pytest.mark.parametrize("recompute", [False, True])
def test_no_step_takes_more_memory_than_the_rehearsal(
    cuda: torch.device, tiny_model: Path, lora: dict[str, Any] | None, recompute: bool
) -> None:
    model = {"lora": lora, "gradient_checkpointing": recompute}
    learner = Learner(config_of(tiny_model, {"model": model, "micro_batch_tokens": 512}, seq_len=128), cuda)
    line = rehearse(learner)
    assert line.startswith("rehearsed 512 tokens in ")
    assert " GiB of " in line
    rehearsed = torch.cuda.max_memory_allocated()
    for step in range(1, 9):
        learner.step(make_batch(step, groups=1 + step, group_size=4, prompt_tokens=8 * step))
        assert 0 < torch.cuda.max_memory_allocated() <= rehearsed
    assert learner.meter.metrics()["perf/memory_peak_gib"] > 0


def test_a_rehearsal_that_does_not_fit_says_what_helps(cuda: torch.device, tiny_model: Path) -> None:
    learner = Learner(config_of(tiny_model, {"model": {"lora": {"rank": 4}}}, seq_len=16_384), cuda)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(cuda).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 8 * 2**20) / total)
    try:
        with pytest.raises(OutOfMemory) as caught:
            rehearse(learner)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    message = str(caught.value)
    assert "of a micro-batch of 16,384 tokens" in message
    assert "more were asked for" in message
    assert "trainer.model.gradient_checkpointing = true" in message
    assert torch.cuda.get_device_name(cuda) in message


def test_full_fine_tuning_in_bfloat16_computes_in_bfloat16_on_one_gpu(cuda: torch.device, tiny_model: Path) -> None:
    learner = Learner(config_of(tiny_model, {"model": {"lora": None}}, seq_len=128), cuda)
    seen: set[tuple[torch.dtype, torch.dtype]] = set()

    def watch(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        assert isinstance(module, nn.Linear)
        seen.add((module.weight.dtype, output.dtype))

    for module in learner.policy.model.get_decoder().modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(watch)
    learner.passes(make_batch(1)).backward(first=True)
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    assert {parameter.dtype for parameter in learner.trained} == {torch.float32}
    assert {parameter.grad.dtype for parameter in learner.trained if parameter.grad is not None} == {torch.float32}
