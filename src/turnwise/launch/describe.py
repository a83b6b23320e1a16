"""The plan, the training arithmetic and the memory estimate as tables: what `--dry-run` prints."""

import json
from collections.abc import Sequence
from dataclasses import asdict

import psutil
from rich.console import Console
from rich.table import Table

from turnwise.config import RLConfig
from turnwise.launch.arithmetic import Arithmetic
from turnwise.launch.memory import Estimate, ModelShape
from turnwise.launch.plan import Plan, visible_gpus

GIB = 2**30


def arithmetic_lines(arithmetic: Arithmetic, config: RLConfig) -> list[str]:
    """The training arithmetic in sentences."""
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
    ]


def print_plan(console: Console, plan: Plan) -> None:
    table = Table(title="Processes", title_justify="left", show_lines=True)
    for column in ("process", "runs on", "log"):
        table.add_column(column, overflow="fold")
    for process in plan.processes:
        place = (
            f"GPU {', '.join(map(str, process.gpus))}"
            if process.gpus
            else f"CPU, {process.env.get('OMP_NUM_THREADS', '?')} threads"
        )
        table.add_row(process.name, place, str(process.log))
    console.print(table)
    for process in plan.processes:
        console.print(f"{process.name}:", style="bold")
        console.print(f"  {process.shell()}", highlight=False, markup=False, soft_wrap=True)


def print_memory(console: Console, estimates: Sequence[Estimate], shape: ModelShape) -> None:
    table = Table(title=f"Memory, estimated ({shape.parameters / 1e6:.0f}M parameters, {shape.dtype})", title_justify="left")
    for column in ("where", "process", "of which"):
        table.add_column(column, overflow="fold")
    table.add_column("GiB", justify="right")
    for estimate in estimates:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in estimate.parts.items())
        table.add_row(estimate.place, estimate.process, parts, f"{estimate.total / GIB:.2f}")
    ram = sum(estimate.total for estimate in estimates if estimate.place == "RAM")
    if ram:
        table.add_row("RAM", "all processes", "", f"{ram / GIB:.2f}", style="bold")
    console.print(table)
    present = psutil.virtual_memory().total
    if ram > present:
        console.print(
            f"This machine has {present / GIB:.1f} GiB of RAM, less than that; "
            "use a smaller trainer.micro_batch_tokens, seq_len or inference.embedded.max_batch_size.",
            style="bold red",
            soft_wrap=True,
        )


def missing_gpus(config: RLConfig) -> list[str]:
    """What the configuration asks for and this machine lacks."""
    wanted = sorted({*config.gpus.inference, *config.gpus.trainer, *config.gpus.containers})
    present = len(visible_gpus())
    lacking = [gpu for gpu in wanted if gpu >= present]
    if not lacking:
        return []
    listed = ", ".join(map(str, lacking))
    return [f"gpus: this machine has {present or 'no'} NVIDIA GPUs; missing: {listed}."]


def plan_json(plan: Plan, arithmetic: Arithmetic | None, estimates: Sequence[Estimate]) -> str:
    """The same as one JSON object."""
    processes = [
        {"name": p.name, "argv": p.argv, "env": dict(p.env), "cwd": str(p.cwd), "log": str(p.log), "gpus": p.gpus}
        for p in plan.processes
    ]
    numbers = arithmetic and {**asdict(arithmetic), "steps_per_epoch": arithmetic.steps_per_epoch, "epochs": arithmetic.epochs}
    memory = [{**asdict(estimate), "total": estimate.total} for estimate in estimates]
    return json.dumps({"processes": processes, "arithmetic": numbers, "memory": memory}, indent=2)
