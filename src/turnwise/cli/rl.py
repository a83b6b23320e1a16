"""`rl @ a.toml @ b.toml --flags`: train."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from turnwise import __version__
from turnwise.config import ConfigError

if TYPE_CHECKING:
    from turnwise.config.command import Request

DESCRIPTION = """\
Train a language model in multi-turn environments.

  rl @ configs/quickstart.toml                      several @ files merge left to right
  rl @ FILE --max-steps 20 --seed 1                 flags beat files
  rl @ FILE --trainer.model.lora.rank 8             a key of a table; --no-wandb or None unsets one

  --dry-run   print processes, training arithmetic and memory; start nothing
  --resume    go on with the run in output_dir (its saved configuration, and the flags given now)
  --clean     delete the run in output_dir first
  --plain     lines instead of the live picture
  --json      with --dry-run: as one JSON object
  --version   print the version

Exit codes: 0 done, 1 failed, 2 wrong configuration, 3 interrupted with a checkpoint, 4 aborted by [stop], 130 ended at once.
Every key is described in docs/configuration.md."""

OPTIONS = ("--dry-run", "--resume", "--clean", "--plain", "--json")


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(args: Sequence[str]) -> int:
    """Run a command line; returns the exit code."""
    if "--help" in args or "-h" in args:
        return _help()
    if "--version" in args:
        return _version()
    if not args:
        print("rl: nothing to run. Try `rl @ configs/quickstart.toml`, or `rl --help`.", file=sys.stderr)
        return 2
    chosen = {option for option in OPTIONS if option in args}
    rest = [arg for arg in args if arg not in chosen]
    try:
        return _dispatch(rest, chosen)
    except ConfigError as error:
        print(f"rl: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `rl ... | head`: the reader has seen enough
        return 0
    except OSError as error:  # of `rl` itself, such as a full disk or a folder that may not be written
        print(f"rl: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the processes were started; from then on the supervisor takes it
        print("rl: interrupted before anything was started", file=sys.stderr)
        return 130


def _dispatch(rest: Sequence[str], chosen: set[str]) -> int:
    from turnwise.config.command import read_command

    if {"--resume", "--clean"} <= chosen:
        raise ConfigError("--resume and --clean contradict each other; give one of them.")
    request = read_command(rest)
    if "--dry-run" in chosen:
        return _dry_run(request, as_json="--json" in chosen)
    from turnwise.launch.run import Options, run

    command = shlex.join([*_name(), *rest])
    return run(request, Options("--resume" in chosen, "--clean" in chosen, "--plain" in chosen, command))


def _name() -> list[str]:
    """How this command was called: `rl` where that is found on the path, elsewhere its path, or the module that was run."""
    called, found = Path(sys.argv[0]), shutil.which("rl")
    if found and Path(found).resolve() == called.resolve():
        return ["rl"]
    return [sys.executable, "-m", "turnwise.cli.rl"] if called.resolve() == Path(__file__).resolve() else [str(called)]


def _dry_run(request: "Request", *, as_json: bool) -> int:
    from turnwise.config.command import check
    from turnwise.launch.dry_run import dry_run
    from turnwise.launch.hub import go_offline_without_hub

    config = check(request)
    for line in (*request.notices, *request.changes, *go_offline_without_hub()):
        print(line, file=sys.stderr)
    dry_run(config, as_json=as_json)
    return 0


def _version() -> int:
    print(f"turnwise {__version__}")
    return 0


def _help() -> int:
    from turnwise.config.reference import help_text

    print(f"{DESCRIPTION}\n\n{help_text()}", end="")
    return 0


if __name__ == "__main__":
    main()
