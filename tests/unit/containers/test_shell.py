"""Framing of commands: what hostile output can and cannot do."""

import re
import subprocess
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.containers.channel import PipeChannel
from turnwise.containers.shell import Bounded, Reply, Shell, Stop, quote

LINE = re.compile(rb"printf '\\n%s\\n' (\w+);.* printf '\\n%s %d\\n' (\w+) ", re.DOTALL)


class Scripted:
    """A channel whose output is made from the markers that it was sent."""

    def __init__(self, answer: Callable[[bytes, bytes], list[bytes]]):
        self._answer, self._left = answer, list[bytes]()
        self.markers: list[bytes] = []
        self.sent: list[bytes] = []

    def send(self, data: bytes, deadline: float) -> None:
        self.sent.append(data)
        if (found := LINE.match(data)) is not None:
            self.markers += found.groups()
            self._left = self._answer(*found.groups())

    def receive(self, deadline: float) -> bytes:
        if not self._left:
            raise TimeoutError
        return self._left.pop(0)

    def close(self) -> None:
        pass


def run(answer: Callable[[bytes, bytes], list[bytes]], *, max_bytes: int = 1000, flood_bytes: int = 10**6) -> Reply:
    return Shell(Scripted(answer)).run("x", timeout_s=5, max_bytes=max_bytes, flood_bytes=flood_bytes)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(edges)]


@given(output=st.binary(max_size=300), code=st.integers(0, 255), cuts=st.lists(st.integers(0, 500), max_size=8))
@settings(deadline=None)
def test_output_and_status_arrive_however_the_stream_is_cut(output: bytes, code: int, cuts: list[int]):
    reply = run(lambda begin, end: pieces(b"\n%b\n%b\n%b %d\n" % (begin, output, end, code), cuts))
    assert (reply.stop, reply.exit_code, reply.output, reply.cut) == (Stop.END, code, output, 0)


def test_what_background_processes_printed_before_is_dropped():
    assert run(lambda begin, end: [b"late news\n%b\nmine\n%b 0\n" % (begin, end)]).output == b"mine"


def test_markers_of_an_earlier_command_end_nothing():
    def replay(begin: bytes, end: bytes) -> list[bytes]:
        return [b"\n%b\n" % begin + b"".join(b"\n%b 0\n" % old for old in channel.markers[:-2]) + b"\n%b 1\n" % end]

    channel = Scripted(replay)
    shell = Shell(channel)
    for _ in range(3):
        reply = shell.run("x", timeout_s=5, max_bytes=1000, flood_bytes=10**6)
        assert reply.exit_code == 1
    assert len(set(channel.markers)) == 6


def test_a_marker_without_its_form_ends_nothing():
    def shown(begin: bytes, end: bytes) -> list[bytes]:  # as `set -x` would show it
        return [b"\n%b\n+ printf '\\n%%s %%d\\n' %b 0\n" % (begin, end), b"\n%b 7\n" % end]

    assert run(shown).exit_code == 7


def test_a_stream_that_ends_or_stays_silent_is_told_apart_from_a_command_that_never_began():
    assert run(lambda begin, end: [b"\n%b\nhalf" % begin, b""]).stop is Stop.EOF
    assert run(lambda begin, end: [b"\n%b\nhalf" % begin, b""]).began
    assert not run(lambda begin, end: [b"OCI runtime exec failed", b""]).began
    silent = run(lambda begin, end: [b"\n%b\nhalf" % begin])
    assert (silent.stop, silent.output, silent.exit_code) == (Stop.TIMEOUT, b"half", None)


def test_a_flood_is_not_read_to_its_end():
    def flood(begin: bytes, end: bytes) -> list[bytes]:
        return [b"\n%b\n" % begin, *([b"y\n" * 500] * 1000)]

    channel = Scripted(flood)
    reply = Shell(channel).run("yes", timeout_s=5, max_bytes=100, flood_bytes=5000)
    assert reply.stop is Stop.FLOOD
    assert len(channel._left) > 900
    assert len(reply.output) < 200


@given(data=st.binary(max_size=400), limit=st.integers(1, 100), cuts=st.lists(st.integers(0, 400), max_size=10))
@settings(deadline=None)
def test_the_first_and_last_bytes_are_kept_and_the_rest_is_counted(data: bytes, limit: int, cuts: list[int]):
    kept = Bounded(limit)
    for piece in pieces(data, cuts):
        kept.add(piece)
    output, cut = kept.take()
    assert cut == max(0, len(data) - limit)
    if cut:
        head, tail = limit // 2, limit - limit // 2
        assert output == data[:head] + b"\n[... %d bytes left out ...]\n" % cut + data[len(data) - tail :]
    else:
        assert output == data


def test_a_bounded_stream_holds_a_bounded_number_of_bytes():
    kept = Bounded(1000)
    for _ in range(1000):
        kept.add(b"x" * 999)
        assert len(kept._head) + len(kept._tail) <= 3 * 1000


def test_a_nul_in_a_command_is_refused():
    with pytest.raises(ValueError, match="NUL"):
        quote("echo \0")


def test_what_a_command_leaves_unread_of_its_input_is_not_run():
    channel = Scripted(lambda begin, end: [b"\n%b\n\n%b 0\n" % (begin, end)])
    Shell(channel).run("true", timeout_s=5, max_bytes=10, flood_bytes=100, stdin=[b"rm -rf x\n"])
    assert channel.sent[0].endswith(b"; exit\n")
    assert channel.sent[1:] == [b"rm -rf x\n"]


@pytest.fixture(scope="module")
def real() -> Iterator[Shell]:
    """A POSIX shell of this machine."""
    process = subprocess.Popen(["sh"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0)
    channel = PipeChannel(process)
    yield Shell(channel)
    channel.close()


def said(shell: Shell, command: str, timeout_s: float = 10) -> tuple[int | None, str]:
    reply = shell.run(command, timeout_s=timeout_s, max_bytes=10_000, flood_bytes=10**6)
    return reply.exit_code, reply.output.decode()


def test_folder_and_variables_stay(real: Shell):
    assert said(real, "cd /; x='a  b'\nf() { echo \"f $1\"; }") == (0, "")
    assert said(real, 'pwd; f "$x"') == (0, "/\nf a  b\n")


def test_errors_and_output_come_in_the_order_of_writing(real: Shell):
    assert said(real, "echo 1; echo 2 >&2; echo 3; (echo 4 >&2); false") == (1, "1\n2\n3\n4\n")


def test_a_syntax_error_does_not_end_the_shell(real: Shell):
    code, output = said(real, "if then '")
    assert code not in (0, None)
    assert "yntax" in output or "nterminated" in output
    assert said(real, "echo still") == (0, "still\n")


def test_a_command_reads_nothing_of_what_follows(real: Shell):
    assert said(real, "cat; read -r line; echo got=$line") == (0, "got=\n")


@given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=50))
@settings(deadline=None)
def test_any_text_reaches_the_shell_unchanged(real: Shell, text: str):
    word = quote(text).decode()
    assert said(real, f"printf %s {word}") == (0, text)


def test_a_deadline_holds_while_output_goes_on():
    process = subprocess.Popen(["sh"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0)
    channel = PipeChannel(process)
    reply = Shell(channel).run("while :; do echo x; sleep 0.01; done", timeout_s=0.1, max_bytes=100, flood_bytes=10**6)
    channel.close()
    assert (reply.stop, reply.began) == (Stop.TIMEOUT, True)
    assert reply.output.startswith(b"x\n")
