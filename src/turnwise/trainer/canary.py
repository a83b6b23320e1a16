"""Canaries: a few sequences whose logprobs tell an engine that serves the new policy from one that serves another.

They are taken from the batch that was just trained on, where the step changed the policy most, and measured by the policy's own
forward pass before and after the step. What the orchestrator makes of them is in `turnwise.orchestrator.canary`.
"""

import math
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.distributed.fsdp import FSDPModule

from turnwise.trainer import fsdp
from turnwise.trainer.lora import adapters_off
from turnwise.trainer.packing import pack
from turnwise.trainer.stand_in import stand_in
from turnwise.trainer.step import Learner
from turnwise.transport import Batch, Canary, Sample

MAX_TOKENS = 256  # of one canary: its logits (fp32, 150 MB at a vocabulary of 150,000) fit into what vLLM keeps for sampling
MIN_TOKENS = 32
SHARE = 0.0125  # of a rank's part of the batch: three forward passes, with logits at every token, over it take 2 % of a step
DIGITS = 6  # of a logprob in the announcement: far below the noise of float32

Logprobs = list[list[float]]  # of each sequence's tokens but the first


class Canaries:
    """The canaries of one step: made before it, asked for after it. Both are collectives, and draw no random number."""

    def __init__(self, learner: Learner, batch: Batch) -> None:
        begun = time.perf_counter()
        self.learner = learner
        settings = learner.config.trainer
        noisy = learner.config.inference.noise is not None  # engines compute with another policy on purpose: nobody would ask
        count = 0 if noisy or batch.step % settings.canary_interval else settings.canaries
        windows = choose_windows(batch.samples, count=count, longest=_longest(learner, batch.samples)) if count else []
        self.sequences = [window.ids for window in windows]
        self.advantages = [window.advantages for window in windows]
        self.before = measure(learner, self.sequences)
        self.now: Logprobs = []
        self.seconds = time.perf_counter() - begun  # spent on them so far

    def after(self) -> list[Canary]:
        """The canaries of the policy as it is now. Those with a logprob that is not finite are left out: they show nothing."""
        begun = time.perf_counter()
        self.now = now = measure(self.learner, self.sequences)
        base: Logprobs = [[] for _ in now]
        if self.learner.lora is not None:
            with adapters_off(self.learner.policy):
                base = measure(self.learner, self.sequences)
        canaries = [Canary(*values) for values in zip(self.sequences, now, self.before, base, strict=True)]
        self.seconds += time.perf_counter() - begun
        return [canary for canary in canaries if _finite(canary)]

    def metrics(self) -> dict[str, float]:
        """What they took, and by how much the step made likelier what was rewarded; once `after` was asked.

        That is the change of the logprobs, weighed by advantages: of A * change over |A|, the mean over tokens.
        """
        measured = {"timing/canary_s": self.seconds}
        columns = [[value for row in rows for value in row] for rows in (self.now, self.before)]
        weights = [advantage for advantages in self.advantages for advantage in advantages[1:]]
        total = sum(map(abs, weights))
        if not total or len(columns[0]) != len(weights):
            return measured
        gained = sum(weight * (now - before) for weight, now, before in zip(weights, *columns, strict=True))
        return measured | {"actor/rewarded_logprob_change": gained / total}


@dataclass(frozen=True)
class Window:
    """Part of a sample."""

    ids: list[int]
    advantages: list[float]  # of each token; 0 where none was sampled

    @property
    def push(self) -> float:
        return sum(map(abs, self.advantages))


def choose(samples: Sequence[Sample], *, count: int, longest: int) -> list[list[int]]:
    """The tokens of `choose_windows`."""
    return [window.ids for window in choose_windows(samples, count=count, longest=longest)]


def choose_windows(samples: Sequence[Sample], *, count: int, longest: int) -> list[Window]:
    """At most `count` sequences of at most `longest` tokens, the same for the same samples: where the step pushes hardest.

    A sequence begins where its sample does, or, behind a long prompt, half of its length before the first reply: to a language
    model it is a text like any other. Samples compete by the sum of |advantage| over their sampled tokens inside; one of each
    group is taken.
    """
    best: dict[int, Window] = {}
    for sample in samples:
        first, length = _first(sample), len(sample.token_ids)
        if first == length:
            continue
        begin = max(0, min(first - longest // 2, length - longest))
        inside = slice(begin, begin + longest)
        window = Window(list(sample.token_ids[inside]), list(sample.advantages[inside]))
        if len(window.ids) > 1 and (sample.group_id not in best or window.push > best[sample.group_id].push):
            best[sample.group_id] = window
    ranked = sorted(best.values(), key=lambda window: -window.push)  # stable: equals stay in the order of the batch
    return list({tuple(window.ids[1:]): window for window in ranked[:count]}.values())


def measure(learner: Learner, sequences: Sequence[Sequence[int]]) -> Logprobs:
    """Logprobs (nats, temperature 1) of each sequence's tokens but the first, under the policy as it is; a collective.

    Every rank computes all of them, and none keeps gathered parameters. Compiled layers run uncompiled: shapes like these would
    have them compiled anew.
    """
    if not sequences:
        return []
    found: dict[tuple[int, ...], list[float]] = {}
    (micro_batches,) = pack(
        [stand_in(ids, "canary") for ids in sequences], max_tokens=sum(map(len, sequences)), share_prompts=False
    )
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), evaluating(learner):
        for batch in micro_batches:
            batch = batch.to(learner.device)
            logprobs = learner.policy.stats(batch, temperature=1.0).logprobs
            for segment in range(len(batch.rollout_tokens)):
                inside = batch.segment_ids == segment
                found[tuple(batch.targets[inside].tolist())] = logprobs[inside].double().tolist()
    return [[round(value, DIGITS) for value in found[tuple(ids[1:])]] for ids in sequences]


def _longest(learner: Learner, samples: Sequence[Sample]) -> int:
    """Tokens of one canary, such that they take a small share of the step; an engine needs room for one token more."""
    prompts = {tuple(sample.token_ids[: _first(sample)]) for sample in samples}  # equal ones are computed once
    tokens = sum(map(len, prompts)) + sum(len(sample.token_ids) - _first(sample) for sample in samples)
    affordable = int(SHARE * tokens / fsdp.world_size() / learner.config.trainer.canaries)
    return min(max(affordable, MIN_TOKENS), MAX_TOKENS, learner.config.seq_len - 1)


def _first(sample: Sample) -> int:
    """Index of the first sampled token; the length when there is none."""
    return sample.loss_mask.index(True) if True in sample.loss_mask else len(sample.loss_mask)


@contextmanager
def evaluating(learner: Learner) -> Generator[None]:
    """Without dropout, as engines are, and with parameters sharded again at the end."""
    learner.policy.eval()
    try:
        yield
    finally:
        learner.policy.train()
        if isinstance(learner.policy, FSDPModule):
            learner.policy.reshard()


def _finite(canary: Canary) -> bool:
    return all(math.isfinite(value) for values in (canary.logprobs, canary.before, canary.base) for value in values)
