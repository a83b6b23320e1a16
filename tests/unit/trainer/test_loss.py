"""The loss against a scalar implementation written from the formulas, token by token in Python floats."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turnwise.config import LossConfig
from turnwise.trainer.loss import StepTotals, policy_loss

KINDS = ["grpo", "dapo", "dr_grpo", "gspo", "cispo"]


@dataclass
class Rows:
    """Padded float64 input."""

    logprobs: Tensor
    behaviour: Tensor
    advantages: Tensor
    mask: Tensor
    reference: Tensor
    proximal: Tensor


def make_rows(seed: int, batch: int = 3, tokens: int = 7, spread: float = 0.4) -> Rows:
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return torch.randn(batch, tokens, generator=generator, dtype=torch.float64) * scale

    base = normal(1.0) - 3
    mask = torch.rand(batch, tokens, generator=generator) < 0.6
    mask[:, 0] = True
    return Rows(base, base + normal(spread), normal(1.0), mask, base + normal(spread), base + normal(spread))


def expected_loss(rows: Rows, config: LossConfig, *, proximal: bool, reference: bool) -> float:
    """The loss of a whole step whose rows are rollouts, in plain loops."""
    lists = {name: getattr(rows, name).tolist() for name in ("logprobs", "behaviour", "advantages", "reference", "proximal")}
    chosen = [[t for t, on in enumerate(row) if on] for row in rows.mask.tolist()]
    total_tokens = sum(len(row) for row in chosen)
    result = 0.0
    for i, tokens in enumerate(chosen):
        old = lists["proximal"][i] if proximal else lists["behaviour"][i]
        mean_log_ratio = sum(lists["logprobs"][i][t] - old[t] for t in tokens) / len(tokens)
        row = 0.0
        for t in tokens:
            new, advantage = lists["logprobs"][i][t], lists["advantages"][i][t]
            log_ratio = mean_log_ratio if config.kind == "gspo" else new - old[t]
            ratio = math.exp(max(-20.0, min(20.0, log_ratio)))
            if config.kind == "cispo":
                value = -min(ratio, config.clip_high) * advantage * new
            else:
                clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
                value = max(-advantage * ratio, -advantage * clipped)
                if config.dual_clip and advantage < 0:
                    value = min(value, -advantage * config.dual_clip)
            if config.importance_sampling != "none":
                weight = math.exp(lists["proximal"][i][t] - lists["behaviour"][i][t])
                too_large = weight > config.importance_cap
                value *= (config.importance_cap if config.importance_sampling == "truncate" else 0.0) if too_large else weight
            if reference:
                gap = lists["reference"][i][t] - new
                value += config.kl_beta * {"k1": -gap, "k2": gap * gap / 2, "k3": math.exp(gap) - gap - 1}[config.kl_kind]
            row += value
        if config.kind in ("grpo", "gspo"):
            result += row / len(tokens) / len(chosen)
        elif config.kind == "dr_grpo":
            result += row / (len(chosen) * config.max_completion_tokens)
        else:
            result += row / total_tokens
    return result


OPTIONS = {
    "plain": {},
    "clip-higher": {"clip_low": 0.1, "clip_high": 0.28},
    "dual": {"dual_clip": 1.1},
    "k1": {"kl_beta": 0.3, "kl_kind": "k1"},
    "k2": {"kl_beta": 0.3, "kl_kind": "k2"},
    "k3": {"kl_beta": 0.3, "kl_kind": "k3"},
    "truncate": {"importance_sampling": "truncate", "importance_cap": 1.1},
    "mask": {"importance_sampling": "mask", "importance_cap": 1.1},
    "all": {"importance_sampling": "truncate", "importance_cap": 1.2, "kl_beta": 0.1, "dual_clip": 1.2, "clip_high": 0.28},
}


def config_of(kind: str, **options: object) -> LossConfig:
    absolute = {"clip_high": 1.2} if kind == "cispo" and "clip_high" not in options else {}
    return LossConfig.model_validate({"kind": kind, "max_completion_tokens": 9, **absolute, **options})


def loss_of(rows: Rows, config: LossConfig, **more: object):
    needs_proximal = config.importance_sampling != "none"
    return policy_loss(
        rows.logprobs,
        rows.behaviour,
        rows.advantages,
        rows.mask,
        config=config,
        ref_logprobs=rows.reference if config.kl_beta > 0 else None,
        proximal_logprobs=rows.proximal if needs_proximal else None,
        **more,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("seed", range(4))
def test_every_kind_and_option_equals_the_scalar_formula(kind: str, options: dict[str, object], seed: int) -> None:
    rows, config = make_rows(seed), config_of(kind, **options)
    expected = expected_loss(rows, config, proximal=config.importance_sampling != "none", reference=config.kl_beta > 0)
    assert loss_of(rows, config).loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_ratios_are_taken_against_the_proximal_policy_when_it_is_given(kind: str) -> None:
    rows, config = make_rows(3), config_of(kind)
    out = policy_loss(rows.logprobs, rows.behaviour, rows.advantages, rows.mask, config=config, proximal_logprobs=rows.proximal)
    assert out.loss.item() == pytest.approx(expected_loss(rows, config, proximal=True, reference=False), rel=1e-12)


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo", "gspo"])
@pytest.mark.parametrize("kl_kind", ["k1", "k2", "k3"])
def test_the_gradient_passes_gradcheck(kind: str, kl_kind: str) -> None:
    """Not for cispo: its weight is detached on purpose, so its gradient is not that of its value."""
    rows = make_rows(5, batch=2, tokens=5)
    config = config_of(kind, kl_beta=0.2, kl_kind=kl_kind, dual_clip=1.3)

    def value(logprobs: Tensor) -> Tensor:
        return policy_loss(logprobs, rows.behaviour, rows.advantages, rows.mask, config=config, ref_logprobs=rows.reference).loss

    assert torch.autograd.gradcheck(value, rows.logprobs.clone().requires_grad_(True), eps=1e-7)


def test_cispo_has_the_gradient_of_weighted_log_likelihood() -> None:
    rows, config = make_rows(6), config_of("cispo")
    logprobs = rows.logprobs.clone().requires_grad_(True)
    policy_loss(logprobs, rows.behaviour, rows.advantages, rows.mask, config=config).loss.backward()
    weight = (rows.logprobs - rows.behaviour).exp().clamp_max(1.2)
    expected = torch.where(rows.mask, -weight * rows.advantages, 0) / rows.mask.sum()
    torch.testing.assert_close(logprobs.grad, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_outside_the_mask_have_no_gradient_even_when_they_hold_nan(kind: str) -> None:
    rows = make_rows(7)
    dirty = torch.where(rows.mask, rows.logprobs, torch.nan).requires_grad_(True)
    config = config_of(kind, kl_beta=0.1, importance_sampling="truncate")
    out = policy_loss(
        dirty,
        torch.where(rows.mask, rows.behaviour, -torch.inf),
        torch.where(rows.mask, rows.advantages, torch.nan),
        rows.mask,
        config=config,
        ref_logprobs=torch.where(rows.mask, rows.reference, torch.nan),
        proximal_logprobs=torch.where(rows.mask, rows.proximal, torch.inf),
    )
    out.loss.backward()
    assert out.loss.item() == pytest.approx(loss_of(rows, config).loss.item(), rel=1e-12)
    assert dirty.grad is not None
    assert dirty.grad[~rows.mask].abs().max() == 0
    assert dirty.grad[rows.mask].abs().max() > 0
    assert all(torch.isfinite(value) for value in out.metrics.values())


@pytest.mark.parametrize("kind", KINDS)
def test_packed_input_equals_padded_input(kind: str) -> None:
    rows, config = make_rows(8), config_of(kind, kl_beta=0.1)
    batch, tokens = rows.mask.shape
    packed = policy_loss(
        rows.logprobs.flatten(),
        rows.behaviour.flatten(),
        rows.advantages.flatten(),
        rows.mask.flatten(),
        config=config,
        ref_logprobs=rows.reference.flatten(),
        segment_ids=torch.arange(batch).repeat_interleave(tokens),
    )
    padded = loss_of(rows, config)
    assert packed.loss.item() == pytest.approx(padded.loss.item(), rel=1e-14)
    assert {name: float(value) for name, value in packed.metrics.items()} == pytest.approx(
        {name: float(value) for name, value in padded.metrics.items()}, rel=1e-12
    )


@settings(deadline=None, max_examples=60)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 10_000), rows=st.integers(2, 6), cut=st.integers(1, 5), data=st.data())
def test_splitting_a_step_into_micro_batches_changes_nothing(
    kind: str, seed: int, rows: int, cut: int, data: st.DataObject
) -> None:
    """Loss, gradient and metrics; rows in any order and number to a micro-batch, as accumulation and ranks do it."""
    whole = make_rows(seed, batch=rows)
    order = data.draw(st.permutations(range(rows)))
    config = config_of(kind, kl_beta=0.1, importance_sampling="truncate")
    whole.logprobs.requires_grad_(True)
    expected = loss_of(whole, config)
    (gradient,) = torch.autograd.grad(expected.loss, whole.logprobs)
    totals = StepTotals(int(whole.mask.sum()), rows)
    summed, summed_gradient, metrics = 0.0, torch.zeros_like(gradient), dict.fromkeys(expected.metrics, 0.0)
    for start in range(0, rows, cut):
        index = order[start : start + cut]
        names = ("logprobs", "behaviour", "advantages", "mask", "reference", "proximal")
        part = Rows(*(getattr(whole, name)[index].detach().clone() for name in names))
        part.logprobs.requires_grad_(True)
        out = loss_of(part, config, totals=totals)
        (summed_gradient[index],) = torch.autograd.grad(out.loss, part.logprobs)
        summed += out.loss.item()
        metrics = {name: value + float(out.metrics[name]) for name, value in metrics.items()}
    assert summed == pytest.approx(expected.loss.item(), rel=1e-11, abs=1e-13)
    torch.testing.assert_close(summed_gradient, gradient, rtol=1e-11, atol=1e-14)
    assert metrics == pytest.approx({name: float(value) for name, value in expected.metrics.items()}, rel=1e-11, abs=1e-13)


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo", "cispo"])
def test_a_rollout_cut_into_samples_weighs_the_same_as_whole(kind: str) -> None:
    """Not for gspo, whose ratio is the sample's by definition."""
    rows, config = make_rows(9, batch=2, tokens=8), config_of(kind)
    whole = loss_of(rows, config)
    halves = Rows(
        *(getattr(rows, n).reshape(4, 4) for n in ("logprobs", "behaviour", "advantages", "mask", "reference", "proximal"))
    )
    per_rollout = rows.mask.sum(1).repeat_interleave(2)
    explicit = loss_of(halves, config, totals=StepTotals(int(rows.mask.sum()), 2), rollout_tokens=per_rollout)
    implied = loss_of(halves, config, rollout_tokens=per_rollout)
    assert explicit.loss.item() == pytest.approx(whole.loss.item(), rel=1e-13)
    assert implied.loss.item() == pytest.approx(whole.loss.item(), rel=1e-13)


