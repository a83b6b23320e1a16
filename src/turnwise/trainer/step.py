"""One step of training: a batch of samples in, new parameters and the step's metrics out."""

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from turnwise.config import LossConfig, RLConfig
from turnwise.trainer import fsdp
from turnwise.trainer.adamw import AdamW
from turnwise.trainer.lora import adapters_off
from turnwise.trainer.loss import MAX_LOG_RATIO, StepTotals, policy_loss
from turnwise.trainer.meter import Meter
from turnwise.trainer.model import Policy, build_policy, build_reference
from turnwise.trainer.optim import clip_gradients, distance, gradient_norm, learning_rate, norm_over_ranks, snapshot
from turnwise.trainer.packing import MicroBatch, assign, step_totals
from turnwise.trainer.probes import Movement, PublishedChange
from turnwise.transport import Batch

Metrics = dict[str, float]
LARGEST = ("mismatch/logprob_abs/max", "mismatch/sequence_kl/max")  # metrics that are maxima


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
        self.fake_quant, self.notes = loaded.fake_quant, loaded.notes
        self.parameters = self.policy.trainable()
        self.trained = list(self.parameters.values())
        self.optimizer = AdamW(self.trained, config.trainer.optim)
        needs_copy = config.trainer.loss.kl_beta > 0 and self.lora is None
        self.reference = build_reference(config, device) if needs_copy else None
        self.meter = Meter(loaded, device)
        self.movement = Movement(self.policy, self.trained, adapter=self.lora is not None)
        self.published = PublishedChange()

    def step(self, batch: Batch) -> Metrics:
        """Train on a batch; a collective. Returns the same metrics on every rank; what it took is in `meter`.

        A batch without a sampled token, a gradient of exactly 0 and one that is not finite leave the parameters as they are:
        AdamW would move them by its momentum alone.
        """
        self.meter.begin()
        metrics: Metrics = {"actor/lr": self.set_learning_rate(batch.step)}
        if not any(any(sample.loss_mask) for sample in batch.samples):
            return metrics | {"actor/loss": 0.0, "actor/grad_norm": 0.0, "actor/update_norm": 0.0, "actor/updates_skipped": 1.0}
        passes = self.passes(batch)
        start = self.starting_point()
        self.movement.begin()
        moved, skipped = 0.0, 0
        for index in range(self.config.trainer.updates_per_batch):
            with self.meter.phase("forward_backward"):
                metrics |= passes.backward(first=index == 0)
            self.meter.count(passes.micro_batches)
            with self.meter.phase("optimizer"):
                metrics["actor/grad_norm"] = norm = self.reduce_gradients()
                done = self.apply_gradients(norm)
                self.optimizer.zero_grad()
                moved = norm_over_ranks(done, fsdp.copies(self.trained[0])) if done is not None else 0.0
            skipped += done is None
        metrics["actor/update_norm"] = moved if start is None else distance(start, self.trained)
        metrics["actor/updates_skipped"] = float(skipped)
        return metrics | self._proportions(metrics)

    def _proportions(self, metrics: Metrics) -> Metrics:
        """What clipping took from the gradient, and the size of the update beside the weights; a collective."""
        norm, most = metrics["actor/grad_norm"], self.config.trainer.optim.max_grad_norm
        cut = most is not None and math.isfinite(norm) and norm > most
        found = {"actor/grad_clipped/share": 1 - most / norm if cut and most is not None else 0.0}
        ratio = self.movement.ratio(metrics["actor/update_norm"])
        return found if ratio is None else found | {"actor/update_ratio": ratio}

    def passes(self, batch: Batch) -> "Passes":
        """This rank's micro-batches of a batch, with the log-probabilities of the reference policy; a collective."""
        bins = assign(batch.samples, max_tokens=self.config.pack_tokens, ranks=fsdp.world_size(), cost=self.meter.cost)
        micro_batches = [b.micro_batch().to(self.device) for b in bins[fsdp.rank()]]
        return Passes(self, batch, micro_batches, step_totals(batch.samples))

    def starting_point(self) -> list[Tensor] | None:
        """What several updates are measured against; a single one measures itself."""
        return snapshot(self.trained) if self.config.trainer.updates_per_batch > 1 else None

    def set_learning_rate(self, step: int) -> float:
        """Make the learning rate that of a step, counted from 1, and return it."""
        self.optimizer.lr = learning_rate(self.config.trainer.optim, step, self.config.max_steps)
        return self.optimizer.lr

    def reduce_gradients(self) -> float:
        """After the backward passes: sum the gradients over ranks where FSDP2 has not; returns their norm. A collective."""
        if fsdp.world_size() > 1 and not isinstance(self.policy, FSDPModule):
            fsdp.reduce_gradients(self.trained)
        return gradient_norm(self.trained)

    def apply_gradients(self, norm: float) -> Tensor | None:
        """Clip and apply the gradients, whose global norm this is; they stay until `optimizer.zero_grad`.

        Returns:
            The squared norm of this rank's part of the change; None when a norm of 0, or one that is not finite, forbids it.
        """
        if not math.isfinite(norm) or norm == 0:
            return None
        clip_gradients(self.trained, norm, self.config.trainer.optim.max_grad_norm)
        return self.optimizer.step()

    def save_tokenizer(self, folder: Path) -> None:
        """Put the tokenizer beside published weights, so that the folder is a complete model."""
        for name, content in self._tokenizer_files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)  # some have a folder of further chat templates
            (folder / name).write_bytes(content)

    @cached_property
    def _tokenizer_files(self) -> dict[Path, bytes]:
        """By name: each version of whole weights gets them, and reading a tokenizer of 150,000 tokens takes half a second."""
        from transformers import AutoTokenizer

        with TemporaryDirectory() as scratch:
            AutoTokenizer.from_pretrained(self.config.model.name).save_pretrained(scratch)
            return {path.relative_to(scratch): path.read_bytes() for path in Path(scratch).rglob("*") if path.is_file()}


