"""Before the first step: the longest micro-batches that there can be, forward and backward; so memory runs out then or never.

No later micro-batch holds more tokens, a longer segment, more positions with logits or more keys for attention than those here,
and gradients and moments are there as in a step. An update needs less than the activations that are gone by then.
"""

import re
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch

from turnwise.config import RLConfig
from turnwise.trainer import fsdp
from turnwise.trainer.meter import GIB, peak_memory_gib
from turnwise.trainer.packing import MAX_REACH, MIN_SHARED_PROMPT, MicroBatch, pack, step_totals
from turnwise.trainer.stand_in import stand_in
from turnwise.trainer.step import Learner, Passes
from turnwise.transport import Batch, Progress, Sample

CHILDREN = 64  # of the shared prompt: all but a twentieth of the tokens then have logits
CPU_ALLOCATION_FAILED = "can't allocate memory"  # how PyTorch's CPU allocator says it, in a plain RuntimeError


class OutOfMemory(Exception):
    """A process ran out of memory. The message is complete: it is printed as it stands, without a traceback."""


def wanted(config: RLConfig) -> bool:
    """Whether to rehearse: as `trainer.rehearse` says, and when it says nothing, on GPUs."""
    chosen = config.trainer.rehearse
    return bool(config.gpus.trainer) if chosen is None else chosen