def test_on_policy_loss_of_centred_advantages_is_zero_and_its_gradient_is_not() -> None:
    rows = make_rows(10, batch=2, tokens=4)
    rows.mask[:] = True
    rows.advantages[0], rows.advantages[1] = 1.0, -1.0
    logprobs = rows.behaviour.clone().requires_grad_(True)
    out = policy_loss(logprobs, rows.behaviour, rows.advantages, rows.mask, config=LossConfig())
    out.loss.backward()
    assert out.loss.item() == pytest.approx(0, abs=1e-15)
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, -rows.advantages / 8)


def test_a_wildly_mismatched_token_cannot_overflow() -> None:
    mask = torch.ones(1, 2, dtype=torch.bool)
    advantages = torch.tensor([[-1.0, 1.0]])
    logprobs = torch.tensor([[0.0, -900.0]], requires_grad=True)
    out = policy_loss(logprobs, torch.tensor([[-900.0, 0.0]]), advantages, mask, config=LossConfig())
    out.loss.backward()
    assert out.loss.item() == pytest.approx(math.exp(20) / 2, rel=1e-6)
    assert logprobs.grad is not None
    assert logprobs.grad.abs().max() == 0  # beyond the clamp nothing pulls


def test_clip_fraction_counts_tokens_whose_clipped_branch_is_taken() -> None:
    ratios = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.0]], dtype=torch.float64)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0]], dtype=torch.float64)
    zeros, mask = torch.zeros_like(ratios), torch.ones_like(ratios, dtype=torch.bool)
    out = policy_loss(ratios.log(), zeros, advantages, mask, config=LossConfig())
    assert float(out.metrics["actor/clip_fraction"]) == pytest.approx(2 / 5)
    dual = policy_loss(ratios.log(), zeros, advantages, mask, config=LossConfig(dual_clip=1.4))
    assert float(dual.metrics["actor/clip_fraction"]) == pytest.approx(3 / 5)


