"""A circuit breaker: after failures in a row nobody calls the engine any more, until a trial succeeds."""

import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

Listener = Callable[[str, str | None], None]


class Breaker:
    """Counts what happens to calls of one engine. Thread-safe.

    Closed: calls go through. `threshold` failures in a row open it: `reason` says why, and callers wait. Whoever keeps the pool
    makes a trial when `trial_due`; one success closes it again, a failure doubles the pause up to `max_pause_s`.
    """

    def __init__(
        self,
        name: str,
        *,
        threshold: int,
        pause_s: float,
        max_pause_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        listener: Listener | None = None,
    ):
        """`listener(name, reason)` is told of every change: the reason when it opens, None when it closes."""
        self.name = name
        self._threshold, self._first_pause, self._max_pause = threshold, pause_s, max_pause_s
        self._clock, self._listener = clock, listener
        self._lock = threading.Lock()
        self._failures = 0
        self._pause = pause_s
        self._reason: str | None = None
        self._trial_at = 0.0

    @property
    def reason(self) -> str | None:
        """Why it is open; None when it is closed."""
        return self._reason

    @property
    def trial_due(self) -> bool:
        """Whether it is open and its pause is over."""
        with self._lock:
            return self._reason is not None and self._clock() >= self._trial_at

    def success(self) -> None:
        """A call was answered."""
        with self._lock:
            closed = self._reason is not None
            self._failures, self._pause, self._reason = 0, self._first_pause, None
        if closed:
            log.warning("containers: %s works again", self.name)
            self._tell(None)

    def failure(self, reason: str) -> None:
        """A call failed for reasons of the engine."""
        with self._lock:
            self._failures += 1
            opened = self._reason is None and self._failures >= self._threshold
            if opened:
                self._reason = reason
                self._trial_at = self._clock() + self._pause
            elif (
                self._reason is not None and self._clock() >= self._trial_at
            ):  # the trial failed; other failures are of calls before it
                self._reason = reason
                self._pause = min(2 * self._pause, self._max_pause)
                self._trial_at = self._clock() + self._pause
            pause = self._pause
        if opened:
            log.warning(
                "containers: %s failed %d times in a row (%s); next trial in %g s", self.name, self._failures, reason, pause
            )
            self._tell(reason)

    def _tell(self, reason: str | None) -> None:
        if self._listener is not None:
            self._listener(self.name, reason)
