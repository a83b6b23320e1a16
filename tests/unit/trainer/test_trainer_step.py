"""One step of training on the tiny model: what may change the result, and what may not."""

import math
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from support.batches import ConfigOf, make_batch
from turnwise.config import RLConfig
from turnwise.trainer.step import Learner, signal_share
from turnwise.transport import Batch, Progress


def parameters_after(config: RLConfig, device: torch.device, *batches: Batch) -> tuple[dict[str, Tensor], dict[str, float]]:
    learner = Learner(config, device)
    metrics: dict[str, float] = {}
    for batch in batches:
        metrics = learner.step(batch)
    return {name: p.detach().clone() for name, p in learner.parameters.items()}, metrics


LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {"kind": "grpo"},
    "dapo": {"kind": "dapo", "clip_high": 0.28},
    "dr_grpo": {"kind": "dr_grpo"},
    "gspo": {"kind": "gspo"},
    "cispo": {"kind": "cispo", "clip_high": 2.0},
    "all options": {"kl_beta": 0.2, "importance_sampling": "truncate", "entropy_coef": 0.05, "dual_clip": 3.0},
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("lora", [{"rank": 4}, None], ids=["lora", "full"])
def test_the_size_of_micro_batches_changes_nothing(
    config_of: ConfigOf, device: torch.device, loss: dict[str, Any], lora: dict[str, Any] | None
) -> None:
    results = []
    for budget in (40, 10_000):
        config = config_of(
            {"loss": loss, "model": {"lora": lora}, "micro_batch_tokens": budget, "optim": {"lr": 1e-3, "eps": 1e-3}}
        )
        results.append(parameters_after(config, device, make_batch(1), make_batch(2)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=2e-6)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-3, abs=1e-5)


def test_the_same_step_twice_is_equal_to_the_bit(config_of: ConfigOf, device: torch.device) -> None:
    first, second = (parameters_after(config_of(), device, make_batch(1), make_batch(2)) for _ in range(2))
    assert all(torch.equal(first[0][name], second[0][name]) for name in first[0])
    assert first[1] == second[1]


def test_gradient_checkpointing_changes_nothing(config_of: ConfigOf, device: torch.device) -> None:
    plain, _ = parameters_after(config_of(), device, make_batch(1))
    saved, _ = parameters_after(config_of({"model": {"gradient_checkpointing": True}}), device, make_batch(1))
    torch.testing.assert_close(plain, saved, rtol=1e-5, atol=1e-7)


def test_a_positive_advantage_makes_its_tokens_likelier(config_of: ConfigOf, device: torch.device) -> None:
    learner = Learner(config_of({"loss": {"clip_high": 50.0}}), device)
    batch = make_batch(1, groups=1, group_size=2, advantage=1.0)
    gaps = [learner.step(msgspec.structs.replace(batch, step=k))["actor/loss"] for k in range(1, 8)]
    assert gaps[-1] < gaps[0] - 0.01


def test_metrics_of_the_first_step_are_those_of_the_formulas(config_of: ConfigOf, device: torch.device) -> None:
    learner = Learner(config_of(), device)
    batch = make_batch(1)
    with torch.no_grad():
        from turnwise.trainer.packing import pack

        (whole,) = pack(batch.samples, max_tokens=10_000)[0]
        stats = learner.policy.stats(whole, temperature=batch.temperature)
    gap = stats.logprobs - whole.behaviour_logprobs
    before = {name: p.detach().clone() for name, p in learner.parameters.items()}
    metrics = learner.step(batch)
    moved = math.sqrt(sum(float((p.detach() - before[name]).square().sum()) for name, p in learner.parameters.items()))
    assert metrics["mismatch/logprob_abs/mean"] == pytest.approx(float(gap.abs().mean()), rel=1e-5)
    assert metrics["mismatch/logprob_abs/max"] == pytest.approx(float(gap.abs().max()), rel=1e-5)
    assert metrics["mismatch/kl/mean"] == pytest.approx(float((gap.exp() - gap - 1).mean()), rel=1e-4)
    assert metrics["actor/entropy"] == pytest.approx(float(stats.entropy.mean()), rel=1e-5)
    assert metrics["actor/update_norm"] == pytest.approx(moved, rel=1e-5)
    assert metrics["actor/lr"] == 1e-3
    assert metrics["actor/grad_norm"] > 0