def test_importance_sampling_without_proximal_logprobs_is_refused() -> None:
    rows = make_rows(0)
    with pytest.raises(ValueError, match=r"importance_sampling = 'truncate'.*pass proximal_logprobs"):
        policy_loss(rows.logprobs, rows.behaviour, rows.advantages, rows.mask, config=LossConfig(importance_sampling="truncate"))


@pytest.mark.parametrize(("sampling", "kept"), [("truncate", [0.5, 2.0, 2.0, 1.0]), ("mask", [0.5, 2.0, 0.0, 1.0])])
def test_only_weights_above_the_cap_are_cut_and_counted(sampling: str, kept: list[float]) -> None:
    weights = torch.tensor([0.5, 2.0, 2.5, 1.0], dtype=torch.float64)
    proximal = torch.full((4,), -3.0, dtype=torch.float64)
    config = config_of("dapo", importance_sampling=sampling, importance_cap=2.0)
    out = policy_loss(
        proximal,
        proximal - torch.tensor([math.log(w) for w in weights.tolist()], dtype=torch.float64),
        torch.ones(4, dtype=torch.float64),
        torch.ones(4, dtype=torch.bool),
        config=config.model_copy(update={"importance_cap": 2.0 + 1e-12}),
        proximal_logprobs=proximal,
        segment_ids=torch.zeros(4, dtype=torch.long),
    )
    assert out.loss.item() == pytest.approx(-sum(kept) / 4)
    assert out.metrics["mismatch/importance_cut/share"].item() == 0.25
    assert out.metrics["mismatch/importance_weight/mean"].item() == pytest.approx(sum(kept) / 4)


