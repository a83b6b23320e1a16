"""One action of an agent: free text and exactly one fenced block that holds one command."""

import re
import shlex
from dataclasses import dataclass
from enum import StrEnum

QUICK_S = 25.0  # for a command that trains nothing

_BLOCK = re.compile(r"^```[^\n`]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)
_TRAINS = re.compile(r"\b(python3?|torchrun|accelerate|deepspeed)\b")
_INTERACTIVE = frozenset({"vim", "vi", "nano", "emacs", "less", "more", "top", "htop", "man", "nohup", "git", "tmux", "screen"})
_BARE = frozenset({"python", "python3", "ipython", "bash", "sh", "zsh", "dash"})  # refused without arguments


class Kind(StrEnum):
    """What a command is to the environment."""

    SHELL = "shell"
    EDITOR = "editor"
    VALIDATE = "validate"
    SUBMIT = "submit"
    SKIP = "skip"
    FORFEIT = "exit_forfeit"


EDITOR_COMMANDS = frozenset(
    {"open", "goto", "scroll_up", "scroll_down", "create", "search_dir", "search_file", "find_file", "edit", "insert"}
)
_ALONE = {kind.value: kind for kind in (Kind.VALIDATE, Kind.SUBMIT, Kind.SKIP, Kind.FORFEIT)}


@dataclass(frozen=True)
class Command:
    """A command that can be tried."""

    kind: Kind
    text: str
    name: str  # its first word
    arguments: tuple[str, ...] = ()  # of an editor command, from its first line
    body: str = ""  # the lines between the first and the end mark of `edit` and `insert`

    @property
    def trains(self) -> bool:
        """Whether it may take as long as a training."""
        return _TRAINS.search(self.text) is not None


class FormatError(ValueError):
    """The action holds no single command; the text tells the agent what to do."""


class Refused(ValueError):
    """The command is understood and not run; the text tells the agent why."""


def parse_action(action: str) -> Command:
    """The command of an action.

    Raises:
        FormatError: there is no block, more than one, or an empty one.
        Refused: a command that waits for a person, an editor command without its end, or one that takes no arguments.
    """
    blocks = _BLOCK.findall(action)
    if len(blocks) != 1:
        found = "no block" if not blocks else f"{len(blocks)} blocks"
        raise FormatError(f"Your reply has {found} between ``` marks; it must have exactly one, which holds one command.")
    text = str(blocks[0]).strip("\n")
    first = text.strip().split("\n", 1)[0].strip()
    if not first:
        raise FormatError("The block between the ``` marks is empty; write one command into it.")
    name = first.split()[0]
    if name in _ALONE:
        return _alone(name, text)
    if name in EDITOR_COMMANDS:
        return _editor_command(name, text.strip())
    _refuse_interactive(name, first, text)
    return Command(Kind.SHELL, text, name)


def _alone(name: str, text: str) -> Command:
    if text.strip() != name:
        raise Refused(f"{name} takes no arguments and stands alone in its block.")
    return Command(_ALONE[name], text, name)


def _editor_command(name: str, text: str) -> Command:
    head, _, rest = text.partition("\n")
    body = ""
    if name in ("edit", "insert"):
        end = f"end_of_{name}"
        lines = rest.split("\n")
        if not rest or lines[-1].strip() != end:
            raise Refused(f"{name} needs the new lines below it and `{end}` as the last line of the block.")
        body = "".join(f"{line}\n" for line in lines[:-1])
    elif rest.strip():
        raise Refused(f"{name} is one line; write one command in a block.")
    try:
        arguments = tuple(shlex.split(head)[1:])
    except ValueError as error:
        raise Refused(f"{name}: its arguments cannot be read ({error}).") from error
    return Command(Kind.EDITOR, text, name, arguments, body)


def _refuse_interactive(name: str, first: str, text: str) -> None:
    if name in _INTERACTIVE:
        raise Refused(f"{name} is not available here: nobody can answer it. Use the editing commands, or a command that ends.")
    if name in _BARE and first == name and "\n" not in text:
        raise Refused(f"{name} without arguments waits for input. Write a file and run it.")
