"""One step of training on the tiny model: what may change the result, and what may not."""

import math
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor, nn

from support.batches import ConfigOf, make_batch
from turnwise.config import RLConfig
from turnwise.trainer.logprobs import TokenStats
from turnwise.trainer.loss import policy_loss
from turnwise.trainer.model import Policy
from turnwise.trainer.optim import clip_gradients, gradient_norm
from turnwise.trainer.packing import MicroBatch, pack, step_totals
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


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
@pytest.mark.parametrize("sampling", ["truncate", "mask"])
def test_importance_sampling_needs_no_second_forward_pass(
    config_of: ConfigOf, device: torch.device, kind: str, sampling: str
) -> None:
    """Against proximal logprobs from a pass of their own, as they are defined."""
    loss = {"kind": kind, "importance_sampling": sampling, "importance_cap": 1.05, "clip_high": 2.0 if kind == "cispo" else 0.2}
    config = config_of({"loss": loss, "micro_batch_tokens": 10_000})
    batch = make_batch(1)
    learner, other = Learner(config, device), Learner(config, device)
    metrics = learner.step(batch)
    (whole,) = pack(batch.samples, max_tokens=10_000)[0]
    with torch.no_grad():
        proximal = other.policy.stats(whole, temperature=batch.temperature).logprobs
    stats = other.policy.stats(whole, temperature=batch.temperature)
    output = policy_loss(
        stats.logprobs,
        whole.behaviour_logprobs,
        whole.advantages,
        torch.ones_like(whole.targets, dtype=torch.bool),
        config=config.trainer.loss.model_copy(update={"max_completion_tokens": batch.max_completion_tokens}),
        proximal_logprobs=proximal,
        segment_ids=whole.segment_ids,
        totals=step_totals(batch.samples),
        rollout_tokens=whole.rollout_tokens,
    )
    output.loss.backward()
    norm = gradient_norm(other.trained)
    clip_gradients(other.trained, norm, config.trainer.optim.max_grad_norm)
    other.optimizer.step()
    assert metrics["actor/grad_norm"] == norm > 0
    assert all(torch.equal(p, other.parameters[name]) for name, p in learner.parameters.items())
    weight = (proximal - whole.behaviour_logprobs).exp()
    cut = weight > 1.05
    kept = weight.clamp_max(1.05) if sampling == "truncate" else torch.where(cut, 0, weight)
    assert metrics["mismatch/importance_weight/mean"] == pytest.approx(float(kept.mean()), rel=1e-5)
    assert metrics["mismatch/importance_cut/share"] == pytest.approx(float(cut.float().mean()), rel=1e-5)
    assert 0 < metrics["mismatch/importance_cut/share"] < 1
    assert metrics["actor/clip_fraction"] == 0  # ratios are exactly 1


NOISE = {"inference": {"noise": {}}}


@pytest.mark.parametrize(
    ("trainer", "tables", "proximal"),
    [
        ({}, {}, False),
        ({"updates_per_batch": 2}, {}, True),
        ({"loss": {"importance_sampling": "mask"}}, {}, True),
        ({}, NOISE, True),
        ({"loss": {"old_logprobs": "behaviour"}}, NOISE, False),
        ({"loss": {"old_logprobs": "behaviour"}, "updates_per_batch": 2}, {}, False),
        ({"loss": {"old_logprobs": "proximal"}}, {}, True),
    ],
)
def test_ratios_are_against_the_policy_that_the_configuration_names(
    config_of: ConfigOf, device: torch.device, trainer: dict[str, Any], tables: dict[str, Any], proximal: bool
) -> None:
    """The trainer's own: every ratio of the first update is 1, and noise in the engine changes no weight of a token."""
    batch, learner = make_batch(1), Learner(config_of({**trainer, "micro_batch_tokens": 10_000}, **tables), device)
    passes = learner.passes(batch)
    metrics = passes.backward(first=True)
    assert passes.keeps_proximal is proximal
    assert (metrics["actor/clip_fraction"] == 0) is proximal  # the engine's logprobs are random here
    assert metrics["mismatch/kl/mean"] > 0


def test_without_correction_the_gradient_does_not_depend_on_what_the_engine_says(
    config_of: ConfigOf, device: torch.device
) -> None:
    batch = make_batch(1)
    samples = [
        msgspec.structs.replace(
            sample, logprobs=[value - 0.3 * on for value, on in zip(sample.logprobs, sample.loss_mask, strict=True)]
        )
        for sample in batch.samples
    ]
    other = msgspec.structs.replace(batch, samples=samples)
    norms = {
        old: [Learner(config_of({"loss": {"old_logprobs": old}}), device).step(b)["actor/grad_norm"] for b in (batch, other)]
        for old in ("behaviour", "proximal")
    }
    assert norms["proximal"][0] == norms["proximal"][1] > 0
    assert norms["behaviour"][0] != pytest.approx(norms["behaviour"][1], rel=1e-3)


