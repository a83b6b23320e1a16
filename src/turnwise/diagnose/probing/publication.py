"""Versions 0 and 1 as engines can load them, published by the trainer's own code, with canaries."""

import time
from collections.abc import Sequence

from turnwise.diagnose.probe_report import Published
from turnwise.trainer import fsdp
from turnwise.trainer.canary import Logprobs, choose, measure
from turnwise.trainer.lora import adapters_off
from turnwise.trainer.publish import publish
from turnwise.trainer.step import Learner
from turnwise.transport import Batch, Canary, RunDir, WeightsStore

CANARIES, CANARY_TOKENS = 4, 128  # enough blocks for the statistics of the canary alarm
KEEP = 100  # versions: all


class Publisher:
    """Publishes the policy as it becomes; every call is a collective.

    Full weights travel as files here, whatever `trainer.weight_transfer` says: a broadcast needs engines that wait for it.
    """

    def __init__(self, learner: Learner, batch: Batch) -> None:
        self.learner = learner
        self.store = WeightsStore(RunDir(learner.config.output_dir).weights)
        longest = min(CANARY_TOKENS, learner.config.seq_len - 1)
        self.sequences: Sequence[list[int]] = choose(batch.samples, count=CANARIES, longest=longest)
        self.before: Logprobs = measure(learner, self.sequences)  # of version 0, which the policy still is

    def first(self) -> None:
        """Version 0, where it is an adapter; full weights of that version are those that engines start with."""
        if self.learner.lora is not None:
            publish(self.learner, self.store, 0, {}, keep=KEEP)

    def next(self, factor: float) -> Published | None:
        """The policy as it is now, as version 1; None but on rank 0.

        Args:
            factor: what is told of it.
        """
        began = time.perf_counter()
        now = measure(self.learner, self.sequences)
        base: Logprobs = [[] for _ in now]
        if self.learner.lora is not None:
            with adapters_off(self.learner.policy):
                base = measure(self.learner, self.sequences)
        canaries = [Canary(*values) for values in zip(self.sequences, now, self.before, base, strict=True)]
        publish(self.learner, self.store, 1, {}, keep=KEEP, canaries=canaries)
        ready = self.store.poll(1) if fsdp.rank() == 0 else None
        return None if ready is None else Published(ready, factor, time.perf_counter() - began)
