"""What the passes cost: memory by rank, and the rehearsal of the longest micro-batches."""

import resource
import sys
import time
from collections.abc import Sequence

import torch

from turnwise.diagnose.probe_report import Memory, Rehearsal
from turnwise.trainer import fsdp
from turnwise.trainer.meter import GIB
from turnwise.trainer.packing import assign
from turnwise.trainer.rehearsal import longest_samples, rehearse
from turnwise.trainer.step import Learner, Passes
from turnwise.transport import Sample

MOST_SECONDS = 30.0  # that a rehearsal may take on a CPU, which the user can foresee from the speed


def computed_tokens(passes: Passes) -> int:
    """Inputs of the passes, over all ranks; a collective."""
    mine = sum(len(batch.input_ids) for batch in passes.micro_batches)
    return int(fsdp.sum_over_ranks(torch.tensor(mine)))


def batch_tokens(learner: Learner, samples: Sequence[Sample]) -> int:
    """The same for other samples, without passes."""
    bins = assign(samples, max_tokens=learner.config.pack_tokens, ranks=fsdp.world_size(), cost=learner.meter.cost)
    return sum(b.tokens for of_rank in bins for b in of_rank)


def memory_by_rank(device: torch.device) -> list[Memory]:
    """What this process took at most since the last reset, of each rank; a collective."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return fsdp.gather(Memory(torch.cuda.max_memory_allocated(device) / GIB, total / GIB))
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss
    import psutil

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return fsdp.gather(Memory(peak / GIB, psutil.virtual_memory().total / GIB))


def rehearse_longest(learner: Learner, tokens_per_s: float) -> Rehearsal:
    """The longest micro-batches, forward and backward; a collective. Left out on a CPU that is too slow for it.

    Args:
        tokens_per_s: inputs, of one rank.

    Raises:
        OutOfMemory: they do not fit.
    """
    config, device = learner.config, learner.device
    budget = config.pack_tokens
    if device.type != "cuda":
        shapes = longest_samples(budget, config.seq_len, vocabulary=1)
        seconds = max(fsdp.gather(len(shapes) * budget / tokens_per_s))
        if seconds > MOST_SECONDS:
            return Rehearsal(
                budget, skipped=f"{len(shapes)} micro-batches of {budget:,} tokens would take {seconds:.0f} s on this CPU"
            )
    began = time.perf_counter()
    rehearse(learner)
    return Rehearsal(budget, time.perf_counter() - began, memory_by_rank(device))
