"""A shell that stays open: commands go in as text, and come back framed by random markers.

The shell is given one line for each command:

    printf '\\n%s\\n' BEGIN; command eval '…' </dev/null 2>&1; printf '\\n%s %d\\n' END "$?"

Both markers are drawn anew for each command, so nothing that a command prints can pass for its end, and what a background process
of an earlier command prints stands before BEGIN and is dropped. The shell has read the whole line before it runs any of it, so
nothing is in its input that a child could read. stderr goes into stdout at the shell, in the order of writing. `command` keeps a
syntax error from ending a POSIX shell.
"""

import re
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from turnwise.containers.channel import Channel

MARKER_BYTES = 16
BEGIN_S = 20.0  # for a shell to read a line; it needs a microsecond, an overloaded machine seconds
STATUS = re.compile(rb"(\d{1,3})\n")
END_TAIL = 8  # an exit status of up to three digits, a newline, and room


class Stop(StrEnum):
    """Why reading a command's output stopped."""

    END = "end"  # the marker came
    EOF = "eof"  # the shell ended
    TIMEOUT = "timeout"
    FLOOD = "flood"  # more output than anybody should have to read


@dataclass(frozen=True)
class Reply:
    """What a shell answered."""

    stop: Stop
    exit_code: int | None  # None unless the marker came
    output: bytes
    cut: int  # bytes left out of the middle of the output
    began: bool  # False: the command certainly did not run


class Bounded:
    """The first and the last bytes of a stream, however long it is."""

    def __init__(self, limit: int):
        self._half = limit // 2
        self._head = bytearray()
        self._tail = bytearray()
        self._tail_limit = limit - self._half
        self.total = 0

    def add(self, data: bytes) -> None:
        """Take the next bytes of the stream."""
        self.total += len(data)
        room = self._half - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        self._tail += data
        if len(self._tail) > 2 * self._tail_limit:  # trimmed seldom, so that a byte is moved once or twice
            self._trim()

    def _trim(self) -> None:
        if len(self._tail) > self._tail_limit:
            del self._tail[: len(self._tail) - self._tail_limit]

    def take(self) -> tuple[bytes, int]:
        """What was kept, and how many bytes between its halves were not."""
        self._trim()
        cut = self.total - len(self._head) - len(self._tail)
        if not cut:
            return bytes(self._head + self._tail), 0
        return bytes(self._head) + f"\n[... {cut} bytes left out ...]\n".encode() + bytes(self._tail), cut


def quote(command: str) -> bytes:
    """A text as one word of a shell. Raises ValueError for a NUL, which no shell can hold."""
    if "\0" in command:
        raise ValueError("the command contains a NUL character, which no shell can run; remove it")
    return b"'" + command.encode("utf-8", "surrogateescape").replace(b"'", b"'\\''") + b"'"


class Shell:
    """One shell at the other end of a channel. Not thread-safe: one command at a time."""

    def __init__(self, channel: Channel):
        self._channel = channel

    def run(
        self,
        command: str,
        *,
        timeout_s: float,
        max_bytes: int,
        flood_bytes: int,
        stdin: Iterable[bytes] | None = None,
    ) -> Reply:
        """Run a command in the shell itself, so that directories and variables stay.

        Args:
            command: in the shell's language; may have several lines.
            timeout_s: for all of it; afterwards the shell is in no known state.
            max_bytes: how much of the output to keep.
            flood_bytes: where reading stops altogether; afterwards the shell is in no known state.
            stdin: what the command reads. The shell ends after such a command, so that what it leaves unread is never run.
        """
        begin, end = secrets.token_hex(MARKER_BYTES).encode(), secrets.token_hex(MARKER_BYTES).encode()
        deadline = time.monotonic() + timeout_s
        rest = b" </dev/null" if stdin is None else b""
        after = b"" if stdin is None else b"; exit"
        line = b"printf '\\n%%s\\n' %s; command eval %s%s 2>&1; printf '\\n%%s %%d\\n' %s \"$?\"%s\n"
        reader = _Reader(self._channel, deadline, Bounded(max_bytes), flood_bytes)
        try:
            self._channel.send(line % (begin, quote(command), rest, end, after), deadline)
            reader.skip_to(b"\n" + begin + b"\n", min(deadline, time.monotonic() + BEGIN_S))
            for chunk in stdin or ():
                self._channel.send(chunk, deadline)
            code = reader.read_to(end)
        except TimeoutError:
            return reader.reply(Stop.TIMEOUT)
        except _Flood:
            return reader.reply(Stop.FLOOD)
        except EOFError:
            return reader.reply(Stop.EOF)
        return reader.reply(Stop.END, code)

    def close(self) -> None:
        """Let go of the channel."""
        self._channel.close()


class _Flood(Exception):
    """More output than anybody should have to read."""


class _Reader:
    """Reads what stands between two markers."""

    def __init__(self, channel: Channel, deadline: float, kept: Bounded, flood_bytes: int):
        self._channel, self._deadline, self._kept, self._flood = channel, deadline, kept, flood_bytes
        self._read = 0
        self._pending = b""
        self._began = False

    def _more(self, deadline: float) -> None:
        data = self._channel.receive(deadline)
        if not data:
            raise EOFError
        self._read += len(data)
        self._pending += data

    def skip_to(self, marker: bytes, deadline: float) -> None:
        while True:
            found = self._pending.find(marker)
            if found >= 0:
                self._pending = self._pending[found + len(marker) :]
                self._began = True
                return
            self._pending = self._pending[-len(marker) :]
            self._check_flood()
            self._more(deadline)

    def read_to(self, marker: bytes) -> int:
        mark = b"\n" + marker + b" "
        overlap = len(mark) + END_TAIL
        while True:
            if (found := self._find(mark)) is not None:
                start, status = found
                self._kept.add(self._pending[:start])
                self._pending = self._pending[status.end() :]
                return int(status[1])
            settled = len(self._pending) - overlap
            if settled > 0:
                self._kept.add(self._pending[:settled])
                self._pending = self._pending[settled:]
            self._check_flood()
            self._more(self._deadline)

    def _find(self, mark: bytes) -> tuple[int, re.Match[bytes]] | None:
        """Where a whole end stands, and its status. One pattern for all: each new one takes longer to compile than a command."""
        start = self._pending.find(mark)
        while start >= 0:
            if (status := STATUS.match(self._pending, start + len(mark))) is not None:
                return start, status
            start = self._pending.find(mark, start + 1)
        return None

    def _check_flood(self) -> None:
        if self._read > self._flood:
            raise _Flood

    def reply(self, stop: Stop, code: int | None = None) -> Reply:
        if stop is not Stop.END and self._began:
            self._kept.add(self._pending)
            self._pending = b""
        output, cut = self._kept.take()
        return Reply(stop, code, output, cut, self._began)