@pytest.mark.parametrize("updates", [1, 2])
def test_every_micro_batch_goes_through_the_policy_once_an_update(
    config_of: ConfigOf, device: torch.device, monkeypatch: pytest.MonkeyPatch, updates: int
) -> None:
    learner = Learner(
        config_of(
            {"loss": {"importance_sampling": "truncate"}, "updates_per_batch": updates, "micro_batch_tokens": 60},
        ),
        device,
    )
    calls: list[bool] = []
    stats = Policy.stats

    def counted(policy: Policy, batch: MicroBatch, **options: Any) -> TokenStats:
        calls.append(torch.is_grad_enabled())
        return stats(policy, batch, **options)

    monkeypatch.setattr(Policy, "stats", counted)
    learner.step(make_batch(1))
    micro_batches = len(pack(make_batch(1).samples, max_tokens=60, cost=learner.meter.cost)[0])
    assert micro_batches > 1
    assert calls == [True] * (micro_batches * updates)


def test_the_mismatch_of_the_worst_sample_stands_out(config_of: ConfigOf, device: torch.device) -> None:
    """As when one replica of the engine serves another policy: the mean hardly moves, the largest sample's does."""
    batch = make_batch(1, groups=4, group_size=4)
    learner = Learner(config_of({"micro_batch_tokens": 60}), device)
    (whole,) = pack(batch.samples, max_tokens=10_000)[0]
    with torch.no_grad():
        logprobs = learner.policy.stats(whole, temperature=batch.temperature).logprobs
    difference = (logprobs - whole.behaviour_logprobs).double()
    kl = difference.exp() - difference - 1
    means = [float(kl[whole.segment_ids == i].mean()) for i in range(len(batch.samples))]
    assert learner.step(batch)["mismatch/sequence_kl/max"] == pytest.approx(max(means), rel=1e-4)
    broken = batch.samples[5]
    shifted = [logprob - 1.5 if on else logprob for logprob, on in zip(broken.logprobs, broken.loss_mask, strict=True)]
    samples = [*batch.samples]
    samples[5] = msgspec.structs.replace(broken, logprobs=shifted)
    metrics = Learner(config_of({"micro_batch_tokens": 60}), device).step(msgspec.structs.replace(batch, samples=samples))
    assert metrics["mismatch/sequence_kl/max"] > 10 * max(means)
    assert metrics["mismatch/kl/mean"] < metrics["mismatch/sequence_kl/max"] / 5


def test_full_fine_tuning_of_a_bfloat16_model_computes_in_bfloat16(config_of: ConfigOf, device: torch.device) -> None:
    """On one process too: every product of the forward pass, while parameters, gradients and moments are float32."""
    learner = Learner(config_of({"model": {"lora": None}}, model={"name": config_of().model.name, "dtype": "bfloat16"}), device)
    seen: set[tuple[torch.dtype, torch.dtype, torch.dtype]] = set()

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Linear)
        seen.add((module.weight.dtype, inputs[0].dtype, output.dtype))

    linears = [module for module in learner.policy.model.get_decoder().modules() if isinstance(module, nn.Linear)]
    for module in linears:
        module.register_forward_hook(watch)
    learner.passes(make_batch(1)).backward(first=True)
    assert seen == {(torch.bfloat16,) * 3}
    for parameter in learner.parameters.values():
        assert parameter.grad is not None
        types = {parameter.dtype, parameter.grad.dtype, *(moment.dtype for moment in learner.optimizer.state[parameter].values())}
        assert types == {torch.float32}


def test_bfloat16_and_float32_agree_on_loss_and_gradient(config_of: ConfigOf, device: torch.device) -> None:
    half, whole = (
        Learner(config_of({"model": {"lora": None}}, model={"name": config_of().model.name, "dtype": dtype}), device).step(
            make_batch(1)
        )
        for dtype in ("bfloat16", "float32")
    )
    for name in ("actor/loss", "actor/grad_norm", "actor/entropy", "mismatch/logprob_abs/mean"):
        assert half[name] == pytest.approx(whole[name], rel=0.03, abs=0.01)


def test_dr_grpo_takes_the_token_limit_of_the_rollouts(config_of: ConfigOf, device: torch.device) -> None:
    batch = make_batch(1)
    small, large = (
        Learner(config_of({"loss": {"kind": "dr_grpo"}}), device).step(
            msgspec.structs.replace(batch, max_completion_tokens=limit)
        )
        for limit in (10, 100)
    )
    assert small["actor/loss"] == pytest.approx(10 * large["actor/loss"], rel=1e-4)
