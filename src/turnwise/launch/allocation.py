"""`[gpus]` held against the machine, before anything starts: what is missing, what does not fit, what others have taken."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from turnwise.config import ConfigError, RLConfig
from turnwise.launch.gpus import BY_BUS, ORDER, VISIBLE, Machine, TorchBuild
from turnwise.launch.memory import GIB, VLLM_SHARE, gpu_engine_needs, trainer_parts
from turnwise.launch.resolve import changed
from turnwise.launch.shape import ModelShape
from turnwise.launch.split import Split, engine_fraction, engine_minimum, splits, trainer_minimum

PARTS = ("inference", "trainer", "containers")
BUSY = 0.5  # of a GPU's memory in use by others is worth a word, whatever runs there


@dataclass(frozen=True)
class Allocation:
    """A configuration on a machine."""

    config: RLConfig  # with gpus.inference_memory filled in where GPUs are shared
    machine: Machine
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    splits: tuple[Split, ...] = ()

    @property
    def totals(self) -> dict[int, int]:
        """Bytes of the GPUs whose size is known, by index."""
        return {index: gpu.total for index, gpu in enumerate(self.machine.gpus) if gpu.total}

    def lines(self) -> list[str]:
        """What to tell the user: how shared GPUs are split, and what might go wrong."""
        told = [split.text(label(self.machine, split.gpu)) for split in self.splits]
        return [*told, *(f"warning: {warning}" for warning in self.warnings)]


def allocate(config: RLConfig, machine: Machine, shape: ModelShape | str, *, evaluation: bool = False) -> Allocation:
    """Check `[gpus]`, and split the memory of shared GPUs.

    Args:
        config: resolved.
        machine: what `look` found.
        shape: the model's sizes, or why they are not known.
        evaluation: only engines will run.
    """
    parts = ("inference",) if evaluation else PARTS
    missing = [*_missing(config, machine, parts)]
    errors = [*missing]
    if not evaluation and config.gpus.trainer and machine.torch.cuda is None:
        errors.append(_no_cuda(config, machine.torch))
    if not machine.gpus or missing:
        return Allocation(config, machine, tuple(errors))
    totals = Allocation(config, machine).totals
    divided: tuple[Split, ...] = ()
    if not evaluation:
        try:
            config = _with_fraction(config, shape, totals)
        except ConfigError as error:
            return Allocation(config, machine, (*errors, str(error)))
        divided = tuple(splits(config, totals))
    fits = [] if isinstance(shape, str) else list(_fits(config, machine, shape, totals, evaluation=evaluation))
    errors += [text for certain, text in fits if certain]
    warnings = [text for certain, text in fits if not certain]
    warnings += [*_on_cpu(config, machine), *_taken(config, machine, parts), *_other_order(machine)]
    return Allocation(config, machine, tuple(errors), tuple(warnings), divided)


def label(machine: Machine, index: int) -> str:
    """`GPU 0 (NVIDIA H200, 139.8 GiB)`."""
    gpu = machine.gpu(index)
    facts = [gpu.name, f"{gpu.total / GIB:.1f} GiB" if gpu.total else ""] if gpu else []
    known = ", ".join(fact for fact in facts if fact)
    return f"GPU {index}" + (f" ({known})" if known else "")


def _used(config: RLConfig, parts: Sequence[str]) -> list[int]:
    return sorted({gpu for part in parts for gpu in getattr(config.gpus, part)})


def _missing(config: RLConfig, machine: Machine, parts: Sequence[str]) -> Iterator[str]:
    """GPUs that the configuration names and the machine lacks, a line for each list."""
    for part in parts:
        gpus: list[int] = getattr(config.gpus, part)
        if any(machine.gpu(gpu) is None for gpu in gpus):
            yield f"gpus.{part} = {gpus} but {_has(machine)}"


def _has(machine: Machine) -> str:
    count = len(machine.gpus)
    numbers = ", ".join(map(str, range(count)))
    if machine.offered is not None:
        shown = f"{VISIBLE} = {machine.offered!r} in the environment"
        if not count:
            return f"{shown} hides all GPUs; unset it, or leave the list empty to use CPUs."
        return f"{shown} offers {count}, which count as {numbers} here; use those, or change {VISIBLE}."
    if not count:
        return "this machine has no NVIDIA GPU; leave the list empty to use CPUs (add @ configs/cpu.toml)."
    return f"this machine has {count} GPU{'s' if count > 1 else ''} ({numbers}); use those."


def _no_cuda(config: RLConfig, torch: TorchBuild) -> str:
    return (
        f"gpus.trainer = {config.gpus.trainer} needs a torch with CUDA, and torch {torch.version} here has none; run "
        "`pip install --force-reinstall 'torch>=2.11,<2.14' --index-url https://download.pytorch.org/whl/cu130` "
        "(or the index of the CUDA version that your driver knows: the top line of nvidia-smi)."
    )


def _with_fraction(config: RLConfig, shape: ModelShape | str, totals: Mapping[int, int]) -> RLConfig:
    """The configuration with the engine's fraction of shared GPUs.

    Raises:
        ConfigError: it cannot be computed, or leaves too little.
    """
    if not config.gpus.shared or config.engine_memory is not None:
        return config
    unknown = [gpu for gpu in config.gpus.shared if gpu not in totals]
    if unknown or isinstance(shape, str):
        why = f"the memory of GPU {unknown[0]} is not known (nvidia-smi tells it)" if unknown else str(shape)
        raise ConfigError(f"gpus.share: no split can be computed, since {why}; set gpus.inference_memory, for example to 0.5.")
    return changed(config, {"gpus": {"inference_memory": engine_fraction(config, shape, totals)}})


def _fits(
    config: RLConfig, machine: Machine, shape: ModelShape, totals: Mapping[int, int], *, evaluation: bool
) -> Iterator[tuple[bool, str]]:
    """What is too large for its GPU: (whether that is certain, text)."""
    for gpu in config.gpus.inference:
        if total := totals.get(gpu):
            part = int(total * (config.engine_memory or VLLM_SHARE))
            needs = gpu_engine_needs(config, shape, total)
            remedy = "use a smaller model, inference.tp over more GPUs, or a larger gpus.inference_memory"
            least = engine_minimum(config, shape, total)
            yield from _compare("the engine", label(machine, gpu), part, needs["weights"], least, remedy)
    for gpu in [] if evaluation else config.gpus.trainer:
        if total := totals.get(gpu):
            parts, allowed = trainer_parts(config, shape), config.trainer_memory(gpu, total)
            needed = sum(parts.values()) if allowed is None else trainer_minimum(config, shape)
            part = total if allowed is None else allowed
            remedy = "use more GPUs, a smaller trainer.micro_batch_tokens, or trainer.model.gradient_checkpointing = true"
            yield from _compare("the trainer", label(machine, gpu), part, parts["weights"], needed, remedy)


def _compare(who: str, gpu: str, part: int, certain: int, needed: int, remedy: str) -> Iterator[tuple[bool, str]]:
    if certain > part:
        weights = f"the weights alone take {certain / GIB:.1f} GiB"
        yield True, f"{gpu} cannot hold {who}: {weights}, and its part is {max(0, part) / GIB:.1f} GiB; {remedy}."
    elif needed > part:
        wanted = f"about {needed / GIB:.1f} GiB are needed"
        yield False, f"{gpu} may be too small for {who}: {wanted}, and its part is {part / GIB:.1f} GiB; {remedy}."


def _on_cpu(config: RLConfig, machine: Machine) -> Iterator[str]:
    """Parts that stay on the CPU of a machine with GPUs."""
    gpus = config.gpus
    spare = [gpu for gpu in range(len(machine.gpus)) if gpu not in {*gpus.inference, *gpus.trainer, *gpus.containers}]
    if config.inference.engine == "vllm" and not gpus.inference:
        remedy = f"; set gpus.inference = [{spare[0]}] to use GPU {spare[0]}, which is free" if spare else ""
        yield f"gpus.inference is empty, so vLLM runs on the CPU, which needs a build of vLLM for CPUs{remedy}."
    if spare and gpus.inference and not gpus.trainer:
        yield f"the trainer runs on the CPU, while GPU {spare[0]} is free; set gpus.trainer = [{spare[0]}] to use it."


def _taken(config: RLConfig, machine: Machine, parts: Sequence[str]) -> Iterator[str]:
    """Memory that other processes hold."""
    share = config.engine_memory or VLLM_SHARE
    for index in _used(config, parts):
        gpu = machine.gpu(index)
        if gpu is None or not gpu.total or not gpu.used:
            continue
        free = 1 - gpu.used / gpu.total
        held = f"{label(machine, index)}: other processes hold {gpu.used / GIB:.1f} GiB of it (nvidia-smi lists them)"
        if index in config.gpus.inference and free < share:
            yield (
                f"{held}, and the engine starts only where {share:.0%} are free; end them, use another GPU, "
                f"or set gpus.inference_memory below {max(0.0, free):.2f}."
            )
        elif gpu.used > BUSY * gpu.total:
            yield f"{held}; end them, or use another GPU."


def _other_order(machine: Machine) -> Iterator[str]:
    order = os.environ.get(ORDER, BY_BUS)
    if order != BY_BUS and machine.offered is not None and any(gpu.device.isdigit() for gpu in machine.gpus):
        yield f"{ORDER} = {order} is ignored: {VISIBLE} = {machine.offered} is read in nvidia-smi's order ({BY_BUS})."
