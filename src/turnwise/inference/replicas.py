"""Which replica gets the next request: the least loaded one, or the one whose prefix cache knows the conversation."""

import asyncio
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from yarl import URL

AFFINITY_MARGIN = 8  # running requests by which the known replica may exceed the least loaded one; a step of decoding hides it
AFFINITY_ENTRIES = 65_536  # conversations remembered; beyond it the oldest are forgotten, which costs one prefill each
IDLE_POLL_S = 0.002
AVOID_S = 10.0  # a replica that failed is asked again after this many seconds, or when no other is left


@dataclass(eq=False)
class Replica:
    """One engine."""

    url: str
    load: int = 0  # requests sent and not answered yet
    avoided_until: float = 0.0  # monotonic seconds

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/")
        self.completions = URL(f"{self.url}/v1/completions")
        self._busy_s = 0.0  # of periods that have ended
        self._busy_since = 0.0

    def sent(self) -> None:
        """A request is on its way."""
        if self.load == 0:
            self._busy_since = time.monotonic()
        self.load += 1

    def returned(self) -> None:
        """A request has been answered or has failed."""
        self.load -= 1
        if self.load == 0:
            self._busy_s += time.monotonic() - self._busy_since

    def busy_s(self) -> float:
        """Seconds so far in which at least one request was with this engine."""
        return self._busy_s + (time.monotonic() - self._busy_since if self.load else 0.0)

    def failed(self) -> None:
        self.avoided_until = time.monotonic() + AVOID_S

    def answered(self) -> None:
        self.avoided_until = 0.0


class Replicas:
    """All engines of a run."""

    def __init__(self, urls: Sequence[str]) -> None:
        if not urls:
            raise ValueError("urls = [] names no engine; give the URL of at least one")
        self.all = [Replica(url) for url in urls]
        self._known: dict[str, Replica] = {}

    async def idle(self, timeout_s: float) -> bool:
        """Wait until every request has come back; False when some have not within `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        while any(replica.load for replica in self.all):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(IDLE_POLL_S)
        return True

    def choose(self, affinity: str | None, failed: Collection[Replica] = ()) -> Replica:
        """The replica for a request of the conversation `affinity`; those that already `failed` it come last."""
        if len(self.all) == 1:
            return self.all[0]
        now = time.monotonic()
        best = min(self.all, key=lambda r: (r in failed, r.avoided_until > now, r.load))
        if affinity is None:
            return best
        known = self._known.pop(affinity, best)
        usable = known not in failed and known.avoided_until <= now and known.load <= best.load + AFFINITY_MARGIN
        chosen = known if usable else best
        self._known[affinity] = chosen
        if len(self._known) > AFFINITY_ENTRIES:
            del self._known[next(iter(self._known))]
        return chosen
