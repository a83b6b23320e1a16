"""Which requests may be sent to the engines: all, those of evaluations alone, or none."""

import asyncio
from enum import Enum


class Open(Enum):
    """To whom the gate is open."""

    ALL = "all"
    EVALUATION = "evaluation"  # engines are set up for an evaluation, and training rollouts wait for its end
    NONE = "none"  # engines are changed


class Gate:
    """Requests pass it on their way."""

    def __init__(self) -> None:
        self.open = Open.ALL
        self._changed = asyncio.Event()

    def set(self, to: Open) -> None:
        """From now on it is open to these."""
        self.open = to
        self._changed.set()
        self._changed = asyncio.Event()

    async def passed(self, *, evaluation: bool, timeout_s: float | None) -> None:
        """Wait until a request may be sent, of an evaluation or another one.

        Raises:
            TimeoutError: the gate was closed to all for more than `timeout_s` seconds at a time. Waiting for an evaluation has no
                limit: its own requests have theirs.
        """
        while not self._lets(evaluation):
            limit = timeout_s if self.open is Open.NONE else None
            async with asyncio.timeout(limit):  # wait_for of Python 3.11 loses a cancellation that comes as the gate opens
                await self._changed.wait()

    def _lets(self, evaluation: bool) -> bool:
        return self.open is Open.ALL or (evaluation and self.open is Open.EVALUATION)
