"""An event loop on a thread of its own: where the rollouts of one environment run, as they would in its own framework."""

import asyncio
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any

BEAT_S = 0.5  # how often the loop says that it is alive
STUCK_AFTER_S = 30.0  # without a beat: some code blocks it, and new rollouts get another


class LoopThread:
    """An event loop that runs until the process ends."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._beat = time.monotonic()
        self.loop.call_soon(self._tick)
        threading.Thread(target=self._run, name=f"verifiers-{name}", daemon=True).start()

    @property
    def stuck(self) -> bool:
        """Whether something has blocked the loop for long."""
        return time.monotonic() - self._beat > STUCK_AFTER_S

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> "Future[Any]":
        """Run a coroutine; from any thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def stop(self) -> None:
        """Let the thread end."""
        self.loop.call_soon_threadsafe(self.loop.stop)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()

    def _tick(self) -> None:
        self._beat = time.monotonic()
        self.loop.call_later(BEAT_S, self._tick)


def run_once(coroutine: Coroutine[Any, Any, Any], name: str, *, timeout_s: float) -> Any:
    """What a coroutine returns, run on a loop of its own, whether or not the caller's thread runs one.

    Raises:
        TimeoutError: it took longer than `timeout_s` seconds.
        Exception: whatever it raised.
    """
    thread = LoopThread(name)
    running = thread.submit(coroutine)
    try:
        return running.result(timeout_s)
    finally:
        running.cancel()
        thread.stop()