def rehearse(learner: Learner) -> str:
    """Run the longest micro-batches; a collective. Returns a line for the log.

    Gradients are thrown away. Parameters, moments and random states are to the bit as before.

    Raises:
        OutOfMemory: they do not fit.
    """
    config, device = learner.config, learner.device
    learner.meter.begin()
    begun = time.perf_counter()
    budget = config.pack_tokens
    shapes = longest_samples(budget, config.seq_len, vocabulary=_vocabulary(learner))
    with (
        explained(config, device, f"in the rehearsal of a micro-batch of {budget:,} tokens"),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        micro_batches = [_micro_batch(samples, budget, device) for samples in shapes]
        batch = _batch([sample for samples in shapes for sample in samples], config.seq_len)
        start = learner.starting_point()
        passes = Passes(learner, batch, micro_batches, step_totals(batch.samples))
        passes.backward(first=True)
        del start
    learner.optimizer.zero_grad()
    tokens = max(len(micro_batch.input_ids) for micro_batch in micro_batches)
    line = f"rehearsed {tokens:,} tokens in {time.perf_counter() - begun:.1f} s"
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory / GIB
        line += f", peak {peak_memory_gib(device):.1f} GiB of {total:.1f}"
    return line


def longest_samples(budget: int, seq_len: int, *, vocabulary: int) -> list[list[Sample]]:
    """Samples of each micro-batch: one of the longest; as many as fit; and many that share a prompt, for the most keys.

    The largest comes last, when gradients are there already.

    Args:
        budget: tokens of a micro-batch.
        seq_len: most tokens of a sample; its last one is no input.
        vocabulary: tokens that the model knows.
    """
    inputs = seq_len - 1
    count, rest = divmod(budget, inputs)
    alone = [_sample(0, inputs, vocabulary)]
    packed = alone * count + [_sample(0, rest, vocabulary)] * (rest > 0)
    prompt, own, children = sharing(budget, inputs)
    shared = [_sample(prompt, own, vocabulary)] * children
    whole = {0: [alone], 1: [packed]}.get(count, [alone, packed])  # a sample beyond the budget has a micro-batch to itself
    return [shared, *whole] if shared else whole


def sharing(budget: int, inputs: int) -> tuple[int, int, int]:
    """A prompt, tokens behind it, and how often, that fill a micro-batch and make up all the reach that it may have.

    From prompt + children * own = budget and children * (prompt + own) = MAX_REACH * budget. The more children, the more of the
    tokens have logits; but a prompt must be long enough to be shared, and short enough for a sample. Zeros where none is.
    """
    few = -(-MAX_REACH * budget // inputs)
    many = (MAX_REACH - 1) * budget // MIN_SHARED_PROMPT + 1
    children = min(max(few, CHILDREN), many)
    prompt = (MAX_REACH - 1) * budget // (children - 1) if children > 1 else 0
    own = (budget - prompt) // children
    fits = own >= 1 and prompt >= MIN_SHARED_PROMPT and prompt + own <= inputs
    return (prompt, own, children) if fits else (0, 0, 0)


@contextmanager
def explained(config: RLConfig, device: torch.device, doing: str) -> Generator[None]:
    """Turn what PyTorch says when memory runs out in the body into `OutOfMemory`, with what to change."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(_message(config, device, doing, str(error))) from error
    except RuntimeError as error:
        if CPU_ALLOCATION_FAILED not in str(error):
            raise
        raise OutOfMemory(_message(config, device, doing, str(error))) from error


def _message(config: RLConfig, device: torch.device, doing: str, original: str) -> str:
    asked = re.search(r"tried to allocate ([\d.]+ \w+)", original, re.IGNORECASE)
    wanted_more = f", and {asked[1]} more were asked for" if asked else ""
    return (
        f"out of memory {doing}: {_taken(device)}{wanted_more}. "
        f"These settings decide: {', '.join(_settings(config))}. What helps: {'; '.join(_remedies(config))}."
    )


def _taken(device: torch.device) -> str:
    if device.type != "cuda":
        return "the CPU's memory is full"
    free, total = (value / GIB for value in torch.cuda.mem_get_info(device))
    mine, reserved = torch.cuda.memory_allocated(device) / GIB, torch.cuda.memory_reserved(device) / GIB
    return (
        f"of the {total:.1f} GiB of {torch.cuda.get_device_name(device)} (local rank {device.index}) this process's tensors take "
        f"{mine:.1f}, other processes and libraries {max(0.0, total - free - reserved):.1f}"
    )


def _settings(config: RLConfig) -> list[str]:
    trainer, model = config.trainer, config.trainer.model
    budget = trainer.micro_batch_tokens
    processes = fsdp.world_size()
    return [
        f"trainer.micro_batch_tokens = {budget}" if budget else "trainer.micro_batch_tokens unset (seq_len)",
        f"seq_len = {config.seq_len}",
        f"trainer.model.gradient_checkpointing = {_toml(model.gradient_checkpointing)}"
        + (f' of scope "{model.checkpoint_scope}"' if model.gradient_checkpointing else ""),
        f"trainer.model.lora.rank = {model.lora.rank}" if model.lora else "trainer.model.lora unset (all parameters are trained)",
        f"trainer.model.shard = {_toml(model.shard)} over {processes} process{'es' if processes > 1 else ''}",
    ]


def _remedies(config: RLConfig) -> list[str]:
    """What is left to do, the cheapest first."""
    trainer, model, several = config.trainer, config.trainer.model, fsdp.world_size() > 1
    found: list[str] = []
    if trainer.micro_batch_tokens and trainer.micro_batch_tokens > config.seq_len:
        found.append(f"trainer.micro_batch_tokens = {config.seq_len}")
    if not model.shard and several:
        found.append("trainer.model.shard = true")
    if model.shard and several and fsdp.meshes().replicas > 1:
        found.append("trainer.model.replicas = 1, which shards over all processes")
    if not model.gradient_checkpointing:
        found.append("trainer.model.gradient_checkpointing = true")
    elif model.checkpoint_scope != "layer":
        found.append('trainer.model.checkpoint_scope = "layer"')
    if model.lora is None and not trainer.optim.offload:
        found.append("trainer.optim.offload = true")
    if model.lora is None and trainer.loss.kl_beta > 0:
        found.append("trainer.loss.kl_beta = 0, which needs no copy of the model")
    if config.gpus.shared:
        found.append("a smaller gpus.inference_memory")
    if config.gpus.trainer:
        found.append("more GPUs in gpus.trainer, over which the model is sharded")
    found.append(f"a seq_len below {config.seq_len}")
    if model.lora is None:
        found.append("an adapter (trainer.model.lora.rank = 16)")
    return found


def _toml(value: bool) -> str:
    return str(value).lower()


def _vocabulary(learner: Learner) -> int:
    return int(learner.policy.model.config.get_text_config().vocab_size)


def _micro_batch(samples: Sequence[Sample], budget: int, device: torch.device) -> MicroBatch:
    ((micro_batch,),) = pack(samples, max_tokens=budget)
    return micro_batch.to(device)


def _sample(prompt: int, own: int, vocabulary: int) -> Sample:
    """A sample with `own` inputs behind a prompt that may be shared, each of which predicts a sampled token."""
    ids = [i % vocabulary for i in range(prompt + own + 1)]
    return stand_in(ids, "rehearsal", prompt=prompt + 1, logprob=-1.0, advantage=1.0)


def _batch(samples: list[Sample], seq_len: int) -> Batch:
    return Batch(
        step=0,
        samples=samples,
        rollout_ids=[sample.rollout_id for sample in samples],
        num_rollouts=len(samples),
        temperature=1.0,
        progress=Progress(),
        max_completion_tokens=seq_len,
    )
