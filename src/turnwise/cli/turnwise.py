"""`turnwise`: everything beside training. Parses and prints; the work is done elsewhere."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from turnwise import __version__
from turnwise.cli import envs, new_env, serve_env
from turnwise.cli.arguments import AddCommand, env_arguments
from turnwise.config import ConfigError


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(args: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(args)
    if options.command is None:
        parser.print_help()
        return 2
    if rest and options.command not in ("envs", "play", "serve-env", "eval", "check", "sweep"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return options.run(options, rest)
    except (ConfigError, ValueError, FileNotFoundError) as error:
        print(f"turnwise {options.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `turnwise ... | head`: the reader has seen enough
        return 0
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="turnwise", description="Beside training (`rl @ FILE`): environments, models, evaluation, reports."
    )
    parser.add_argument("--version", action="version", version=f"turnwise {__version__}")
    add = parser.add_subparsers(dest="command", metavar="COMMAND").add_parser
    for add_command in (
        envs.add_command,
        new_env.add_command,
        serve_env.add_command,
        _add_play,
        _add_model,
        _add_eval,
        _add_check,
        _add_sweep,
        _add_compare,
        _add_report,
    ):
        add_command(add)
    return parser


def _add_play(add: AddCommand) -> None:
    parser = add("play", help="play an environment yourself", epilog="Arguments of the environment follow: --max_guesses 8")
    parser.add_argument("id", help="name, or package.module:Class")
    parser.add_argument("--seed", type=int, help="seed of the episode")
    parser.add_argument("--task", metavar="ID", help="the task, or the beginning of its id; drawn when not given")
    parser.set_defaults(run=_play)


def _play(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from turnwise.config import EnvConfig, OrchestratorConfig, RLConfig
    from turnwise.envs import make
    from turnwise.envs.containers import containers_of
    from turnwise.envs.play import choose_task, play

    arguments = env_arguments(rest)
    env = make(options.id, arguments)
    task = None if options.task is None else choose_task(env, options.task)
    config = RLConfig(orchestrator=OrchestratorConfig(env=[EnvConfig(id=options.id, args=arguments)]), run_name="play")
    with containers_of(config, lambda text: print(text, file=sys.stderr)) as env.containers:
        try:
            play(env, seed=options.seed, task=task)
        finally:
            env.close()
    return 0


def _add_model(add: AddCommand) -> None:
    parser = add("model", help="prepare a model in the cache (smollm2-135m), or check a folder")
    parser.add_argument("name")
    parser.set_defaults(run=_model)


def _model(options: argparse.Namespace, _rest: Sequence[str]) -> int:
    from turnwise.launch.models import resolve_model

    print(resolve_model(options.name, lambda text: print(text, file=sys.stderr)))
    return 0


def _add_eval(add: AddCommand) -> None:
    parser = add(
        "eval", help="evaluate a checkpoint on held-out tasks", usage="turnwise eval @ FILE [--checkpoint DIR] [--flags]"
    )
    parser.add_argument("--checkpoint", type=Path, help="a checkpoints/step_N folder; the untrained model when not given")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.set_defaults(run=_eval)


def _eval(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from turnwise.config.command import check, read_command
    from turnwise.launch.evaluation import evaluate, failures, print_evaluation

    request = read_command(rest)
    for notice in request.notices:
        print(notice, file=sys.stderr)
    result = evaluate(check(request), options.checkpoint, lambda text: print(text, file=sys.stderr))
    print_evaluation(result["metrics"])
    if failed := failures(result["rollouts"]):
        print(failed, file=sys.stderr)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def _add_check(add: AddCommand) -> None:
    parser = add(
        "check",
        help="find out before a run whether its configuration can learn",
        usage="turnwise check @ FILE [--only NAME,NAME] [--rollouts N] [--json FILE] [--output DIR] [--flags of the run]",
        epilog="Exit codes: 0 nothing failed, 1 something failed, 2 wrong configuration. docs/check.md",
        allow_abbrev=False,
    )
    parser.add_argument("--only", default="", metavar="NAME,NAME", help="these checks, and those that they need")
    parser.add_argument(
        "--rollouts", type=int, metavar="N", help="rollouts that are played; two batches within bounds by default"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the results to this file; - for stdout")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write check.json, check.md and logs there")
    parser.set_defaults(run=_check)


def _check(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from turnwise.diagnose.command import CheckOptions, check_command

    only = tuple(filter(None, options.only.split(",")))
    return check_command(rest, CheckOptions(only, options.rollouts, options.json, options.output))


def _add_sweep(add: AddCommand) -> None:
    parser = add(
        "sweep",
        help="make the runs of a sweep file, and compare them",
        usage="turnwise sweep @ FILE [--seeds N] [--only ID,ID] [--dry-run [--json]] [--retry] [--plain] [--flags of every run]",
        epilog="The same command goes on with a sweep that was interrupted, killed or cut off by a reboot. docs/sweeps.md",
        allow_abbrev=False,
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="repeat each experiment with the seeds 0 to N - 1")
    parser.add_argument("--only", default="", metavar="ID,ID", help="these experiments alone")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="folder of the sweep")
    parser.add_argument("--dry-run", action="store_true", help="print each run with its arithmetic; start nothing")
    parser.add_argument("--json", action="store_true", help="with --dry-run: as one JSON object")
    parser.add_argument("--retry", action="store_true", help="try again what has failed max_attempts times")
    parser.add_argument("--plain", action="store_true", help="lines instead of the live table")
    parser.set_defaults(run=_sweep)


def _sweep(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from turnwise.launch.sweep.run import SweepOptions, run_sweep

    if options.seeds is not None and options.seeds < 1:
        raise ConfigError(f"--seeds {options.seeds}: at least one seed is needed.")
    chosen = SweepOptions(
        dry_run=options.dry_run,
        as_json=options.json,
        plain=options.plain,
        retry=options.retry,
        seeds=options.seeds,
        output_dir=options.output_dir,
        only=tuple(filter(None, options.only.split(","))),
    )
    return run_sweep(rest, chosen)


def _add_compare(add: AddCommand) -> None:
    parser = add(
        "compare",
        help="compare runs: what differs, curves over seeds, and what each earns by the other's reward",
        epilog="Runs that differ by their seed alone are one arm; NAME=RUN puts a run into an arm by hand.",
    )
    parser.add_argument("runs", metavar="[NAME=]RUN", nargs="+", help="output folders of runs")
    parser.add_argument("--output", type=Path, default=Path("comparison"), metavar="DIR", help="where the pages go (comparison)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON instead of tables")
    parser.set_defaults(run=_compare)


def _compare(options: argparse.Namespace, _rest: Sequence[str]) -> int:
    from turnwise.report.compare import arms_of
    from turnwise.report.compare_page import write_compared

    named = [_named_run(text) for text in options.runs]
    page = write_compared(arms_of(named), options.output)
    if options.json:
        print(page.with_suffix(".json").read_text(), end="")
    else:
        _print_markdown(page)
    return 0


def _print_markdown(page: Path) -> None:
    """On a terminal as tables, elsewhere as it is."""
    from rich.console import Console
    from rich.markdown import Markdown

    text = page.read_text(encoding="utf-8").partition("## Curves")[0]
    console = Console()
    console.print(Markdown(text)) if console.is_terminal else print(text, end="")
    print(f"Pages and picture: {page}, {page.with_suffix('.html')}, {page.with_suffix('.png')}")


def _named_run(text: str) -> tuple[str | None, Path]:
    """`NAME=FOLDER`; a folder whose path has the sign in it stays whole."""
    name, equals, folder = text.partition("=")
    return (name, Path(folder)) if equals and name and not Path(text).exists() else (None, Path(text))


def _add_report(add: AddCommand) -> None:
    parser = add("report", help="write report.md of a run")
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="output folder of the run")
    parser.set_defaults(run=_report)


def _report(options: argparse.Namespace, _rest: Sequence[str]) -> int:
    from turnwise.launch.run_folder import run_dir_of
    from turnwise.report import write_report

    print(write_report(run_dir_of(options.run_folder).root))
    return 0


if __name__ == "__main__":
    main()