class Passes:
    """Forward and backward passes over micro-batches, with the log-probabilities that are fixed during the step.

    The proximal ones cost nothing: the first update's own forward pass runs on the parameters from before it.
    """

    def __init__(self, learner: Learner, batch: Batch, micro_batches: Sequence[MicroBatch], totals: StepTotals) -> None:
        self.learner = learner
        self.temperature = batch.temperature
        self.loss_config = _resolve(learner.config.trainer.loss, batch)
        self.micro_batches = micro_batches
        self.totals = totals
        self.keeps_proximal = _ratios_are_proximal(learner.config)
        self.proximal: dict[int, Tensor] = {}  # by micro-batch
        self.reference = self._reference_pass() if self.loss_config.kl_beta > 0 else None

    def _reference_pass(self) -> list[Tensor]:
        if self.learner.reference is not None:
            return self._logprobs(self.learner.reference)
        with adapters_off(self.learner.policy):
            return self._logprobs(self.learner.policy)

    def _logprobs(self, policy: Policy) -> list[Tensor]:
        with torch.no_grad():
            return [policy.stats(batch, temperature=self.temperature).logprobs for batch in self.micro_batches]

    def backward(self, *, first: bool) -> Metrics:
        """Gradients of the whole step, accumulated; metrics over all ranks. `first`: parameters are still those of the batch."""
        sums: dict[str, Tensor] = {}
        largest = torch.zeros(len(LARGEST), dtype=torch.float64, device=self.learner.device)
        for index, batch in enumerate(self.micro_batches):
            # adapters are small: their gradients are kept whole and reduced once
            fsdp.accumulate(self.learner.policy, last=index == len(self.micro_batches) - 1, whole=self.learner.lora is not None)
            loss, shares, difference = self.loss(index, batch, first=first)
            loss.backward()
            del loss  # with its graph, before the next forward pass
            if first:
                shares |= _mismatch(difference, self.totals)
                largest = torch.maximum(largest, _largest_mismatch(difference, batch))
            for name, value in shares.items():
                sums[name] = sums[name] + value.double() if name in sums else value.double()
        names = sorted(sums)
        totals = fsdp.sum_over_ranks(torch.stack([sums[name] for name in names]).cpu()).tolist()
        metrics = dict(zip(names, totals, strict=True))
        if first:
            metrics |= dict(zip(LARGEST, fsdp.max_over_ranks(largest.cpu()).tolist(), strict=True))
        return metrics

    def loss(self, index: int, batch: MicroBatch, *, first: bool) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Loss of one micro-batch, its shares of the metrics, and its logprobs less those of the engine."""
        coefficient = self.loss_config.entropy_coef
        stats = self.learner.policy.stats(batch, temperature=self.temperature, entropy_grad=coefficient > 0)
        if first and self.keeps_proximal:
            self.proximal[index] = stats.logprobs.detach()
        output = policy_loss(
            stats.logprobs,
            batch.behaviour_logprobs.to(stats.logprobs.dtype),
            batch.advantages.to(stats.logprobs.dtype),
            torch.ones_like(batch.targets, dtype=torch.bool),
            config=self.loss_config,
            ref_logprobs=None if self.reference is None else self.reference[index],
            proximal_logprobs=self.proximal.get(index),
            segment_ids=batch.segment_ids,
            totals=self.totals,
            rollout_tokens=batch.rollout_tokens,
        )
        entropy = stats.entropy.sum() / self.totals.tokens
        loss = output.loss - coefficient * entropy if coefficient > 0 else output.loss
        shares = output.metrics | {"actor/loss": loss.detach(), "actor/entropy": entropy.detach()}
        return loss, shares, stats.logprobs.detach() - batch.behaviour_logprobs


def _ratios_are_proximal(config: RLConfig) -> bool:
    """Whether ratios are taken against the trainer's own log-probabilities, and not against those of the engine."""
    chosen = config.trainer.loss.old_logprobs
    if chosen != "auto":
        return chosen == "proximal"
    noisy = config.inference.noise is not None  # ratios against a policy with noise would take back a part of its exploration
    return noisy or config.trainer.updates_per_batch > 1 or config.trainer.loss.importance_sampling != "none"


