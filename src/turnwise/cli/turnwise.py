"""`turnwise`: everything beside training. Parses and prints; the work is done elsewhere."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from turnwise import __version__
from turnwise.config import ConfigError
from turnwise.config.files import Tables


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
    if rest and options.command not in ("play", "eval", "sweep"):
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
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    envs = commands.add_parser("envs", help="list the environments that are installed")
    envs.add_argument("--json", action="store_true", help="as JSON")
    envs.set_defaults(run=_envs)

    play = commands.add_parser(
        "play", help="play an environment yourself", epilog="Arguments of the environment follow: --max_guesses 8"
    )
    play.add_argument("id", help="name, or package.module:Class")
    play.add_argument("--seed", type=int, help="seed of the episode")
    play.set_defaults(run=_play)

    model = commands.add_parser("model", help="prepare a model in the cache (smollm2-135m), or check a folder")
    model.add_argument("name")
    model.set_defaults(run=_model)

    evaluate = commands.add_parser(
        "eval", help="evaluate a checkpoint on held-out tasks", usage="turnwise eval @ FILE [--checkpoint DIR] [--flags]"
    )
    evaluate.add_argument("--checkpoint", type=Path, help="a checkpoints/step_N folder; the untrained model when not given")
    evaluate.add_argument("--json", type=Path, help="also write the result to this file")
    evaluate.set_defaults(run=_eval)

    sweep = commands.add_parser(
        "sweep",
        help="make the runs of a sweep file, and compare them",
        usage="turnwise sweep @ FILE [--seeds N] [--only ID,ID] [--dry-run [--json]] [--retry] [--plain] [--flags of every run]",
        epilog="The same command goes on with a sweep that was interrupted, killed or cut off by a reboot. docs/sweeps.md",
        allow_abbrev=False,
    )
    sweep.add_argument("--seeds", type=int, metavar="N", help="repeat each experiment with the seeds 0 to N - 1")
    sweep.add_argument("--only", default="", metavar="ID,ID", help="these experiments alone")
    sweep.add_argument("--output-dir", type=Path, metavar="DIR", help="folder of the sweep")
    sweep.add_argument("--dry-run", action="store_true", help="print each run with its arithmetic; start nothing")
    sweep.add_argument("--json", action="store_true", help="with --dry-run: as one JSON object")
    sweep.add_argument("--retry", action="store_true", help="try again what has failed max_attempts times")
    sweep.add_argument("--plain", action="store_true", help="lines instead of the live table")
    sweep.set_defaults(run=_sweep)

    report = commands.add_parser("report", help="write report.md of a run")
    report.add_argument("run_folder", metavar="RUN", type=Path, help="output folder of the run")
    report.set_defaults(run=_report)
    return parser


def _envs(options: argparse.Namespace, _rest: Sequence[str]) -> int:
    from turnwise.envs import registered

    known = registered()
    if options.json:
        print(json.dumps(known, indent=2))
        return 0
    width = max(map(len, known), default=0)
    for name, description in known.items():
        print(f"{name:<{width}}  {description}")
    return 0


def _play(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from turnwise.envs import make
    from turnwise.envs.play import play

    play(make(options.id, env_arguments(rest)), seed=options.seed)
    return 0


def _model(options: argparse.Namespace, _rest: Sequence[str]) -> int:
    from turnwise.launch.models import resolve_model

    print(resolve_model(options.name, lambda text: print(text, file=sys.stderr)))
    return 0


def _eval(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from turnwise.config.command import check, read_command
    from turnwise.launch.evaluation import evaluate, print_evaluation

    request = read_command(rest)
    for notice in request.notices:
        print(notice, file=sys.stderr)
    result = evaluate(check(request), options.checkpoint, lambda text: print(text, file=sys.stderr))
    print_evaluation(result["metrics"])
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


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


def _report(options: argparse.Namespace, _rest: Sequence[str]) -> int:
    from turnwise.launch.run_folder import run_dir_of
    from turnwise.report import write_report

    print(write_report(run_dir_of(options.run_folder).root))
    return 0


def env_arguments(args: Sequence[str]) -> Tables:
    """`--max-guesses 8 --answers '["frost"]'` -> arguments of an environment; values are JSON where they read as JSON.

    Raises:
        ConfigError: the line is not a row of `--name value`.
    """
    found: Tables = {}
    tokens = iter(args)
    for token in tokens:
        if not token.startswith("--"):
            raise ConfigError(f"{token}: arguments of the environment are given as --name value")
        name, equals, text = token[2:].partition("=")
        value = text if equals else next(tokens, None)
        if value is None:
            raise ConfigError(f"{token} needs a value")
        try:
            found[name.replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            found[name.replace("-", "_")] = value
    return found


if __name__ == "__main__":
    main()
