"""Rules between tables: contradictions and impossible arithmetic, each found before anything starts."""

from collections import Counter
from collections.abc import Iterator
from typing import cast

from turnwise.config.problems import Problem
from turnwise.config.root import RLConfig
from turnwise.config.trainer_rules import TRAINER_RULES, Rule

MAX_PORT = 65535


def broken_rules(config: RLConfig) -> list[Problem]:
    """Every rule that a configuration breaks; empty when it can run."""
    return [problem for rule in RULES for problem in rule(config)]


def _length(config: RLConfig) -> Iterator[Problem]:
    if config.max_steps is None and config.epochs is None:
        yield Problem(("max_steps", "epochs"), "max_steps is not set; set max_steps, or epochs instead.")
    if config.max_steps is not None and config.epochs is not None:
        yield Problem(
            ("max_steps", "epochs"),
            f"max_steps = {config.max_steps} and epochs = {config.epochs:g} "
            "are both set, and one follows from the other; remove one.",
        )


def _environments(config: RLConfig) -> Iterator[Problem]:
    if not config.orchestrator.env:
        yield Problem(
            ("orchestrator.env",),
            'orchestrator.env is empty: there is nothing to learn; add a table [[orchestrator.env]] with id = "wordle".',
        )


def _groups(config: RLConfig) -> Iterator[Problem]:
    batch, group = config.orchestrator.batch_size, config.orchestrator.rollouts_per_example
    if batch % group == 0:
        return
    below, above = batch // group * group, (batch // group + 1) * group
    remedy = f"{below} or {above}" if below else str(above)
    yield Problem(
        ("orchestrator.batch_size", "orchestrator.rollouts_per_example"),
        f"orchestrator.batch_size = {batch} is not a multiple of rollouts_per_example = {group}; use {remedy}.",
    )


def _gpu_lists(config: RLConfig) -> Iterator[Problem]:
    owners: dict[int, list[str]] = {}
    for part in ("inference", "trainer", "containers"):
        gpus: list[int] = getattr(config.gpus, part)
        for gpu, times in Counter(gpus).items():
            owners.setdefault(gpu, []).append(part)
            if times > 1:
                yield Problem((f"gpus.{part}",), f"gpus.{part} = {gpus} names GPU {gpu} {times} times; name it once.")
            if gpu < 0:
                yield Problem((f"gpus.{part}",), f"gpus.{part} = {gpus}: GPU {gpu} cannot exist; GPUs count from 0.")
    for gpu, parts in sorted(owners.items()):
        if len(parts) > 1 and not (parts == ["inference", "trainer"] and config.gpus.share):
            yield _overlap(config, gpu, parts)


def _overlap(config: RLConfig, gpu: int, parts: list[str]) -> Problem:
    names = " and ".join(f"gpus.{part} = {getattr(config.gpus, part)}" for part in parts)
    remedy = (
        "GPUs of containers are never shared; give it to one of them"
        if "containers" in parts
        else "give it to one of them, or set gpus.share = true to split its memory"
    )
    where = "both" if len(parts) == 2 else "all three"
    return Problem(tuple(f"gpus.{part}" for part in parts), f"{names}: GPU {gpu} is in {where}; {remedy}.")


def _engine_memory(config: RLConfig) -> Iterator[Problem]:
    given = cast(object, config.engine_memory)  # what passes through to vLLM may be anything
    if given is not None and not (isinstance(given, int | float) and 0 < given <= 1):
        yield Problem(
            ("inference.vllm.gpu_memory_utilization",),
            f"inference.vllm.gpu_memory_utilization = {given!r} must be a fraction of a GPU's memory, above 0 and at most 1.",
        )


def _replicas(config: RLConfig) -> Iterator[Problem]:
    inference, gpus = config.inference, config.gpus.inference
    if gpus and len(gpus) % inference.tp:
        yield Problem(
            ("inference.tp", "gpus.inference"),
            f"inference.tp = {inference.tp} does not divide the {len(gpus)} GPUs of gpus.inference = {gpus}; "
            "change tp or the number of GPUs.",
        )
    elif gpus and inference.dp is not None and inference.dp * inference.tp != len(gpus):
        yield Problem(
            ("inference.dp", "gpus.inference"),
            f"inference.dp = {inference.dp} replicas of tp = {inference.tp} need {inference.dp * inference.tp} GPUs, but "
            f"gpus.inference = {gpus} has {len(gpus)}; use dp = {len(gpus) // inference.tp} or leave it out.",
        )
    if inference.engine == "embedded" and gpus:
        yield Problem(
            ("gpus.inference", "inference.engine"),
            f'gpus.inference = {gpus} needs inference.engine = "vllm": the embedded engine computes on CPUs only; '
            "set the engine, or leave gpus.inference empty.",
        )
    if inference.engine == "embedded" and inference.tp > 1:
        yield Problem(
            ("inference.tp", "inference.engine"),
            f'inference.tp = {inference.tp} needs engine = "vllm": the embedded engine does not split a model; use tp = 1.',
        )
    last = (inference.port or 0) + (inference.dp or 1) - 1
    if last > MAX_PORT:
        yield Problem(
            ("inference.port", "inference.dp"),
            f"inference.port = {inference.port} leaves no port for {inference.dp} replicas: ports end at {MAX_PORT}; "
            "use a lower one.",
        )


