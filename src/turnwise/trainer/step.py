"""One step of training: a batch of samples in, new parameters and the step's metrics out."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from turnwise.config import LossConfig, RLConfig
from turnwise.trainer import fsdp
from turnwise.trainer.lora import adapters_off
from turnwise.trainer.loss import StepTotals, policy_loss
from turnwise.trainer.model import Policy, build_policy, build_reference
from turnwise.trainer.optim import clip_gradients, gradient_norm, learning_rate, make_optimizer, snapshot, update_norm
from turnwise.trainer.packing import MicroBatch, pack, step_totals
from turnwise.transport import Batch

Metrics = dict[str, float]


class Learner:
    """The policy with its optimiser, on this rank."""

    def __init__(self, config: RLConfig, device: torch.device) -> None:
        """Load and, with several processes, shard; a collective.

        Raises:
            ModelError, ValueError: as `build_policy`.
        """
        self.config = config
        self.device = device
        self.lora = config.trainer.model.lora
        loaded = build_policy(config, device)
        self.policy, self.dtype = loaded.policy, loaded.dtype
        self.parameters = self.policy.trainable()
        self.optimizer = make_optimizer(self.parameters, config.trainer.optim)
        needs_copy = config.trainer.loss.kl_beta > 0 and self.lora is None
        self.reference = build_reference(config, device) if needs_copy else None

    def step(self, batch: Batch) -> Metrics:
        """Train on a batch; a collective. Returns the same metrics on every rank.

        A batch without a sampled token, a gradient of exactly 0 and one that is not finite leave the parameters as they are:
        AdamW would move them by its momentum alone.
        """
        metrics: Metrics = {"actor/lr": self._set_learning_rate(batch.step)}
        if not any(any(sample.loss_mask) for sample in batch.samples):
            return metrics | {"actor/loss": 0.0, "actor/grad_norm": 0.0, "actor/update_norm": 0.0, "actor/updates_skipped": 1.0}
        work = _Work(self, batch)
        before = snapshot(self.parameters)
        skipped = 0
        for index in range(self.config.trainer.updates_per_batch):
            measured = work.backward(first=index == 0)
            measured["actor/grad_norm"], done = self._update()
            skipped += not done
            metrics |= measured
        metrics["actor/update_norm"] = update_norm(before, self.parameters)
        metrics["actor/updates_skipped"] = float(skipped)
        return metrics

    def _set_learning_rate(self, step: int) -> float:
        rate = learning_rate(self.config.trainer.optim, step, self.config.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _update(self) -> tuple[float, bool]:
        """Clip and apply the gradients; returns their norm before clipping, and whether they were applied."""
        if fsdp.world_size() > 1 and not isinstance(self.policy, FSDPModule):
            fsdp.reduce_gradients(list(self.parameters.values()))
        norm = gradient_norm(self.parameters.values())
        usable = math.isfinite(norm) and norm > 0
        if usable:
            clip_gradients(self.parameters.values(), norm, self.config.trainer.optim.max_grad_norm)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, usable

    def save_tokenizer(self, folder: Path) -> None:
        """Put the tokenizer beside published weights, so that the folder is a complete model."""
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(self.config.model.name).save_pretrained(folder)


class _Work:
    """The micro-batches of one batch on this rank, with the log-probabilities that are fixed during the step."""

    def __init__(self, learner: Learner, batch: Batch) -> None:
        self.learner = learner
        self.temperature = batch.temperature
        self.loss_config = _resolve(learner.config.trainer.loss, batch)
        self.totals: StepTotals = step_totals(batch.samples)
        budget = learner.config.trainer.micro_batch_tokens or learner.config.seq_len
        packed = pack(batch.samples, max_tokens=budget, ranks=fsdp.world_size())
        self.micro_batches = [micro_batch.to(learner.device) for micro_batch in packed[fsdp.rank()]]
        many_updates = learner.config.trainer.updates_per_batch > 1
        self.proximal = self._pass(learner.policy) if many_updates or self.loss_config.importance_sampling != "none" else None
        self.reference = self._reference_pass() if self.loss_config.kl_beta > 0 else None

    def _pass(self, policy: Policy) -> list[Tensor]:
        with torch.no_grad():
            return [policy.stats(batch, temperature=self.temperature).logprobs for batch in self.micro_batches]

    def _reference_pass(self) -> list[Tensor]:
        if self.learner.reference is not None:
            return self._pass(self.learner.reference)
        with adapters_off(self.learner.policy):
            return self._pass(self.learner.policy)

    def backward(self, *, first: bool) -> Metrics:
        """Gradients of the whole step, accumulated; metrics over all ranks. `first`: parameters are still those of the batch."""
        sums: dict[str, Tensor] = {}
        largest = torch.zeros((), dtype=torch.float64)
        for index, batch in enumerate(self.micro_batches):
            with self._sync_at_last(index):
                contributions, difference = self._backward_one(index, batch, first=first)
            for name, value in contributions.items():
                sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + value.double().cpu()
            largest = torch.maximum(largest, difference.double().cpu())
        names = sorted(sums)
        totals = fsdp.sum_over_ranks(torch.stack([sums[name] for name in names])).tolist()
        metrics = dict(zip(names, totals, strict=True))
        if first:
            metrics["mismatch/logprob_abs/max"] = float(fsdp.max_over_ranks(largest))
        return metrics

    def _backward_one(self, index: int, batch: MicroBatch, *, first: bool) -> tuple[dict[str, Tensor], Tensor]:
        """Backward pass of one micro-batch; its shares of the metrics, and its largest mismatch."""
        coefficient = self.loss_config.entropy_coef
        stats = self.learner.policy.stats(batch, temperature=self.temperature, entropy_grad=coefficient > 0)
        output = policy_loss(
            stats.logprobs,
            batch.behaviour_logprobs.to(stats.logprobs.dtype),
            batch.advantages.to(stats.logprobs.dtype),
            torch.ones_like(batch.targets, dtype=torch.bool),
            config=self.loss_config,
            ref_logprobs=None if self.reference is None else self.reference[index],
            proximal_logprobs=None if self.proximal is None else self.proximal[index],
            segment_ids=batch.segment_ids,
            totals=self.totals,
            rollout_tokens=batch.rollout_tokens,
        )
        entropy = stats.entropy.sum() / self.totals.tokens
        loss = output.loss - coefficient * entropy if coefficient > 0 else output.loss
        loss.backward()
        shares = output.metrics | {"actor/loss": loss.detach(), "actor/entropy": entropy.detach()}
        difference = stats.logprobs.detach() - batch.behaviour_logprobs
        if first:
            shares |= _mismatch(difference, self.totals)
        return shares, difference.abs().max() if len(difference) else torch.zeros(())

    def _sync_at_last(self, index: int) -> AbstractContextManager[None]:
        """Adapters are small: their gradients are kept whole and reduced once, at the last micro-batch."""
        policy = self.learner.policy
        if isinstance(policy, FSDPModule) and self.learner.lora is not None:
            policy.set_requires_gradient_sync(index == len(self.micro_batches) - 1)
        return nullcontext()


def _resolve(config: LossConfig, batch: Batch) -> LossConfig:
    """`max_completion_tokens` of the rollouts where the configuration leaves it open."""
    if config.max_completion_tokens is not None or batch.max_completion_tokens < 1:
        return config
    return config.model_copy(update={"max_completion_tokens": batch.max_completion_tokens})


def _mismatch(difference: Tensor, totals: StepTotals) -> dict[str, Tensor]:
    """Trainer minus engine, before the first update: what the two disagree about."""
    return {
        "mismatch/logprob_abs/mean": difference.abs().sum() / totals.tokens,
        "mismatch/kl/mean": (difference.exp() - difference - 1).sum() / totals.tokens,
    }


def signal_share(batch: Batch) -> float:
    """Share of samples with an advantage that is not 0."""
    samples: Sequence[bool] = [any(sample.advantages) for sample in batch.samples]
    return sum(samples) / len(samples) if samples else 0.0
