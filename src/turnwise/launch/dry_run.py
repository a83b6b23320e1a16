"""`rl --dry-run`: everything that can be known before anything starts. Downloads, prepares and starts nothing."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console

from turnwise.config import ConfigError, EnvConfig, RLConfig
from turnwise.inference.launcher import check_engine
from turnwise.launch.allocation import Allocation, allocate
from turnwise.launch.arithmetic import Arithmetic, count_tasks, training_arithmetic
from turnwise.launch.describe import (
    arithmetic_lines,
    plan_json,
    print_allocation,
    print_hints,
    print_memory,
    print_plan,
    weights_line,
)
from turnwise.launch.gpus import Machine, look
from turnwise.launch.hints import Hint, environment_hints
from turnwise.launch.memory import Estimate, estimate
from turnwise.launch.models import checked_name
from turnwise.launch.plan import compose
from turnwise.launch.quantized import planned_folder
from turnwise.launch.resolve import check_conditions, check_template, with_defaults
from turnwise.launch.shape import ModelShape, known_shape
from turnwise.launch.tracking import check_tracking

CountTasks = Callable[[EnvConfig], int]


@dataclass(frozen=True)
class Foreseen:
    """What is known of a run before anything starts."""

    config: RLConfig  # resolved, as far as that needs no model
    arithmetic: Arithmetic | None
    unknown: str  # why there is no arithmetic
    shape: ModelShape | str  # the model's sizes, or why they are not known
    allocation: Allocation
    estimates: Sequence[Estimate]  # of memory; none where the sizes are not known
    hints: Sequence[Hint]  # of environments and their containers


def foresee(config: RLConfig, *, count: CountTasks = count_tasks, machine: Machine | None = None) -> Foreseen:
    """Everything that can be known on `machine`, this one when left out, without preparing, downloading or starting anything.

    Raises:
        ConfigError: what is configured could not start. What is wrong with the GPUs is in the allocation instead.
    """
    check_conditions(config)
    check_template(config)
    model = checked_name(config.model.name, weights=config.model.load_format != "dummy")
    arithmetic, unknown = _arithmetic(config, count)
    steps = arithmetic.max_steps if arithmetic else config.max_steps or 1
    filled = with_defaults(config, max_steps=steps, model=model, quantized=planned_folder(config, model))
    shape = known_shape(model)
    allocation = allocate(filled, machine or look(), shape)
    estimates = [] if isinstance(shape, str) else estimate(allocation.config, shape, allocation.totals)
    return Foreseen(allocation.config, arithmetic, unknown, shape, allocation, estimates, environment_hints(allocation.config))


def dry_run(
    config: RLConfig,
    *,
    as_json: bool = False,
    console: Console | None = None,
    count: CountTasks = count_tasks,
    machine: Machine | None = None,
) -> None:
    """Print plan, arithmetic, memory, and how it all fits the GPUs of `machine`, this one when left out.

    Raises:
        ConfigError: what is configured could not start.
    """
    console = console or Console()
    seen = foresee(config, count=count, machine=machine)
    filled, arithmetic, shape, machine = seen.config, seen.arithmetic, seen.shape, seen.allocation.machine
    plan = compose(filled, run_id="dry-run", machine=machine)
    if as_json:
        text = plan_json(plan, arithmetic, seen.estimates, seen.allocation, seen.hints)
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        return
    print_plan(console, plan)
    console.print("Training", style="bold")
    for line in [*(arithmetic_lines(arithmetic, filled) if arithmetic else [seen.unknown]), weights_line(filled)]:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    if isinstance(shape, str):
        console.print(f"Memory: not estimated, since {shape}", highlight=False, markup=False, soft_wrap=True)
    else:
        print_memory(console, seen.estimates, shape, machine)
    print_allocation(console, seen.allocation)
    print_hints(console, seen.hints)
    for line in _missing(filled):
        console.print(line, style="bold red", highlight=False, markup=False, soft_wrap=True)


def _arithmetic(config: RLConfig, count: CountTasks) -> tuple[Arithmetic | None, str]:
    """The arithmetic, or why it cannot be known. With `epochs` it is needed, and the reason is an error."""
    try:
        return training_arithmetic(config, count), ""
    except ConfigError as error:
        if config.max_steps is None:
            raise
        return None, f"unknown number of training tasks: {error}"


def _missing(config: RLConfig) -> list[str]:
    """Packages and accounts without which the run would be refused."""
    found: list[str] = []
    for check in (check_engine, check_tracking):
        try:
            check(config)
        except ConfigError as error:
            found.append(str(error))
    return found