def test_the_temperature_of_the_batch_divides_the_logits(config_of: ConfigOf, device: torch.device) -> None:
    batch = make_batch(1)
    sharp = Learner(config_of(), device).step(msgspec.structs.replace(batch, temperature=0.05))
    flat = Learner(config_of(), device).step(msgspec.structs.replace(batch, temperature=5.0))
    assert sharp["actor/entropy"] < flat["actor/entropy"] - 0.5
    assert flat["actor/entropy"] == pytest.approx(math.log(320), abs=0.01)


def test_updates_per_batch_move_further_against_fixed_proximal_logprobs(config_of: ConfigOf, device: torch.device) -> None:
    once = Learner(config_of(), device).step(make_batch(1))
    thrice = Learner(config_of({"updates_per_batch": 3}), device).step(make_batch(1))
    assert thrice["actor/update_norm"] > 1.5 * once["actor/update_norm"]
    assert thrice["mismatch/kl/mean"] == pytest.approx(once["mismatch/kl/mean"], rel=1e-5)  # measured before the first update
    assert thrice["actor/kl"] != pytest.approx(once["actor/kl"], rel=1e-5)


@pytest.mark.parametrize("lora", [{"rank": 4}, None], ids=["lora", "full"])
def test_kl_against_the_reference_starts_at_zero_and_grows(
    config_of: ConfigOf, device: torch.device, lora: dict[str, Any] | None
) -> None:
    learner = Learner(config_of({"model": {"lora": lora}, "loss": {"kl_beta": 0.01}, "optim": {"lr": 5e-3}}), device)
    values = [learner.step(make_batch(k))["actor/kl_loss"] for k in (1, 2, 3)]
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert values[2] > 1e-5


def test_a_batch_without_signal_leaves_the_parameters_as_they_are(config_of: ConfigOf, device: torch.device) -> None:
    """Even with momentum from the step before."""
    learner = Learner(config_of(), device)
    learner.step(make_batch(1))
    before = [p.detach().clone() for p in learner.parameters.values()]
    batch = make_batch(2, advantage=0.0)
    metrics = learner.step(batch)
    assert signal_share(batch) == 0
    assert metrics["actor/update_norm"] == 0
    assert metrics["actor/updates_skipped"] == 1
    assert metrics["actor/entropy"] > 0
    assert all(torch.equal(a, b) for a, b in zip(before, learner.parameters.values(), strict=True))


def test_a_batch_without_samples_is_a_step_that_changes_nothing(config_of: ConfigOf, device: torch.device) -> None:
    metrics = Learner(config_of(), device).step(Batch(1, [], ["r0"], 1, 1.0, Progress()))
    assert metrics["actor/update_norm"] == 0
    assert metrics["actor/updates_skipped"] == 1


def test_a_gradient_that_is_not_finite_is_left_out(config_of: ConfigOf, device: torch.device) -> None:
    learner = Learner(config_of(), device)
    before = [p.detach().clone() for p in learner.parameters.values()]
    metrics = learner.step(make_batch(1, advantage=math.inf))
    assert not math.isfinite(metrics["actor/grad_norm"])
    assert metrics["actor/updates_skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, learner.parameters.values(), strict=True))
    assert learner.step(make_batch(2))["actor/update_norm"] > 0


def test_full_fine_tuning_of_a_bfloat16_model_keeps_float32_master_weights(config_of: ConfigOf, device: torch.device) -> None:
    config = config_of({"model": {"lora": None}, "optim": {"lr": 1e-5}})
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    learner = Learner(config, device)
    assert learner.dtype == torch.bfloat16
    assert {p.dtype for p in learner.parameters.values()} == {torch.float32}
    metrics = learner.step(make_batch(1))
    # one bfloat16 step at a weight of 0.02 is 6e-5: updates of 1e-5 exist in float32 only
    assert 0 < metrics["actor/update_norm"] < 1e-5 * math.sqrt(sum(p.numel() for p in learner.parameters.values())) * 1.01


def test_dr_grpo_takes_the_token_limit_of_the_rollouts(config_of: ConfigOf, device: torch.device) -> None:
    batch = make_batch(1)
    small, large = (
        Learner(config_of({"loss": {"kind": "dr_grpo"}}), device).step(
            msgspec.structs.replace(batch, max_completion_tokens=limit)
        )
        for limit in (10, 100)
    )
    assert small["actor/loss"] == pytest.approx(10 * large["actor/loss"], rel=1e-4)