def _resolve(config: LossConfig, batch: Batch) -> LossConfig:
    """`max_completion_tokens` of the rollouts where the configuration leaves it open."""
    if config.max_completion_tokens is not None or batch.max_completion_tokens < 1:
        return config
    return config.model_copy(update={"max_completion_tokens": batch.max_completion_tokens})


def _mismatch(difference: Tensor, totals: StepTotals) -> dict[str, Tensor]:
    """Trainer minus engine, before the first update: what the two disagree about."""
    return {
        "mismatch/logprob_abs/mean": difference.abs().sum() / totals.tokens,
        "mismatch/kl/mean": _kl(difference).sum() / totals.tokens,
    }


def _largest_mismatch(difference: Tensor, batch: MicroBatch) -> Tensor:
    """Of a token, and of a sample's mean: the values of `LARGEST`."""
    if not len(difference):
        return torch.zeros(len(LARGEST), dtype=torch.float64, device=difference.device)
    kl = _kl(difference)
    zeros = kl.new_zeros(len(batch.rollout_tokens))
    sums, counts = (zeros.index_add(0, batch.segment_ids, values) for values in (kl, torch.ones_like(kl)))
    return torch.stack([difference.abs().max().double(), (sums / counts).max()])


def _kl(difference: Tensor) -> Tensor:
    """Estimate of KL(engine || trainer) from tokens of the engine (k3), in float64: in float32 it drowns below 1e-7."""
    clamped = difference.double().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return clamped.exp() - clamped - 1


def signal_share(batch: Batch) -> float:
    """Share of samples with an advantage that is not 0."""
    samples: Sequence[bool] = [any(sample.advantages) for sample in batch.samples]
    return sum(samples) / len(samples) if samples else 0.0
