"""Could this run start and end on this machine? Everything that needs neither model nor engine."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import psutil

from turnwise.config import ConfigError, RLConfig
from turnwise.diagnose.context import Context
from turnwise.diagnose.core import Check, Finding
from turnwise.diagnose.notes import Notes
from turnwise.inference.launcher import check_engine
from turnwise.launch.describe import arithmetic_lines
from turnwise.launch.dry_run import Foreseen
from turnwise.launch.memory import GIB, Estimate
from turnwise.launch.shape import BYTES, ModelShape
from turnwise.orchestrator.environments import EnvSetup

UNCERTAIN = 1.35  # the memory estimate is right within about a third
SPARE = 1.5  # free disk space, times what checkpoints take, below which it is worth a word
MASTER_AND_MOMENTS = 4 + 4 + 4  # bytes of a trained parameter in a checkpoint


def look(context: Context) -> Finding:
    """What `rl --dry-run` says, held against the machine."""
    foreseen, notes, _ = context.foreseen, Notes(), context.containers
    config = foreseen.config
    for error in foreseen.allocation.errors:
        notes.fail(error)
    for warning in foreseen.allocation.warnings:
        notes.warn(warning)
    _engine(config, notes)
    _memory(foreseen.estimates, notes)
    disk = _disk(config, foreseen.shape, notes)
    _length(config, [setup for setup in context.setups_if_any() if not setup.uses_containers], notes)  # those say it themselves
    for hint in foreseen.hints:
        if not hint.remark:
            (notes.fail if hint.fatal else notes.warn)(hint.text)
    _steps(config, foreseen, notes)
    told = list(arithmetic_lines(foreseen.arithmetic, config)) if foreseen.arithmetic else [foreseen.unknown]
    told += [hint.text for hint in foreseen.hints if hint.remark]
    place = "on the CPU" if not (config.gpus.inference or config.gpus.trainer) else _gpus(config)
    data = {"max_steps": config.max_steps, "checkpoint_bytes": disk, "memory": [vars(one) for one in foreseen.estimates]}
    return notes.finding(f"{config.max_steps} steps of {config.orchestrator.batch_size} rollouts {place}", data, told)


def _gpus(config: RLConfig) -> str:
    return f"with engines on {config.gpus.inference or 'the CPU'}, the trainer on {config.gpus.trainer or 'the CPU'}"


def _engine(config: RLConfig, notes: Notes) -> None:
    try:
        check_engine(config)
    except ConfigError as error:
        notes.fail(str(error))


def _memory(estimates: Sequence[Estimate], notes: Notes) -> None:
    """What all processes want of the RAM; GPUs are the allocation's."""
    ram, wanted = psutil.virtual_memory(), sum(estimate.total for estimate in estimates if estimate.place == "RAM")
    has = f"this machine has {ram.total / GIB:.1f} GiB, of which {ram.available / GIB:.1f} are free"
    told = f"about {wanted / GIB:.1f} GiB of RAM are needed, and {has}"
    remedy = "use a smaller model, seq_len or inference.embedded.prefix_cache_mb, or trainer.model.gradient_checkpointing = true"
    if wanted > UNCERTAIN * ram.total:
        notes.fail(told, remedy)
    elif wanted > ram.available:
        notes.warn(told, remedy)


def _disk(config: RLConfig, shape: ModelShape | str, notes: Notes) -> int | None:
    """Bytes of the checkpoints that are kept; None where the model's sizes are not known."""
    if isinstance(shape, str):
        return None
    needed = checkpoint_bytes(config, shape) * kept_checkpoints(config)
    place = existing(config.output_dir)
    free = shutil.disk_usage(place).free
    remedy = "make room, choose another output_dir, or keep fewer (ckpt.keep_last, ckpt.keep_best, ckpt.interval)"
    told = f"checkpoints take about {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free in {place}"
    if needed > free:
        notes.fail(told, remedy)
    elif SPARE * needed > free:
        notes.warn(told, remedy)
    return needed


def checkpoint_bytes(config: RLConfig, shape: ModelShape) -> int:
    """One checkpoint: parameters that train with their moments, and the policy in the form that other programs read."""
    lora = config.trainer.model.lora
    if lora is not None:
        trained = shape.adapter_parameters(lora.rank, lora.target_modules)
        return trained * (MASTER_AND_MOMENTS + 4)
    dtype = shape.dtype if config.model.dtype == "auto" else config.model.dtype
    return shape.parameters * (MASTER_AND_MOMENTS + BYTES[dtype])


def kept_checkpoints(config: RLConfig) -> int:
    """Checkpoints on disk at the same time: those kept, and the one that is being written."""
    steps, interval = config.max_steps or 1, config.ckpt.interval
    written = 1 if interval is None else -(-steps // interval)
    kept = written if config.ckpt.keep_last is None else config.ckpt.keep_last + config.ckpt.keep_best
    return min(written, kept + 1)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(place for place in (folder, *folder.parents) if place.is_dir())


def _length(config: RLConfig, setups: Sequence[EnvSetup], notes: Notes) -> None:
    """Whether the replies of a rollout fit a sequence."""
    most = config.orchestrator.sampling.max_tokens
    if most >= config.seq_len:
        notes.warn(
            f"orchestrator.sampling.max_tokens = {most} leaves no room for a prompt in seq_len = {config.seq_len}",
            "raise seq_len, or lower orchestrator.sampling.max_tokens",
        )
        return
    for setup in setups:
        if setup.max_turns * most > config.seq_len:
            notes.warn(
                f"{setup.max_turns} turns of {setup.name} with up to {most} tokens are {setup.max_turns * most}, and seq_len = "
                f"{config.seq_len}: rollouts of long replies end when that is full",
                "raise seq_len, or lower orchestrator.sampling.max_tokens or max_turns, unless replies are mostly short",
            )


def _steps(config: RLConfig, foreseen: Foreseen, notes: Notes) -> None:
    """Arithmetic that runs, and is rarely meant."""
    steps, warmup = config.max_steps or 1, config.trainer.optim.warmup_steps
    if warmup >= steps:
        notes.warn(
            f"trainer.optim.warmup_steps = {warmup} of {steps} steps: the learning rate never reaches trainer.optim.lr",
            "warm up for a tenth of the steps",
        )
    arithmetic = foreseen.arithmetic
    if arithmetic is not None and arithmetic.examples < arithmetic.examples_per_step:
        notes.warn(
            f"a step plays {arithmetic.examples_per_step} tasks and there are {arithmetic.examples}: some more than once",
            "use more tasks, a smaller orchestrator.batch_size, or more orchestrator.rollouts_per_example",
        )


PLAN = Check("plan", "Could this run start and end on this machine?", (), look)
