"""status.json, rewritten about once a second, and the health of the event loop."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

TICK_S = 0.1  # the lag of the event loop is measured this often
STATUS_EVERY = 10  # ticks
RATE_WINDOW_S = 20.0  # seconds over which tokens/s are taken


class Pulse:
    """Measures, while it beats, how late the event loop runs, and calls `tick` at every beat."""

    def __init__(self, *, tokens: Callable[[], int], tick: Callable[[], None]) -> None:
        self._tokens, self._tick = tokens, tick
        self._rate: deque[tuple[float, int]] = deque()
        self._lags: list[float] = []

    async def beat(self, path: Path, status: Callable[[], dict[str, Any]]) -> None:
        """Run until cancelled. A status that cannot be written ends the run: the disk is full, and batches come next."""
        while True:
            for _ in range(STATUS_EVERY):
                before = time.perf_counter()
                await asyncio.sleep(TICK_S)
                self._lags.append(max(0.0, time.perf_counter() - before - TICK_S))
                self._tick()
            self.write(path, status())

    def write(self, path: Path, status: dict[str, Any]) -> None:
        """Replace status.json; a few hundred bytes, without waiting for the disk as batches do."""
        content = {"time": time.time(), **status, "tokens_per_s": self.tokens_per_s()}
        draft = path.with_suffix(".json.tmp")
        draft.write_bytes(msgspec.json.encode(content))
        draft.rename(path)

    def tokens_per_s(self) -> float:
        """Sampled tokens per second over the last `RATE_WINDOW_S`, of replies that are complete."""
        now, total = time.monotonic(), self._tokens()
        self._rate.append((now, total))
        while len(self._rate) > 1 and now - self._rate[0][0] > RATE_WINDOW_S:
            self._rate.popleft()
        then, before = self._rate[0]
        return (total - before) / (now - then) if now > then else 0.0

    def take(self) -> dict[str, float]:
        """Metrics since the last call."""
        lags, self._lags = self._lags, []
        if not lags:
            return {}
        return {"orchestrator/loop_lag_s/max": max(lags), "orchestrator/loop_lag_s/mean": sum(lags) / len(lags)}
