"""`turnwise envs`: the environments that a configuration can name, and one of them in detail."""

import argparse
import dataclasses
import json
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from turnwise.cli.arguments import AddCommand, env_arguments
from turnwise.config import ConfigError

if TYPE_CHECKING:
    from turnwise.envs.describe import Argument, Description, Split
    from turnwise.envs.messages import Tool

WIDTH = 120
LISTED_CHARACTERS = 200  # of a reason why tasks cannot be counted; `turnwise envs NAME` shows all of it
SHOWN_CHARACTERS = 60  # of a default; prompts are longer
OFFLINE = "Nothing is downloaded to count tasks; HF_HUB_OFFLINE=0 allows it."


def add_command(add: AddCommand) -> None:
    """Add the subcommand."""
    parser = add(
        "envs",
        help="list the environments that are installed, or describe one",
        usage="turnwise envs [NAME [--argument value ...]] [--json]",
        epilog=OFFLINE,
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="a name, package.module:Class or SCHEME:NAME, to be described")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace, rest: Sequence[str]) -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before an environment's libraries read it
    if options.name is not None:
        return _one(options.name, env_arguments(rest), as_json=options.json)
    if rest:
        raise ConfigError(f"unrecognized arguments: {' '.join(rest)}; name an environment in front of its arguments")
    return _all(as_json=options.json)


def _all(*, as_json: bool) -> int:
    from turnwise.envs.describe import describe
    from turnwise.envs.registry import adapters, names

    described = [describe(name) for name in names()]
    if as_json:
        print(_json({"environments": [_table(one) for one in described], "adapters": adapters()}))
        return 0
    for one in described:
        print(_summary(one, problem_chars=LISTED_CHARACTERS))
    for scheme, text in adapters().items():
        print(f"{scheme}:NAME\n{_indented(text)}")
    print("`turnwise envs NAME` shows arguments, tools and rewards; `turnwise play NAME` plays it.")
    if any(split.size is None for one in described for split in one.splits):
        print(OFFLINE)
    return 0


def _one(name: str, args: Mapping[str, Any], *, as_json: bool) -> int:
    from turnwise.envs.describe import describe

    described = describe(name, args)
    print(_json(_table(described)) if as_json else _details(described))
    return 2 if described.problem else 0


def _table(described: "Description") -> dict[str, Any]:
    return {**dataclasses.asdict(described), "tools": [tool.spec()["function"] for tool in described.tools]}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)  # a default may be a path


def _summary(described: "Description", *, problem_chars: int | None = None) -> str:
    def told(problem: str) -> str:
        return problem if problem_chars is None else textwrap.shorten(problem, problem_chars, placeholder=" …")

    lines = [described.id, _indented(described.text)]
    if described.splits:
        lines.append(_indented(f"tasks: {', '.join(_size(split) for split in described.splits)}"))
        lines += [_indented(f"{split.name}: {told(split.problem)}", depth=8) for split in described.splits if split.problem]
    if described.tools:
        lines.append(_indented(f"tools: {', '.join(tool.name for tool in described.tools)}"))
    if described.problem:
        lines.append(_indented(f"cannot be made: {told(described.problem)}"))
    else:
        lines.append(_indented(f"outcome: {', '.join(described.outcome_components)}"))
    return "\n".join(line for line in lines if line)


def _details(described: "Description") -> str:
    lines = [_summary(described)]
    if described.max_turns is not None:
        where = ", in a container each" if described.uses_containers else ""
        lines.append(_indented(f"an episode: at most {described.max_turns} replies{where}"))
    lines.append(_indented(f"class: {described.target}"))
    if described.components:
        paid = [f"{name} (outcome)" if name in described.outcome_components else name for name in described.components]
        lines.append(_indented(f"reward components: {', '.join(paid)}"))
    if described.arguments:
        lines += ["", "Arguments (args of [[orchestrator.env]]; --name value for `turnwise play`):"]
        lines += [_argument(argument) for argument in described.arguments]
    if described.tools:
        lines += ["", "Tools:", *(_tool(tool) for tool in described.tools)]
    return "\n".join(lines)


def _size(split: "Split") -> str:
    return f"{split.name} {'?' if split.size is None else format(split.size, ',')}"


def _argument(argument: "Argument") -> str:
    default = textwrap.shorten(repr(argument.default), SHOWN_CHARACTERS, placeholder=" …")
    value = "" if argument.required else f" = {default}"
    annotation = f": {argument.annotation}" if argument.annotation else ""
    return f"{_indented(f'{argument.name}{annotation}{value}')}\n{_indented(argument.text, depth=8)}".rstrip()


def _tool(tool: "Tool") -> str:
    from turnwise.envs.typed_calls import signature

    schema = json.dumps(tool.parameters, ensure_ascii=False)
    return "\n".join([_indented(signature(tool)), _indented(tool.description, depth=8), _indented(schema, depth=8)])


def _indented(text: str, *, depth: int = 4) -> str:
    lines = (textwrap.wrap(line, WIDTH - depth, break_long_words=False, break_on_hyphens=False) for line in text.splitlines())
    return textwrap.indent("\n".join(line for wrapped in lines for line in wrapped), " " * depth)
