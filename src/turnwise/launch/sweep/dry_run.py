"""`turnwise sweep --dry-run`: every run with its command, its place and its arithmetic. Starts nothing."""

import json
import shlex
from collections.abc import Sequence
from functools import cache
from typing import Any

from turnwise.config import ConfigError, EnvConfig
from turnwise.launch.arithmetic import Arithmetic, CountTasks, count_tasks, training_arithmetic
from turnwise.launch.describe import arithmetic_lines
from turnwise.launch.sweep.plan import PlannedRun, SweepPlan
from turnwise.launch.sweep.process import arguments, next_mode
from turnwise.launch.sweep.track import Track


def plan_lines(plan: SweepPlan, count: CountTasks = count_tasks) -> list[str]:
    """The plan in lines: the sweep, what its overlays change, each experiment with its arithmetic, the sum."""
    sweep = plan.sweep
    counts = _counted_once(count)
    sets = f"{len(sweep.gpu_sets)} at a time, on GPUs {_sets(plan)}" if sweep.gpu_sets else "one after the other"
    seeds = ", ".join(map(str, sweep.seeds))
    lines = [f"{sweep.name}: {len(plan.runs)} runs, {sets}; seeds {seeds}", f"folder: {plan.root}"]
    lines.append(f"a run that ended early: {sweep.when_ended_early}, at most {sweep.max_attempts} starts that fail")
    if plan.shortened:
        source = ", ".join([*map(str, sweep.overlays), *(["the command line"] if plan.flags else [])])
        lines += ["", f"Not the full experiments; changed by {source}:"]
        lines += [f"  {line}" for line in plan.shortened]
    steps = 0
    for run in plan.runs:
        again = run.seed != sweep.seeds[0]
        lines += ["", f"{run.label}  {run.experiment.title}".rstrip()]
        arithmetic = _arithmetic(run, counts)
        if isinstance(arithmetic, Arithmetic):
            steps += arithmetic.max_steps
        lines += [] if again else [f"  {line}" for line in _about(run, arithmetic)]
        lines.append(f"  {command(plan, run)}")
    return [*lines, "", f"{len(plan.runs)} runs, {steps} optimiser steps in all"]


def plan_json(plan: SweepPlan, count: CountTasks = count_tasks) -> str:
    """The same as one JSON object."""
    counts = _counted_once(count)
    runs: list[dict[str, Any]] = []
    for run in plan.runs:
        arithmetic = _arithmetic(run, counts)
        known = isinstance(arithmetic, Arithmetic)
        runs.append(
            {
                "label": run.label,
                "experiment": run.experiment.id,
                "title": run.experiment.title,
                "seed": run.seed,
                "folder": str(run.folder),
                "command": command(plan, run),
                "max_steps": arithmetic.max_steps if known else None,
                "steps_per_epoch": arithmetic.steps_per_epoch if known else None,
                "epochs": arithmetic.epochs if known else None,
                "shortened": [str(difference) for difference in run.shortened],
            }
        )
    return json.dumps({"name": plan.sweep.name, "folder": str(plan.root), "places": plan.places, "runs": runs}, indent=2)


def command(plan: SweepPlan, run: PlannedRun) -> str:
    """The `rl` that would be started, on the first place; what is said instead of a run that needs none."""
    track = Track(run, plan.sweep)
    track.survey()
    if not track.waiting:
        return f"{track.state}{f': {track.reason}' if track.reason else ''}"
    mode = next_mode(run, plan.sweep.when_ended_early)
    return shlex.join(["rl", *arguments(run, mode, plan.places[0], plan.root / "configs" / f"{run.label}.toml")])


def _about(run: PlannedRun, arithmetic: "Arithmetic | str") -> Sequence[str]:
    files = ", ".join(str(path) for path in run.experiment.files) or "the common ones"
    reference = "" if run.experiment.reference is None else f"; reference {run.experiment.reference:g}"
    note = f" ({run.experiment.note})" if run.experiment.note else ""
    told = [arithmetic] if isinstance(arithmetic, str) else arithmetic_lines(arithmetic, run.config)
    return [f"files: {files}{reference}{note}", *told]


def _arithmetic(run: PlannedRun, count: CountTasks) -> "Arithmetic | str":
    """The arithmetic, or why it is not known."""
    try:
        return training_arithmetic(run.config, count)
    except ConfigError as error:
        return f"steps are not known: {error}"


def _counted_once(count: CountTasks) -> CountTasks:
    """Runs of a sweep train on the same tasks: reading them once, or finding once that they cannot be read, is enough."""

    @cache
    def counted(described: str) -> "int | ConfigError":
        try:
            return count(EnvConfig.model_validate_json(described))
        except ConfigError as error:
            return error

    def known(env: EnvConfig) -> int:
        found = counted(env.model_dump_json())
        if isinstance(found, ConfigError):
            raise found
        return found

    return known


def _sets(plan: SweepPlan) -> str:
    return " / ".join(", ".join(map(str, gpus)) or "none" for gpus in plan.sweep.gpu_sets)
