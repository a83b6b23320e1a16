"""The plan, the training arithmetic and the memory estimate as tables: what `--dry-run` prints."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict

import psutil
from rich.console import Console
from rich.table import Table

from turnwise.config import RLConfig
from turnwise.launch.allocation import Allocation
from turnwise.launch.arithmetic import Arithmetic
from turnwise.launch.gpus import Machine
from turnwise.launch.hints import Hint
from turnwise.launch.memory import GIB, Estimate
from turnwise.launch.noise import noise_lines
from turnwise.launch.plan import Plan
from turnwise.launch.shape import ModelShape


def arithmetic_lines(arithmetic: Arithmetic, config: RLConfig) -> list[str]:
    """The training arithmetic in sentences. Raises ConfigError when noise cannot be laid out over it."""
    a = arithmetic
    evals = config.orchestrator.eval.interval
    when = f"every {evals} steps, and " if evals else ""
    start = "at the start, " if config.orchestrator.eval.at_start else ""
    return [
        f"{a.examples} training tasks; {a.batch_size} rollouts a step / {a.group} of each task = "
        f"{a.examples_per_step} tasks a step",
        f"steps an epoch = floor({a.examples} x {a.group} / {a.batch_size}) = {a.steps_per_epoch}; "
        f"{a.max_steps} steps = {a.epochs:.3g} epochs = {a.max_steps * a.batch_size} rollouts",
        f"held-out evaluation {start}{when}at the end; "
        f"a sample may lag {config.orchestrator.max_staleness} steps behind the policy that trains on it",
        *noise_lines(arithmetic, config),
    ]


def weights_line(config: RLConfig) -> str:
    """How each version reaches the engines, in a sentence."""
    if config.trainer.model.lora is not None:
        return "weights: each version is an adapter folder, which engines load beside the one before, without a pause"
    if config.weight_transfer == "files":
        return "weights: each version is a folder with the whole model, which engines load while they pause"
    source = f"GPU {config.gpus.trainer[0]}" if config.broadcast_backend == "nccl" else "the trainer's memory"
    kind = {"nccl": "NCCL", "gloo": "gloo"}[config.broadcast_backend]
    workers = config.engine_workers
    return f"weights: broadcast ({kind}) from {source} to {workers} engine worker{'s' * (workers > 1)}, which pause meanwhile"


def print_plan(console: Console, plan: Plan) -> None:
    table = Table(title="Processes", title_justify="left", show_lines=True)
    for column in ("process", "runs on", "log"):
        table.add_column(column, overflow="fold")
    for process in plan.processes:
        place = process.place if process.gpus else f"CPU, {process.env.get('OMP_NUM_THREADS', '?')} threads"
        table.add_row(process.name, place, str(process.log))
    console.print(table)
    for process in plan.processes:
        console.print(f"{process.name}:", style="bold")
        console.print(f"  {process.shell()}", highlight=False, markup=False, soft_wrap=True)


def print_memory(console: Console, estimates: Sequence[Estimate], shape: ModelShape, machine: Machine) -> None:
    """What each process wants of each device, and each GPU's sum against what it has."""
    table = Table(title=f"Memory, estimated ({shape.parameters / 1e6:.0f}M parameters, {shape.dtype})", title_justify="left")
    for column in ("where", "process", "of which"):
        table.add_column(column, overflow="fold")
    table.add_column("GiB", justify="right")
    for place, group in itertools.groupby(sorted(estimates, key=_device_order), key=lambda estimate: estimate.place):
        members = list(group)
        for estimate in members:
            parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in estimate.parts.items())
            table.add_row(place, estimate.process, parts, f"{estimate.total / GIB:.2f}")
        capacity = _capacity(place, machine)
        if len(members) > 1 or capacity:
            total = sum(estimate.total for estimate in members)
            table.add_row(place, "all", capacity, f"{total / GIB:.2f}", style="bold")
    console.print(table)
    ram = sum(estimate.total for estimate in estimates if estimate.place == "RAM")
    present = psutil.virtual_memory().total
    if ram > present:
        console.print(
            f"This machine has {present / GIB:.1f} GiB of RAM, less than that; "
            "use a smaller trainer.micro_batch_tokens, seq_len or inference.embedded.max_batch_size.",
            style="bold red",
            soft_wrap=True,
        )


def print_allocation(console: Console, allocation: Allocation) -> None:
    """How shared GPUs are split, and what does not fit this machine."""
    gpus = allocation.config.gpus
    if (gpus.inference or gpus.trainer or gpus.containers) and not allocation.machine.gpus:
        console.print("GPUs: not checked: this machine has no GPUs.", highlight=False, soft_wrap=True)
        if gpus.shared and allocation.config.engine_memory is None:
            console.print("gpus.share: the memory split is computed where the GPUs are.", highlight=False, soft_wrap=True)
        return
    for line in allocation.lines():
        style = "yellow" if line.startswith("warning") else None
        console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)
    for line in allocation.errors:
        console.print(line, style="bold red", highlight=False, markup=False, soft_wrap=True)


def print_hints(console: Console, hints: Sequence[Hint]) -> None:
    """What environments and their containers need, in red what a run cannot begin without."""
    for hint in hints:
        style = "bold red" if hint.fatal else None if hint.remark else "yellow"
        console.print(hint.text, style=style, highlight=False, markup=False, soft_wrap=True)


def _device_order(estimate: Estimate) -> tuple[bool, int]:
    """GPUs by number, then RAM."""
    kind, _, number = estimate.place.partition(" ")
    return kind != "GPU", int(number or 0)


def _capacity(place: str, machine: Machine) -> str:
    """`of 139.8 GiB (NVIDIA H200), 1.2 in use now`; empty where nothing tells."""
    gpu = machine.gpu(int(place.removeprefix("GPU "))) if place.startswith("GPU ") else None
    if gpu is None or gpu.total is None:
        return ""
    used = f", {gpu.used / GIB:.1f} in use now" if gpu.used and gpu.used >= 0.05 * GIB else ""
    return f"of {gpu.total / GIB:.1f} GiB ({gpu.name}){used}"


def plan_json(
    plan: Plan,
    arithmetic: Arithmetic | None,
    estimates: Sequence[Estimate],
    allocation: Allocation,
    hints: Sequence[Hint] = (),
) -> str:
    """The same as one JSON object."""
    processes = [
        {**asdict(process), "env": dict(process.env), "cwd": str(process.cwd), "log": str(process.log)}
        for process in plan.processes
    ]
    numbers = arithmetic and {**asdict(arithmetic), "steps_per_epoch": arithmetic.steps_per_epoch, "epochs": arithmetic.epochs}
    memory = [{**asdict(estimate), "total": estimate.total} for estimate in estimates]
    gpus = {
        "present": [asdict(gpu) for gpu in allocation.machine.gpus],
        "splits": [asdict(split) for split in allocation.splits],
        "errors": allocation.errors,
        "warnings": allocation.warnings,
    }
    weights = allocation.config.weight_transfer
    told = [asdict(hint) for hint in hints]
    content = {"processes": processes, "weights": weights, "arithmetic": numbers, "memory": memory, "gpus": gpus, "hints": told}
    return json.dumps(content, indent=2)
