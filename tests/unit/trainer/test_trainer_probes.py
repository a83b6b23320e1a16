"""Probes of a step: the size of the update beside the weights, what of it is published, what clipping took, what was rewarded."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from support.batches import ConfigOf, make_batch
from turnwise.kernels.mxfp4 import MXFP4Linear
from turnwise.kernels.mxfp4.sharded import ShardedMXFP4Linear
from turnwise.trainer.canary import Canaries
from turnwise.trainer.lora_layer import LoraLinear
from turnwise.trainer.probes import STRIDE, Movement, PublishedChange, weight_norm
from turnwise.trainer.publish import publish
from turnwise.trainer.step import Learner
from turnwise.transport import RunDir, WeightsStore

LORA = {"model": {"lora": {"rank": 4, "alpha": 16}}}


def adapted(learner: Learner) -> list[LoraLinear]:
    return [module for module in learner.policy.modules() if isinstance(module, LoraLinear)]


def merged(learner: Learner) -> list[torch.Tensor]:
    return [(layer.scale * (layer.lora_B.double() @ layer.lora_A.double())).detach() for layer in adapted(learner)]


@pytest.mark.parametrize("updates", [1, 3])
def test_an_adapters_update_is_that_of_the_weights_it_is_added_to(
    config_of: ConfigOf, device: torch.device, updates: int
) -> None:
    learner = Learner(config_of({**LORA, "updates_per_batch": updates}), device)
    layers = adapted(learner)
    assert len(layers) <= 16  # all are looked at
    norm = math.sqrt(sum(float(layer.base.weight.detach().double().square().sum()) for layer in layers))
    for step in (1, 2):  # at the first one B is 0, and A does not move
        before = merged(learner)
        ratio = learner.step(make_batch(step))["actor/update_ratio"]
        moved = math.sqrt(sum(float((new - old).square().sum()) for old, new in zip(before, merged(learner), strict=True)))
        assert ratio == pytest.approx(moved / norm, rel=1e-4)
        assert ratio > 1e-6


def test_all_weights_are_compared_with_their_own_norm(config_of: ConfigOf, device: torch.device) -> None:
    learner = Learner(config_of({"model": {"lora": None}}), device)
    norm = math.sqrt(sum(float(p.detach().double().square().sum()) for p in learner.trained))
    metrics = learner.step(make_batch(1))
    assert metrics["actor/update_ratio"] == pytest.approx(metrics["actor/update_norm"] / norm, rel=1e-9)


def test_a_step_that_changes_nothing_has_a_ratio_of_0(config_of: ConfigOf, device: torch.device) -> None:
    learner = Learner(config_of(LORA), device)
    learner.step(make_batch(1))
    metrics = learner.step(make_batch(2, advantage=0.0))
    assert (metrics["actor/update_ratio"], metrics["actor/grad_clipped/share"]) == (0.0, 0.0)


def test_of_many_layers_a_few_are_looked_at_the_same_ones_every_time(config_of: ConfigOf, device: torch.device) -> None:
    learner = Learner(config_of(LORA), device)
    many = torch.nn.ModuleList(adapted(learner) * 3)
    many = torch.nn.ModuleList(LoraLinear(torch.nn.Linear(8, 8), learner.lora) for _ in many)  # pyright: ignore[reportArgumentType]
    one, other = (Movement(many, [], adapter=True) for _ in range(2))
    assert len(one.layers) == 16 < len(many)
    assert [id(layer) for layer in one.layers] == [id(layer) for layer in other.layers]


def test_packed_weights_count_by_their_values_and_without_weights_there_is_no_ratio(
    config_of: ConfigOf, device: torch.device
) -> None:
    learner = Learner(config_of(LORA), device)
    layer = adapted(learner)[0]
    plain = weight_norm(layer)
    packed = MXFP4Linear.from_linear(layer.base)  # pyright: ignore[reportArgumentType]
    for layer.base in (packed, ShardedMXFP4Linear(packed, ranks=3)):  # with rows of zeros
        assert weight_norm(layer) == pytest.approx(float(packed.dequantize(torch.float32).norm()), rel=1e-6)
        assert weight_norm(layer) == pytest.approx(plain, rel=0.05)
    assert Movement(torch.nn.Linear(2, 2), [], adapter=True).ratio(1.0) is None
    assert Movement(torch.nn.Linear(2, 2), [], adapter=False).ratio(1.0) is None


@pytest.mark.parametrize(("largest", "share"), [(1e-3, None), (1e3, 0.0), (None, 0.0)])
def test_the_share_of_the_gradient_that_clipping_takes(
    config_of: ConfigOf, device: torch.device, largest: float | None, share: float | None
) -> None:
    metrics = Learner(config_of({"optim": {"lr": 1e-3, "max_grad_norm": largest}}), device).step(make_batch(1))
    expected = 1 - 1e-3 / metrics["actor/grad_norm"] if share is None else share
    assert metrics["actor/grad_clipped/share"] == pytest.approx(expected)


def test_published_elements_are_compared_with_those_before() -> None:
    change = PublishedChange()
    first = torch.arange(10 * STRIDE, dtype=torch.bfloat16)
    change.see(first)
    assert change.metrics() == {}
    first[: 3 * STRIDE] += 1000  # what was seen is kept, whatever becomes of the tensor
    change.see(first)
    assert change.metrics() == {"actor/published_change/share": 0.3}
    change.see(first)
    assert change.metrics() == {"actor/published_change/share": 0.0}
    change.see(torch.ones(3))
    assert change.metrics() == {}


@pytest.mark.parametrize(
    ("model", "rate", "lowest", "highest"),
    [
        ({"lora": None}, 1e-3, 0.5, 1.0),
        ({"lora": None}, 1e-7, 0.0, 0.05),  # far below half a step of bfloat16
        ({"lora": {"rank": 8}}, 1e-4, 0.4, 1.0),  # A's gradient is 0 at the first step
    ],
)
def test_an_announcement_says_how_much_of_a_step_was_published(
    config_of: ConfigOf, device: torch.device, model: dict[str, Any], rate: float, lowest: float, highest: float
) -> None:
    config = config_of({"model": model, "optim": {"lr": rate}})
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    learner, store = Learner(config, device), WeightsStore(RunDir(config.output_dir).weights)
    publish(learner, store, 0, {}, keep=9)
    learner.step(make_batch(1))
    publish(learner, store, 1, {"actor/loss": 0.5}, keep=9)
    first, second = store.poll(0), store.poll(1)
    assert first is not None
    assert second is not None
    assert first.metrics == {}
    assert second.metrics["actor/loss"] == 0.5
    assert lowest <= second.metrics["actor/published_change/share"] <= highest


def test_a_step_makes_what_was_rewarded_likelier_by_what_the_canaries_show(config_of: ConfigOf, device: torch.device) -> None:
    learner, batch = Learner(config_of(LORA), device), make_batch(1)
    canaries = Canaries(learner, batch)
    assert "actor/rewarded_logprob_change" not in canaries.metrics()
    learner.step(batch)
    found = canaries.after()
    total = gained = 0.0
    for canary in found:
        (advantages,) = [
            sample.advantages[at : at + len(canary.token_ids)]
            for sample in batch.samples
            for at in range(len(sample.token_ids))
            if sample.token_ids[at : at + len(canary.token_ids)] == canary.token_ids
        ]
        for advantage, now, before in zip(advantages[1:], canary.logprobs, canary.before, strict=True):
            gained += advantage * (now - before)
            total += abs(advantage)
    change = canaries.metrics()["actor/rewarded_logprob_change"]
    assert change == pytest.approx(gained / total)
    assert change > 0


def test_canaries_without_an_advantage_show_no_reward(config_of: ConfigOf, device: torch.device, tmp_path: Path) -> None:
    canaries = Canaries(Learner(config_of(LORA), device), make_batch(1, advantage=0.0))
    canaries.after()
    assert canaries.metrics().keys() == {"timing/canary_s"}
