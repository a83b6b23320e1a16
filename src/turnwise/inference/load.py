"""How busy the engines say they are: the few lines of `/metrics` that matter, asked for about once a second."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Self

import aiohttp

from turnwise.inference.replicas import Replica

INTERVAL_S = 1.0  # between two rounds; a round costs an engine well under a millisecond
TIMEOUT_S = 5.0  # an engine whose page takes longer counts as one that says nothing
TRANSPORT_ERRORS = (aiohttp.ClientError, TimeoutError, OSError)

logger = logging.getLogger(__name__)

# vLLM's names, the newest first; counters carry `_total` on the page
_NAMES = {
    "running": ("vllm:num_requests_running",),
    "waiting": ("vllm:num_requests_waiting",),
    "kv_cache_usage": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    "preemptions": ("vllm:num_preemptions_total",),
    "prompt_tokens": ("vllm:prompt_tokens_total",),
    "generated_tokens": ("vllm:generation_tokens_total",),
    "prefix_queries": ("vllm:prefix_cache_queries_total", "vllm:gpu_prefix_cache_queries_total"),
    "prefix_hits": ("vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"),
}
# Prometheus' server sends only what is named, 1 kB instead of 100; a server that does not know the parameter sends everything
_QUERY = "&".join(f"name[]={name}" for names in _NAMES.values() for name in names)


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What an engine says of itself at one moment. Counters run from the engine's start; what it does not report is 0."""

    running: float = 0.0  # requests that are being decoded
    waiting: float = 0.0  # requests in its queue
    kv_cache_usage: float = 0.0  # share, 0 to 1, of the key-value blocks that running requests hold
    preemptions: float = 0.0  # times that a running request lost its blocks and must be computed again
    prompt_tokens: float = 0.0
    generated_tokens: float = 0.0
    prefix_queries: float = 0.0  # prompt tokens looked up in the prefix cache
    prefix_hits: float = 0.0  # and found there

    def __add__(self, other: Self) -> "EngineLoad":
        """Both engines together: sums, and the fuller cache."""
        added = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(EngineLoad)}
        return EngineLoad(**{**added, "kv_cache_usage": max(self.kv_cache_usage, other.kv_cache_usage)})


def parse_load(page: bytes) -> EngineLoad:
    """Read a page in Prometheus' text form, summed over the engines on it; the rest of the page is skipped, not parsed.

    Raises:
        ValueError: the page does not say how many requests run, so that it is not that of an engine.
    """
    text = b"\n" + page
    values: dict[str, float] = {}
    for key, names in _NAMES.items():
        samples = next((found for name in names if (found := _samples(text, name.encode()))), [])
        values[key] = max(samples, default=0.0) if key == "kv_cache_usage" else sum(samples, 0.0)
        if key == "running" and not samples:
            raise ValueError(f"no line begins with {names[0]}")
    return EngineLoad(**values)


def _samples(text: bytes, name: bytes) -> list[float]:
    """Values of all samples of a metric, whatever their labels. `text` begins with a line break."""
    values: list[float] = []
    line = b"\n" + name
    at = text.find(line)
    while at >= 0:
        begin = at + len(line)
        end = text.find(b"\n", begin)
        rest = text[begin : end if end >= 0 else len(text)]
        if rest[:1] in (b"{", b" "):  # and not a longer name
            values.append(float(rest[rest.rfind(b"}") + 1 :].split()[0]))
        at = text.find(line, begin)
    return values


class LoadWatch:
    """Keeps the newest load of each replica while `watch` runs.

    Args:
        replicas: the engines, in the order of `loads`.
        interval_s: seconds between two rounds.
    """

    def __init__(self, replicas: Sequence[Replica], *, interval_s: float = INTERVAL_S) -> None:
        self.replicas, self.interval_s = replicas, interval_s
        self.loads: list[EngineLoad | None] = [None] * len(replicas)  # None: it did not say
        self._silent: set[Replica] = set()  # of whom that was logged

    async def watch(self, changed: Callable[[], None]) -> None:
        """Ask every replica again and again, and call `changed` after each round; runs until cancelled."""
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                self.loads = await asyncio.gather(*(self._ask(session, replica) for replica in self.replicas))
                changed()
                await asyncio.sleep(self.interval_s)

    async def _ask(self, session: aiohttp.ClientSession, replica: Replica) -> EngineLoad | None:
        try:
            async with session.get(f"{replica.url}/metrics?{_QUERY}") as response:
                page = await response.read()
            if response.status != 200:
                raise ValueError(f"HTTP {response.status}")
            return parse_load(page)
        except (*TRANSPORT_ERRORS, ValueError) as error:
            if replica not in self._silent:
                self._silent.add(replica)
                reason = f"{type(error).__name__}: {error}"
                logger.warning("%s/metrics tells no load (%s); rollouts begin without regard to it", replica.url, reason)
            return None
