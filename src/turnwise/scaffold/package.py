"""The files of a new environment's package, from templates."""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from turnwise.config import ConfigError
from turnwise.scaffold.names import check_name, class_name

PATHS = {  # in the package, by template
    "common/pyproject.toml": "pyproject.toml",
    "common/README.md": "README.md",
    "common/cpu.toml": "configs/cpu.toml",
    "common/__init__.py": "src/{name}/__init__.py",
    "{kind}/env.py": "src/{name}/env.py",
    "{kind}/test_env.py": "tests/test_env.py",
}


class Kind(StrEnum):
    """What the environment is an example of."""

    GAME = "game"
    TOOLS = "tools"


@dataclass(frozen=True)
class Example:
    """What the files of one kind do not share with those of the other."""

    summary: str
    rewards: str
    seq_len: int
    max_tokens: int
    temperature: float
    max_steps: int
    num_eval: int
    weights: str = ""


EXAMPLES = {
    Kind.GAME: Example(
        summary="Find a hidden number; each wrong guess is answered 'Higher' or 'Lower'.",
        rewards="`win` is the outcome; `narrowed` pays the way, the same for every way; `format` costs words beside it.",
        seq_len=256,
        max_tokens=8,
        temperature=1.0,
        max_steps=12,
        num_eval=64,
        weights="{ format = 2.0 }",
    ),
    Kind.TOOLS: Example(
        summary="Look a person up in a directory, and answer in which room they are.",
        rewards="`answer` is the outcome; `looked_up` pays the way to it; `bad_call` costs calls that cannot be run.",
        seq_len=1024,
        max_tokens=40,
        temperature=0.7,
        max_steps=8,
        num_eval=32,
    ),
}


def files_of(name: str, kind: Kind) -> dict[str, str]:
    """The files of a package, by their paths in it.

    Args:
        name: of the environment and of its Python package.
        kind: which example.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined  # late: only this command needs it

    templates = Environment(
        loader=PackageLoader("turnwise.scaffold"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        autoescape=False,  # Python and TOML, not HTML
    )
    example = EXAMPLES[kind]
    values: dict[str, Any] = {**vars(example), "name": name, "class_name": class_name(name), "tools": kind is Kind.TOOLS}
    return {
        path.format(name=name): templates.get_template(f"{template.format(kind=kind)}.jinja").render(values)
        for template, path in PATHS.items()
    }


def write_package(name: str, folder: Path, kind: Kind) -> list[Path]:
    """Write the package of a new environment.

    Args:
        name: of the environment and of its Python package.
        folder: a folder that does not exist yet; its parents are made where they do not.
        kind: which example.

    Returns:
        The files.

    Raises:
        ConfigError: for a name that cannot be used, or a folder that exists.
        OSError: the folder cannot be written.
    """
    check_name(name)
    files = files_of(name, kind)
    try:
        folder.mkdir(parents=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"{folder} exists; nothing is overwritten. Choose another with --folder, or remove it.") from error
    for path, text in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return [folder / path for path in files]
