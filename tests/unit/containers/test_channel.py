"""Channels: frames of an engine, deadlines, ends."""

import socket
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.containers.channel import MAX_FRAME, PipeChannel, SocketChannel


def frame(payload: bytes, stream: int = 1) -> bytes:
    return bytes([stream, 0, 0, 0]) + len(payload).to_bytes(4, "big") + payload


@pytest.fixture
def pair() -> Iterator[tuple[SocketChannel, socket.socket]]:
    ours, theirs = socket.socketpair()
    channel = SocketChannel(ours, lambda: None)
    yield channel, theirs
    channel.close()
    theirs.close()


def soon() -> float:
    return time.monotonic() + 10


@given(payloads=st.lists(st.binary(min_size=0, max_size=40), max_size=6), step=st.integers(1, 30))
@settings(deadline=None)
def test_payloads_of_frames_arrive_whole_however_they_are_sent(payloads: list[bytes], step: int):
    ours, theirs = socket.socketpair()
    channel = SocketChannel(ours, lambda: None)
    sent = b"".join(frame(payload, 1 + index % 2) for index, payload in enumerate(payloads))
    for start in range(0, len(sent), step):
        theirs.sendall(sent[start : start + step])
    theirs.close()
    received = b""
    while more := channel.receive(soon()):
        received += more
    channel.close()
    assert received == b"".join(payloads)


def test_a_frame_of_absurd_length_is_the_end_and_not_a_wait(pair: tuple[SocketChannel, socket.socket]):
    channel, theirs = pair
    theirs.sendall(bytes([1, 0, 0, 0]) + (MAX_FRAME + 1).to_bytes(4, "big"))
    with pytest.raises(EOFError):
        channel.receive(soon())


def test_silence_is_a_timeout_and_a_closed_end_is_the_end(pair: tuple[SocketChannel, socket.socket]):
    channel, theirs = pair
    with pytest.raises(TimeoutError):
        channel.receive(time.monotonic() + 0.01)
    theirs.close()
    assert channel.receive(soon()) == b""
    with pytest.raises(EOFError):
        channel.send(b"x" * 10_000_000, soon())


def test_nobody_reading_is_a_timeout(pair: tuple[SocketChannel, socket.socket]):
    with pytest.raises(TimeoutError):
        pair[0].send(b"x" * 10**7, time.monotonic() + 0.02)


def test_closing_ends_a_read_in_another_thread(pair: tuple[SocketChannel, socket.socket]):
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pair[0].receive(soon())))
    reader.start()
    pair[0].close()
    pair[0].close()
    reader.join(10)
    assert got == [b""]


def test_pipes_have_deadlines_too():
    process = subprocess.Popen(["sleep", "60"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    channel = PipeChannel(process)
    with pytest.raises(TimeoutError):
        channel.receive(time.monotonic() + 0.01)
    with pytest.raises(TimeoutError):
        channel.send(b"x" * 10**6, time.monotonic() + 0.01)
    channel.close()
    channel.close()
    assert process.returncode == -9
