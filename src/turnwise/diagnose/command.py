"""`turnwise check @ FILE`: does this configuration learn? Asked before GPU hours are spent on it."""

import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from turnwise.config import ConfigError, RLConfig
from turnwise.config.command import check, read_command
from turnwise.diagnose.checks import chosen
from turnwise.diagnose.context import Context
from turnwise.diagnose.core import Check, Result, first_failure, run_checks
from turnwise.diagnose.table import View, as_json, conclusion, document, make_view
from turnwise.launch.hub import go_offline_without_hub
from turnwise.launch.models import Progress
from turnwise.launch.terminal import TerminalConsole
from turnwise.report.check_page import write_check_page
from turnwise.transport import RunDir, write_atomic

MakeContext = Callable[[RLConfig, Path, Progress, int | None], Context]


@dataclass(frozen=True)
class CheckOptions:
    """What the command line says beside the configuration."""

    only: tuple[str, ...] = ()
    """Names of checks; what they need is run too."""

    rollouts: int | None = None
    """Rollouts that are played."""

    json: str | None = None
    """A file, or `-` for stdout."""

    output: Path | None = None
    """A folder for check.json, check.md and the logs of what was started."""


def real_context(config: RLConfig, scratch: Path, say: Progress, rollouts: int | None) -> Context:
    return Context(config, scratch, say, rollouts=rollouts)


def check_command(args: Sequence[str], options: CheckOptions, make: MakeContext = real_context) -> int:
    """Run the checks on the configuration of a command line, and tell the results.

    Returns:
        The exit code: 0 where nothing failed, 1 otherwise.

    Raises:
        ConfigError: the command line or the configuration cannot be read.
    """
    if options.rollouts is not None and options.rollouts < 1:
        raise ConfigError(f"--rollouts {options.rollouts}: at least one rollout is needed.")
    checks = chosen(options.only)
    request = read_command(args)
    config = check(request)
    for line in (*request.notices, *request.changes, *go_offline_without_hub()):
        print(line, file=sys.stderr)
    console = TerminalConsole(stderr=options.json == "-")
    view = make_view(console)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="turnwise-check-", ignore_cleanup_errors=True) as scratch:
        try:
            results = _results(checks, config, Path(scratch), view, options, make)
        finally:
            view.close()
            if options.output is not None:
                _keep_logs(Path(scratch), options.output)
    return _conclude(results, config, time.monotonic() - began, console, options)


def _results(
    checks: Sequence[Check], config: RLConfig, scratch: Path, view: View, options: CheckOptions, make: MakeContext
) -> list[Result]:
    with contextlib.closing(make(config, scratch, view.say, options.rollouts)) as context:
        return run_checks(checks, context, view.tell, view.begin)


def _conclude(results: Sequence[Result], config: RLConfig, seconds: float, console: Console, options: CheckOptions) -> int:
    console.print(conclusion(results, seconds), markup=False, highlight=False, soft_wrap=True)
    content = document(results, config, seconds)
    if options.json == "-":
        sys.stdout.write(as_json(content).decode())
    elif options.json is not None:
        write_atomic(Path(options.json), as_json(content))
    if options.output is not None:
        write_atomic(options.output / "check.json", as_json(content))
        console.print(f"Page: {write_check_page(options.output)}", markup=False, highlight=False, soft_wrap=True)
    return 1 if first_failure(results) else 0


def _keep_logs(scratch: Path, output: Path) -> None:
    logs = RunDir(scratch).logs
    if logs.is_dir():
        shutil.copytree(logs, output / "check-logs", dirs_exist_ok=True)
