"""Editing commands for an agent without a terminal: an open file seen through a window, edits by line numbers."""

import posixpath
import shlex
from collections.abc import Callable
from dataclasses import dataclass

from turnwise.containers import Box, Ending, TransferRefused
from turnwise.envs.mlgym.protocol import Command, Refused

WINDOW = 100  # lines shown at once
MAX_FILE = 4 << 20  # bytes of a file that is opened
MAX_HITS = 100
TOOL_S = 20.0  # for a search, and for a check of Python's grammar
CHECK = "import ast, sys; ast.parse(open(sys.argv[1], encoding='utf-8').read(), sys.argv[1])"

HELP = """open PATH [LINE]              open a file, at a line
goto LINE                     show the window around a line
scroll_up, scroll_down        move the window
create PATH                   make an empty file and open it
search_dir TEXT [FOLDER]      lines with TEXT in the files below a folder
search_file TEXT [PATH]       lines with TEXT in a file, the open one by default
find_file NAME [FOLDER]       files of that name, * and ? stand for any characters
edit FIRST:LAST               replace lines FIRST to LAST of the open file by the lines that follow, up to end_of_edit
insert LINE                   insert the lines that follow, up to end_of_insert, after LINE (0: at the beginning)"""


@dataclass
class Opened:
    """The file in the window."""

    path: str
    first: int = 1  # line at the top of the window


