"""Byte streams to a process in a container, with deadlines: over an engine's socket, or over pipes."""

import os
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

CHUNK = 1 << 16
FRAME_HEADER = 8  # one byte for the stream, three of padding, four of length, as in the engine's attach protocol
MAX_FRAME = 1 << 26  # an engine sends at most 32 KiB at once; a length beyond this is no frame


class Channel(Protocol):
    """Input and output of one process. Deadlines are times of `time.monotonic`."""

    def send(self, data: bytes, deadline: float) -> None:
        """Write all of `data`. Raises TimeoutError, or EOFError when nobody reads any more."""
        ...

    def receive(self, deadline: float) -> bytes:
        """The next bytes of the output, empty when it has ended. Raises TimeoutError."""
        ...

    def close(self) -> None:
        """Let go of the stream, which ends a `send` or `receive` in another thread. Harmless a second time."""
        ...


def remaining(deadline: float) -> float:
    """Seconds until a deadline. Raises TimeoutError when it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class SocketChannel:
    """The engine's end of a process that has no terminal: frames with stdout and stderr in the order of their arrival."""

    def __init__(self, stream: socket.socket, release: Callable[[], None]):
        """`release` lets go of whatever keeps the socket, after it was shut down."""
        self._socket = stream
        self._release = release
        self._buffer = bytearray()
        # a descriptor is closed when nobody waits on it: its number would be given to another file, on which the wait went on
        self._using = threading.Lock()
        self._closed = False

    def send(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        try:
            while view:
                with self._using:
                    self._socket.settimeout(remaining(deadline))
                    view = view[self._socket.send(view[:CHUNK]) :]
        except TimeoutError:
            raise
        except (OSError, ValueError) as error:
            raise EOFError(str(error)) from error

    def receive(self, deadline: float) -> bytes:
        while True:
            payload = self._frames()
            if payload:
                return payload
            try:
                with self._using:
                    self._socket.settimeout(remaining(deadline))
                    more = self._socket.recv(CHUNK)
            except TimeoutError:
                raise
            except (OSError, ValueError):  # reset by an engine that died, or closed by another thread
                return b""
            if not more:
                return b""
            self._buffer += more

    def _frames(self) -> bytes:
        """The payloads of all whole frames in the buffer."""
        payloads: list[bytes] = []
        start = 0
        while len(self._buffer) - start >= FRAME_HEADER:
            size = int.from_bytes(self._buffer[start + 4 : start + FRAME_HEADER], "big")
            if size > MAX_FRAME:
                raise EOFError(f"the engine sent a frame of {size} bytes")
            end = start + FRAME_HEADER + size
            if len(self._buffer) < end:
                break
            payloads.append(bytes(self._buffer[start + FRAME_HEADER : end]))
            start = end
        del self._buffer[:start]
        return b"".join(payloads)

    def close(self) -> None:
        with suppress(OSError):  # the other end was faster
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes whoever waits
        with self._using:
            if not self._closed:
                self._closed = True
                self._release()
                self._socket.close()


class PipeChannel:
    """Standard input and output of a process of this machine, which `close` kills."""

    def __init__(self, process: subprocess.Popen[bytes]):
        assert process.stdin is not None
        assert process.stdout is not None
        self.process = process
        self._stdin, self._stdout = process.stdin.fileno(), process.stdout.fileno()
        os.set_blocking(self._stdin, False)
        self._using = threading.Lock()  # as in SocketChannel
        self._closed = False

    def _wait(self, descriptor: int, event: int, deadline: float) -> None:
        if self._closed:
            raise EOFError
        poll = select.poll()
        poll.register(descriptor, event)
        if not poll.poll(remaining(deadline) * 1000):
            raise TimeoutError

    def send(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            with self._using:
                self._wait(self._stdin, select.POLLOUT, deadline)
                try:
                    view = view[os.write(self._stdin, view[:CHUNK]) :]
                except BlockingIOError:
                    continue
                except OSError as error:
                    raise EOFError(str(error)) from error

    def receive(self, deadline: float) -> bytes:
        with self._using:
            try:
                self._wait(self._stdout, select.POLLIN, deadline)
                return os.read(self._stdout, CHUNK)
            except TimeoutError:
                raise
            except (OSError, EOFError):
                return b""

    def close(self) -> None:
        self.process.kill()  # wakes whoever waits
        self.process.wait()
        with self._using:
            if not self._closed:
                self._closed = True
                assert self.process.stdin is not None
                assert self.process.stdout is not None
                self.process.stdin.close()
                self.process.stdout.close()