def test_importance_weights_carry_no_gradient() -> None:
    rows = make_rows(0)
    rows.proximal.requires_grad_(True)
    loss_of(rows, LossConfig(importance_sampling="truncate", importance_cap=5.0)).loss.requires_grad_(True)
    logprobs = rows.logprobs.clone().requires_grad_(True)
    out = policy_loss(
        logprobs,
        rows.behaviour,
        rows.advantages,
        rows.mask,
        config=LossConfig(importance_sampling="mask"),
        proximal_logprobs=rows.proximal.detach(),
    )
    out.loss.backward()
    assert rows.proximal.grad is None
    assert logprobs.grad is not None


@pytest.mark.parametrize(
    ("config", "message"),
    [(LossConfig(kl_beta=0.1), "needs ref_logprobs"), (LossConfig(kind="dr_grpo"), "max_completion_tokens, which is unset")],
)
def test_missing_inputs_are_named(config: LossConfig, message: str) -> None:
    rows = make_rows(0)
    with pytest.raises(ValueError, match=message):
        policy_loss(rows.logprobs, rows.behaviour, rows.advantages, rows.mask, config=config)


def test_packed_input_without_segments_is_refused() -> None:
    rows = make_rows(0, batch=1)
    with pytest.raises(ValueError, match="segment_ids"):
        policy_loss(rows.logprobs[0], rows.behaviour[0], rows.advantages[0], rows.mask[0], config=LossConfig())


def test_an_empty_micro_batch_adds_nothing() -> None:
    nothing, none = torch.zeros(0, requires_grad=True), torch.zeros(0, dtype=torch.long)
    out = policy_loss(
        nothing,
        torch.zeros(0),
        torch.zeros(0),
        torch.zeros(0, dtype=torch.bool),
        config=LossConfig(),
        segment_ids=none,
        totals=StepTotals(5, 2),
        rollout_tokens=none,
    )
    assert out.loss.item() == 0
    assert all(float(value) == 0 for value in out.metrics.values())