class Editor:
    """The editing commands of one episode. Files are read and written through the container, never by this process."""

    def __init__(self, box: Box, *, window: int = WINDOW) -> None:
        self.box, self.window = box, window
        self.opened: Opened | None = None

    def run(self, command: Command, folder: str) -> str:
        """Do an editing command in a working directory; returns what the agent sees.

        Raises:
            Refused: its arguments make no sense, or there is no such file; nothing has changed.
            ContainerGone, EngineDown: as `Box.run`.
        """
        actions: dict[str, Callable[[Command, str], str]] = {
            "open": self._open,
            "goto": self._goto,
            "scroll_up": lambda *_: self._scroll(-self.window),
            "scroll_down": lambda *_: self._scroll(self.window),
            "create": self._create,
            "search_dir": self._search_dir,
            "search_file": self._search_file,
            "find_file": self._find_file,
            "edit": self._edit,
            "insert": self._insert,
        }
        return actions[command.name](command, folder)

    def _open(self, command: Command, folder: str) -> str:
        path, *line = _arguments(command, 1, 2)
        opened = Opened(posixpath.join(folder, path))
        lines = self._lines(opened.path)
        self.opened = opened
        return self._show(lines, _number(line[0], "LINE") if line else 1)

    def _create(self, command: Command, folder: str) -> str:
        (path,) = _arguments(command, 1, 1)
        whole = posixpath.join(folder, path)
        if self.box.run(f"test -e {shlex.quote(whole)}", timeout_s=TOOL_S).ending is Ending.OK:
            raise Refused(f"{path} is there already; open it.")
        self._write(whole, "")
        self.opened = Opened(whole)
        return self._show([], 1)

    def _goto(self, command: Command, folder: str) -> str:
        (line,) = _arguments(command, 1, 1)
        return self._show(self._lines(self._current().path), _number(line, "LINE"))

    def _scroll(self, by: int) -> str:
        opened = self._current()
        lines = self._lines(opened.path)
        opened.first = max(1, min(opened.first + by, len(lines)))
        return self._window(lines)

    def _edit(self, command: Command, folder: str) -> str:
        (span,) = _arguments(command, 1, 1)
        first, colon, last = span.partition(":")
        if not colon:
            raise Refused("edit needs the lines that it replaces, as in `edit 3:5`.")
        lines = self._lines(self._current().path)
        start, end = _number(first, "FIRST"), _number(last, "LAST")
        if not 1 <= start <= max(1, len(lines)) or end < start - 1 or end > len(lines):
            raise Refused(f"edit {span}: the file has the lines 1 to {len(lines)}; an empty file is filled with `insert 0`.")
        return self._replace(lines, start - 1, end, command.body)

    def _insert(self, command: Command, folder: str) -> str:
        (line,) = _arguments(command, 1, 1)
        lines, after = self._lines(self._current().path), _number(line, "LINE")
        if not 0 <= after <= len(lines):
            raise Refused(f"insert {after}: the file has {len(lines)} lines.")
        return self._replace(lines, after, after, command.body)

    def _replace(self, lines: list[str], start: int, end: int, body: str) -> str:
        opened = self._current()
        new = body.splitlines()
        changed = [*lines[:start], *new, *lines[end:]]
        text = "".join(f"{line}\n" for line in changed)
        trouble = self._trouble(opened.path, text)
        if trouble:
            raise Refused(
                f"Nothing was changed: with this edit {posixpath.basename(opened.path)} would not be Python.\n{trouble}"
            )
        self._write(opened.path, text)
        return f"Replaced {end - start} lines by {len(new)}.\n{self._show(changed, start + 1)}"

    def _trouble(self, path: str, text: str) -> str:
        """What is wrong with a Python file; checked in the container, since a parser can be made to crash."""
        if not path.endswith(".py"):
            return ""
        draft = f"{path}.turnwise-draft"
        self._write(draft, text)
        quoted = shlex.quote(draft)
        done = self.box.run(f"python3 -c {shlex.quote(CHECK)} {quoted}; code=$?; rm -f {quoted}; (exit $code)", timeout_s=TOOL_S)
        if done.ending is Ending.OK:
            return ""
        return "\n".join(done.output.replace(".turnwise-draft", "").splitlines()[-4:])

    def _search_dir(self, command: Command, folder: str) -> str:
        text, *where = _arguments(command, 1, 2)
        place = posixpath.join(folder, where[0]) if where else folder
        return self._grep(f"grep -rnIF -e {shlex.quote(text)} -- {shlex.quote(place)}", text)

    def _search_file(self, command: Command, folder: str) -> str:
        text, *where = _arguments(command, 1, 2)
        path = posixpath.join(folder, where[0]) if where else self._current().path
        return self._grep(f"grep -nIF -e {shlex.quote(text)} -- {shlex.quote(path)}", text)

    def _find_file(self, command: Command, folder: str) -> str:
        name, *where = _arguments(command, 1, 2)
        place = posixpath.join(folder, where[0]) if where else folder
        return self._grep(f"find {shlex.quote(place)} -name {shlex.quote(name)} | grep .", name)

    def _grep(self, line: str, text: str) -> str:
        done = self.box.run(f"({line}) 2>&1 | head -n {MAX_HITS + 1}", timeout_s=TOOL_S)
        hits = done.output.splitlines()
        if not hits:
            return f"Nothing found for {text!r}."
        more = [f"(more than {MAX_HITS}; search for something rarer)"] if len(hits) > MAX_HITS else []
        return "\n".join([*hits[:MAX_HITS], *more])

    def _current(self) -> Opened:
        if self.opened is None:
            raise Refused("No file is open; open one first.")
        return self.opened

    def _lines(self, path: str) -> list[str]:
        try:
            return self.box.read(posixpath.normpath(path), max_bytes=MAX_FILE).decode(errors="replace").splitlines()
        except TransferRefused as error:
            raise Refused(f"{path} cannot be opened: {error}.") from error

    def _write(self, path: str, text: str) -> None:
        whole = posixpath.normpath(path)
        try:
            self.box.put({posixpath.basename(whole): text.encode()}, posixpath.dirname(whole))
        except TransferRefused as error:
            raise Refused(f"{path} cannot be written: {error}.") from error

    def _show(self, lines: list[str], line: int) -> str:
        """The window around a line."""
        opened = self._current()
        opened.first = max(1, min(line - self.window // 2, len(lines) - self.window + 1))
        return self._window(lines)

    def _window(self, lines: list[str]) -> str:
        opened = self._current()
        last = min(len(lines), opened.first + self.window - 1)
        shown = [f"{number}: {lines[number - 1]}" for number in range(opened.first, last + 1)]
        head = f"[{opened.path}, {len(lines)} lines]"
        above = [f"({opened.first - 1} more lines above)"] if opened.first > 1 else []
        below = [f"({len(lines) - last} more lines below)"] if last < len(lines) else []
        return "\n".join([head, *above, *shown, *below])


def _arguments(command: Command, least: int, most: int) -> tuple[str, ...]:
    if not least <= len(command.arguments) <= most:
        usage = next(line for line in HELP.splitlines() if command.name in line.split("  ")[0])
        raise Refused(f"{command.name} was given {len(command.arguments)} arguments; {usage}")
    return command.arguments


def _number(text: str, what: str) -> int:
    if not text.strip().isascii() or not text.strip().isdigit() or len(text) > 9:
        raise Refused(f"{what} must be a number, not {text!r}.")
    return int(text)