def _dummy_weights(config: RLConfig) -> Iterator[Problem]:
    if config.model.load_format == "dummy" and config.inference.engine != "vllm":
        yield Problem(
            ("model.load_format", "inference.engine"),
            'model.load_format = "dummy" measures vLLM and the trainer on random weights; the embedded engine has no such mode; '
            'use inference.engine = "vllm", or load_format = "auto".',
        )


def _adapter_slots(config: RLConfig) -> Iterator[Problem]:
    needed = config.orchestrator.max_staleness + 2
    slots = config.inference.max_loras
    if config.trainer.model.lora is not None and slots is not None and slots < needed:
        yield Problem(
            ("inference.max_loras", "orchestrator.max_staleness"),
            f"inference.max_loras = {slots} is too few for orchestrator.max_staleness = {config.orchestrator.max_staleness}: "
            f"running requests would lose their adapter; use {needed} or leave it out.",
        )


def _lengths(config: RLConfig) -> Iterator[Problem]:
    reply = config.orchestrator.sampling.max_tokens
    if reply >= config.seq_len:
        yield Problem(
            ("orchestrator.sampling.max_tokens", "seq_len"),
            f"orchestrator.sampling.max_tokens = {reply} leaves no room for a prompt in seq_len = {config.seq_len}; "
            f"use a smaller reply or a seq_len above {reply}.",
        )
    packed = config.trainer.micro_batch_tokens
    if packed is not None and packed < config.seq_len:
        yield Problem(
            ("trainer.micro_batch_tokens", "seq_len"),
            f"trainer.micro_batch_tokens = {packed} cannot hold one sample of seq_len = {config.seq_len}; "
            f"use {config.seq_len} or more, or leave it out.",
        )


def _overlong(config: RLConfig) -> Iterator[Problem]:
    overlong, limit = config.orchestrator.overlong, config.orchestrator.overlong_limit
    reply = config.orchestrator.sampling.max_tokens
    if overlong is None:
        return
    if overlong.buffer >= limit:
        yield Problem(
            ("orchestrator.overlong.buffer", "orchestrator.overlong.max_tokens", "orchestrator.sampling.max_tokens"),
            f"orchestrator.overlong.buffer = {overlong.buffer} would punish every reply: it must be less than the limit of "
            f"{limit} tokens; {f'use {limit // 16}, for example' if limit >= 16 else 'raise the limit'}.",
        )
    elif limit - overlong.buffer >= reply:
        yield Problem(
            ("orchestrator.overlong.max_tokens", "orchestrator.sampling.max_tokens"),
            f"orchestrator.overlong.max_tokens = {limit} with buffer = {overlong.buffer} punishes replies of more than "
            f"{limit - overlong.buffer} tokens, and orchestrator.sampling.max_tokens = {reply} allows none; leave the first out.",
        )


def _noise(config: RLConfig) -> Iterator[Problem]:
    noise = config.inference.noise
    if noise is not None and noise.sigma_end >= noise.sigma_start:
        yield Problem(
            ("inference.noise.sigma_end", "inference.noise.sigma_start"),
            f"inference.noise.sigma_end = {noise.sigma_end:g} must be less than sigma_start = {noise.sigma_start:g}, since noise "
            f"fades out over the run; use {noise.sigma_start / 100:g}, for example.",
        )


def _stops(config: RLConfig) -> Iterator[Problem]:
    if config.stop.stop_on_success and config.stop.success_when is None:
        yield Problem(
            ("stop.stop_on_success", "stop.success_when"),
            "stop.stop_on_success = true needs a condition; set stop.success_when, or leave stop_on_success out.",
        )


RULES: tuple[Rule, ...] = (
    _length,
    _environments,
    _groups,
    _gpu_lists,
    _engine_memory,
    _replicas,
    _dummy_weights,
    _adapter_slots,
    _lengths,
    _overlong,
    _noise,
    _stops,
    *TRAINER_RULES,
)
