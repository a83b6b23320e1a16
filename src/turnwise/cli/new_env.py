"""`turnwise new-env NAME`: write the package of a new environment, and say what to do with it."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from turnwise.cli.arguments import AddCommand

EPILOG = (
    "The package has an entry point, tests, and a configuration that trains on a CPU. docs/environments.md goes on from there."
)


def add_command(add: AddCommand) -> None:
    """Add the subcommand."""
    parser = add("new-env", help="write the package of a new environment", epilog=EPILOG, allow_abbrev=False)
    parser.add_argument("name", metavar="NAME", help="of the environment and its Python package, such as my_game")
    parser.add_argument("--tools", action="store_true", help="an environment with tools instead of a plain text game")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where the package goes (./NAME); must not exist")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace, _rest: Sequence[str]) -> int:
    from turnwise.scaffold import Kind, write_package

    folder: Path = options.folder or Path(options.name)
    for file in write_package(options.name, folder, Kind.TOOLS if options.tools else Kind.GAME):
        print(file)
    print(_next_commands(options.name, folder))
    return 0


def _next_commands(name: str, folder: Path) -> str:
    shown = shlex.quote(str(folder))
    config = shlex.quote(str(folder / "configs" / "cpu.toml"))
    return f"""
Next:
    pip install -e {shown}
    turnwise envs {name}
    turnwise play {name}
    pytest {shown}
    rl @ {config}"""
