"""`rl --dry-run`: everything that can be known before anything starts. Downloads, prepares and starts nothing."""

from collections.abc import Callable

from rich.console import Console

from turnwise.config import ConfigError, EnvConfig, RLConfig
from turnwise.inference.launcher import check_engine
from turnwise.launch.arithmetic import Arithmetic, count_tasks, training_arithmetic
from turnwise.launch.describe import arithmetic_lines, missing_gpus, plan_json, print_memory, print_plan
from turnwise.launch.memory import ModelShape, estimate, find_shape
from turnwise.launch.models import checked_name
from turnwise.launch.plan import compose
from turnwise.launch.resolve import check_conditions, check_template, with_defaults

CountTasks = Callable[[EnvConfig], int]


def dry_run(config: RLConfig, *, as_json: bool = False, console: Console | None = None, count: CountTasks = count_tasks) -> None:
    """Print plan, arithmetic and memory.

    Raises:
        ConfigError: what is configured could not start.
    """
    console = console or Console()
    check_conditions(config)
    check_template(config)
    model = checked_name(config.model.name)
    arithmetic, unknown = _arithmetic(config, count)
    filled = with_defaults(config, max_steps=arithmetic.max_steps if arithmetic else config.max_steps or 1, model=model)
    plan = compose(filled, run_id="dry-run")
    shape, unknown_shape = _shape(model)
    estimates = estimate(filled, shape) if shape else []
    if as_json:
        console.print(plan_json(plan, arithmetic, estimates), markup=False, highlight=False, soft_wrap=True)
        return
    print_plan(console, plan)
    console.print("Training", style="bold")
    for line in arithmetic_lines(arithmetic, filled) if arithmetic else [unknown]:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    if shape:
        print_memory(console, estimates, shape)
    else:
        console.print(f"Memory: not estimated, since {unknown_shape}", highlight=False, markup=False, soft_wrap=True)
    for line in [*missing_gpus(filled), *_missing_engine(filled)]:
        console.print(line, style="bold red", highlight=False, markup=False, soft_wrap=True)


def _arithmetic(config: RLConfig, count: CountTasks) -> tuple[Arithmetic | None, str]:
    """The arithmetic, or why it cannot be known. With `epochs` it is needed, and the reason is an error."""
    try:
        return training_arithmetic(config, count), ""
    except ConfigError as error:
        if config.max_steps is None:
            raise
        return None, f"unknown number of training tasks: {error}"


def _missing_engine(config: RLConfig) -> list[str]:
    try:
        check_engine(config)
    except ConfigError as error:
        return [str(error)]
    return []


def _shape(model: str) -> tuple[ModelShape | None, str]:
    try:
        return find_shape(model), ""
    except ValueError as error:
        return None, str(error)
