"""`turnwise sweep` from its arguments to its exit code."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from turnwise.launch.supervise import ExitCode
from turnwise.launch.sweep.dry_run import plan_json, plan_lines
from turnwise.launch.sweep.plan import SweepPlan, plan_sweep, read_sweep
from turnwise.launch.sweep.process import RL
from turnwise.launch.sweep.runner import POLL_S, Sweeper
from turnwise.launch.sweep.view import make_view
from turnwise.report.sweep import compare
from turnwise.report.sweep_tables import comparison_table, status_table


@dataclass(frozen=True)
class SweepOptions:
    """What the command line says beside the sweep file."""

    dry_run: bool = False
    as_json: bool = False
    plain: bool = False
    retry: bool = False
    seeds: int | None = None
    output_dir: Path | None = None
    only: tuple[str, ...] = ()


def run_sweep(args: Sequence[str], options: SweepOptions, *, rl: Sequence[str] = RL, poll_s: float = POLL_S) -> int:
    """Do a sweep, or print its plan; returns the exit code, that of `rl`.

    Args:
        args: `@` files, and flags for every run.
        options: of the sweep.
        rl: the program that makes a run.
        poll_s: seconds between two looks at the runs.

    Raises:
        ConfigError: it cannot start; the message is complete.
        OSError: the file system refused.
    """
    sweep, flags = read_sweep(args, seeds=options.seeds, output_dir=options.output_dir)
    plan = plan_sweep(sweep, flags, only=options.only)
    if options.dry_run:
        print(plan_json(plan) if options.as_json else "\n".join(plan_lines(plan)))
        return ExitCode.DONE
    view = make_view(sweep, plain=options.plain)
    sweeper = Sweeper(plan, view, rl=rl, poll_s=poll_s)
    try:
        code = sweeper.run(retry=options.retry)
    finally:
        view.close()
    print("\n".join(ending(plan, sweeper)))
    return code


def ending(plan: SweepPlan, sweeper: Sweeper) -> list[str]:
    """The last lines: the state, the comparison, where the pages lie."""
    rows = [track.row() for track in sweeper.tracks]
    return [
        "",
        status_table(plan.sweep, rows).markdown(),
        "",
        comparison_table(plan.sweep, compare(plan.sweep, rows)).markdown(),
        "",
        f"Pages: {plan.root / 'comparison.html'}, {plan.root / 'comparison.md'}, {plan.root / 'status.md'}",
    ]
