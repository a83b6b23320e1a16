"""Rules between tables: contradictions and impossible arithmetic, each found before anything starts."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import cast

from turnwise.config.problems import Problem
from turnwise.config.root import RLConfig

Rule = Callable[[RLConfig], Iterator[Problem]]
MAX_PORT = 65535
UNQUANTISED = ("lm_head", "embed_tokens")


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


def _trainer_processes(config: RLConfig) -> Iterator[Problem]:
    processes, gpus = config.trainer.processes, config.gpus.trainer
    if gpus and processes is not None and processes != len(gpus):
        yield Problem(
            ("trainer.processes", "gpus.trainer"),
            f"trainer.processes = {processes}, but gpus.trainer = {gpus} makes {len(gpus)} processes, one a GPU; "
            "leave processes out.",
        )


def _trainer_replicas(config: RLConfig) -> Iterator[Problem]:
    model, processes = config.trainer.model, len(config.gpus.trainer) or config.trainer.processes or 1
    if model.replicas is None:
        return
    if not model.shard:
        yield Problem(
            ("trainer.model.replicas", "trainer.model.shard"),
            f"trainer.model.replicas = {model.replicas} are copies of a sharded model, and trainer.model.shard = false makes "
            "one a process; leave one of them out.",
        )
    elif processes % model.replicas:
        fitting = [count for count in range(1, processes + 1) if processes % count == 0]
        yield Problem(
            ("trainer.model.replicas", "gpus.trainer", "trainer.processes"),
            f"trainer.model.replicas = {model.replicas} does not divide the {processes} processes of the trainer; "
            f"use {' or '.join(map(str, fitting))}.",
        )


def _weight_transfer(config: RLConfig) -> Iterator[Problem]:
    if config.trainer.weight_transfer != "broadcast":
        return
    if config.trainer.model.lora is not None:
        yield Problem(
            ("trainer.weight_transfer", "trainer.model.lora"),
            'trainer.weight_transfer = "broadcast" carries full weights, and trainer.model.lora is set: adapters travel as '
            'files; use "auto", or train all parameters with --no-trainer.model.lora.',
        )
    common = [gpu for gpu in config.gpus.trainer if gpu in config.gpus.inference]
    if common:
        yield Problem(
            ("trainer.weight_transfer", "gpus.trainer", "gpus.inference"),
            f'trainer.weight_transfer = "broadcast" needs GPUs that engines and trainer do not share, and both use GPU '
            f'{", ".join(map(str, common))}: NCCL takes one process a GPU; use "files", or GPUs apart.',
        )


def _loss(config: RLConfig) -> Iterator[Problem]:
    loss = config.trainer.loss
    if loss.kind == "cispo" and loss.clip_high < 1:
        yield Problem(
            ("trainer.loss.clip_high", "trainer.loss.kind"),
            f'trainer.loss.clip_high = {loss.clip_high:g} is the absolute bound of the ratio for kind = "cispo" and would '
            "shrink every gradient; use 1 or more, for example 5.0.",
        )
    if loss.kind == "cispo" and loss.dual_clip is not None:
        yield Problem(
            ("trainer.loss.dual_clip", "trainer.loss.kind"),
            f'trainer.loss.dual_clip = {loss.dual_clip:g} has no meaning for kind = "cispo", '
            "which has no clipped surrogate; remove it.",
        )
    if loss.importance_sampling != "none" and loss.old_logprobs == "behaviour":
        yield Problem(
            ("trainer.loss.old_logprobs", "trainer.loss.importance_sampling"),
            f'trainer.loss.old_logprobs = "behaviour" with importance_sampling = "{loss.importance_sampling}" would correct for '
            'the policy that sampled twice; use one of the two: old_logprobs = "auto", or importance_sampling = "none".',
        )
    if loss.importance_sampling != "none" and loss.importance_cap < 1:
        yield Problem(
            ("trainer.loss.importance_cap", "trainer.loss.importance_sampling"),
            f'trainer.loss.importance_cap = {loss.importance_cap:g} with importance_sampling = "{loss.importance_sampling}" '
            "would touch tokens on which engine and trainer agree; use 1 or more, for example 2.0.",
        )


def _quant(config: RLConfig) -> Iterator[Problem]:
    quant = config.trainer.model.quant
    if quant is None:
        return
    for name in quant.target_modules:
        if name in UNQUANTISED:
            yield Problem(
                ("trainer.model.quant.target_modules",),
                f'trainer.model.quant.target_modules names "{name}": embeddings and the output layer keep their type; '
                "leave it out.",
            )
    if quant.shard_base and config.trainer.model.lora is None:
        yield Problem(
            ("trainer.model.quant.shard_base", "trainer.model.lora"),
            "trainer.model.quant.shard_base = true is about the packed base under LoRA, and trainer.model.lora is unset: weights "
            "that train are sharded by trainer.model.shard; leave shard_base out.",
        )


def _noise(config: RLConfig) -> Iterator[Problem]:
    noise = config.inference.noise
    if noise is not None and noise.sigma_end >= noise.sigma_start:
        yield Problem(
            ("inference.noise.sigma_end", "inference.noise.sigma_start"),
            f"inference.noise.sigma_end = {noise.sigma_end:g} must be less than sigma_start = {noise.sigma_start:g}, since noise "
            f"fades out over the run; use {noise.sigma_start / 100:g}, for example.",
        )


def _schedule(config: RLConfig) -> Iterator[Problem]:
    warmup = config.trainer.optim.warmup_steps
    if config.max_steps is not None and warmup >= config.max_steps and warmup > 0:
        yield Problem(
            ("trainer.optim.warmup_steps", "max_steps"),
            f"trainer.optim.warmup_steps = {warmup} never ends within max_steps = {config.max_steps}; use fewer.",
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
    _trainer_processes,
    _trainer_replicas,
    _weight_transfer,
    _loss,
    _quant,
    _noise,
    _schedule,
    _stops,
)
