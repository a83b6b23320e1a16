"""Environment calls off the event loop, on daemon threads: a call that hangs blocks neither the loop nor the exit."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")

GROW_AFTER_S = 0.01  # a queue that by then has not drained by half has slow calls in it, and the threads are doubled
FIRST_THREADS = 2
MAX_THREADS = 2048  # beyond any `max_inflight`; slow calls sleep, so that threads cost little


logger = logging.getLogger(__name__)


class EnvTimeout(Exception):
    """An environment call took longer than its limit. Its thread is given up; the environment must not be used again."""


class _Call:
    """One call, resolved on the event loop."""

    __slots__ = ("function", "future", "outcome", "timer")

    def __init__(self, function: Callable[[], Any], future: "asyncio.Future[Any]") -> None:
        self.function = function
        self.future = future
        self.timer: asyncio.TimerHandle | None = None
        self.outcome: tuple[Any, Exception | None] = (None, None)


class EnvThreads:
    """A pool of daemon threads that grows while calls are slow. Use from one event loop."""

    def __init__(self, max_threads: int = MAX_THREADS) -> None:
        self.max_threads = max_threads
        self.lost = 0  # threads given up to calls that overran their limit
        self._queue: SimpleQueue[_Call | None] = SimpleQueue()
        self._done: deque[_Call] = deque()
        self._threads = 0
        self._running: set[_Call] = set()
        self._wake_scheduled = False
        self._growing = False
        self._resolved = 0
        self._background: set[asyncio.Task[object]] = set()

    async def call(self, function: Callable[[], Result], *, timeout_s: float) -> Result:
        """Run `function()` on a thread.

        Raises:
            EnvTimeout: it took longer than `timeout_s` seconds.
            Exception: whatever the function raised.
        """
        loop = asyncio.get_running_loop()
        call = _Call(function, loop.create_future())
        call.timer = loop.call_later(timeout_s, self._give_up, call, timeout_s)
        if self._threads < FIRST_THREADS:
            self._spawn(loop)
        self._queue.put(call)
        if not self._growing:
            self._growing = True
            loop.call_later(GROW_AFTER_S, self._grow, loop, self._resolved)
        try:
            return await call.future
        finally:
            call.timer.cancel()

    def submit(self, function: Callable[[], object], *, timeout_s: float) -> None:
        """Run `function()` on a thread without waiting for it; what it raises becomes a warning."""
        task = asyncio.get_running_loop().create_task(self.call(function, timeout_s=timeout_s))
        self._background.add(task)
        task.add_done_callback(self._forget)

    async def drain(self) -> None:
        """Wait until environments that are being closed are closed, each within its own limit, then `close`."""
        if self._background:
            await asyncio.wait(self._background)
        self.close()

    def close(self) -> None:
        """Let idle threads end; those that hang are left to the exit of the process."""
        for _ in range(self._threads):
            self._queue.put(None)
        self._threads = 0

    def _spawn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._threads += 1
        threading.Thread(target=self._work, args=(loop,), name=f"env-{self._threads}", daemon=True).start()

    def _grow(self, loop: asyncio.AbstractEventLoop, resolved: int) -> None:
        waiting = self._queue.qsize()
        # idle threads may not have got to the interpreter yet; more of them would not either, and would stay
        unserved = waiting - (self._threads - len(self._running))
        if self._resolved - resolved < waiting:
            for _ in range(min(unserved, max(self._threads, FIRST_THREADS), self.max_threads - self._threads)):
                self._spawn(loop)
        self._growing = waiting > 0
        if self._growing:
            loop.call_later(GROW_AFTER_S, self._grow, loop, self._resolved)

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        while (call := self._queue.get()) is not None:
            if call.future.done():  # gave up while it waited
                continue
            self._running.add(call)
            try:
                call.outcome = (call.function(), None)
            except Exception as error:
                wrapped = RuntimeError("StopIteration") if isinstance(error, StopIteration) else error  # futures refuse it
                call.outcome = (None, wrapped)
            except BaseException as error:  # SystemExit inside an environment ends its episode, not the run
                call.outcome = (None, RuntimeError(f"{type(error).__name__}: {error}"))
            self._running.discard(call)
            self._done.append(call)
            if not self._wake_scheduled:  # one wake-up serves every call that ends before the loop gets to it
                self._wake_scheduled = True
                try:
                    loop.call_soon_threadsafe(self._resolve)
                except RuntimeError:  # the loop has closed: nobody waits
                    return

    def _resolve(self) -> None:
        self._wake_scheduled = False
        while self._done:
            call = self._done.popleft()
            self._resolved += 1
            if call.future.done():
                continue
            value, error = call.outcome
            if error is None:
                call.future.set_result(value)
            else:
                call.future.set_exception(error)

    def _forget(self, task: "asyncio.Task[object]") -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("closing an environment failed: %s: %s", type(error).__name__, error)

    def _give_up(self, call: _Call, timeout_s: float) -> None:
        if not call.future.done():
            self.lost += 1
            self.max_threads += 1
            self._running.discard(call)
            self._threads -= 1  # its thread is replaced when work waits again
            call.future.set_exception(EnvTimeout(f"no answer within {timeout_s:g} s"))
