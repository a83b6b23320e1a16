"""Who waits, and who has what: places for containers and GPUs, first come, first served."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from turnwise.containers.box import Box
from turnwise.containers.errors import PoolBusy
from turnwise.containers.spec import Host

T = TypeVar("T")


@dataclass(eq=False)
class Held:
    """A box and the host on which it has a place."""

    box: Box
    host: Host
    ended: bool = False


@dataclass(frozen=True)
class PoolState:
    """What a pool has, for metrics."""

    leased: int
    ready: int
    waiting: int
    unburied: int  # containers whose engine did not confirm their end; they keep place and GPUs
    down: dict[str, str] = field(default_factory=dict[str, str])  # why, by host, for the engines that are down


class FairQueue:
    """Callers wait in the order in which they came; only the first may take."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self._waiting: deque[object] = deque()

    def take(self, attempt: Callable[[], T | None], timeout_s: float) -> T | None:
        """What `attempt` returns once it is not None; None when it was not within `timeout_s` seconds.

        `attempt` is called under the lock `changed`, which whoever makes something free must notify.
        """
        ticket = object()
        deadline = time.monotonic() + timeout_s
        with self.changed:
            self._waiting.append(ticket)
            try:
                while True:
                    if self._waiting[0] is ticket and (taken := attempt()) is not None:
                        return taken
                    left = deadline - time.monotonic()
                    if left <= 0:
                        return None
                    self.changed.wait(left)
            finally:
                self._waiting.remove(ticket)
                self.changed.notify_all()  # the next one is first now

    @property
    def waiting(self) -> int:
        """Callers in the queue."""
        return len(self._waiting)


class GpuLedger:
    """Who has which of the GPUs that containers may use. Thread-safe; a GPU is with one lease at a time."""

    def __init__(self, gpus: Iterable[str]):
        """`gpus`: as the engine's device requests name them, an index or a UUID."""
        self.gpus = tuple(gpus)
        self._free = list(self.gpus)
        self._queue = FairQueue()

    def acquire(self, count: int, timeout_s: float) -> tuple[str, ...]:
        """Take GPUs. A caller who wants many is not overtaken by others who want few.

        Raises ValueError for more than there are, PoolBusy when they did not become free in time.
        """
        if count > len(self.gpus):
            raise ValueError(
                f"a container asks for {count} GPUs, and [gpus] containers = [{', '.join(self.gpus)}] has {len(self.gpus)}; "
                "ask for fewer, or give containers more"
            )
        taken = self._queue.take(lambda: self._take(count), timeout_s)
        if taken is None:
            raise PoolBusy(f"{count} of the GPUs [{', '.join(self.gpus)}] did not become free within {timeout_s:g} s")
        return taken

    def _take(self, count: int) -> tuple[str, ...] | None:
        if len(self._free) < count:
            return None
        taken = tuple(self._free[:count])
        del self._free[:count]
        return taken

    def release(self, gpus: Iterable[str]) -> None:
        """Give GPUs back, once nothing can run on them any more."""
        with self._queue.changed:
            for gpu in gpus:
                assert gpu in self.gpus, gpu
                assert gpu not in self._free, gpu
                self._free.append(gpu)
            self._queue.changed.notify_all()

    @property
    def free(self) -> int:
        """GPUs that nobody has."""
        return len(self._free)
