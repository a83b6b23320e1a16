"""What running engines take: memory of their processes, of their GPUs, and how many tokens their KV cache holds."""

import re
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import psutil

from turnwise.launch.gpus import Machine
from turnwise.launch.survivors import processes_of

TIMEOUT_S = 5.0
CACHE = re.compile(r"^vllm:cache_config_info\{(?P<labels>.*)\}", re.MULTILINE)
LABEL = re.compile(r'(\w+)="(\d+)"')
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # engines are on this host: never ask a proxy


@dataclass(frozen=True)
class Footprint:
    """Of all engines of a session."""

    ram: int  # bytes of their processes
    gpus: Mapping[int, int]  # bytes taken on each of their GPUs, by whomsoever
    cache_tokens: int | None  # tokens whose keys and values one engine holds; None where it does not say


def footprint(run_id: str, urls: Sequence[str], machine: Machine, gpus: Iterable[int]) -> Footprint:
    """Measure now.

    Args:
        run_id: which the engines' processes carry.
        urls: of the engines.
        machine: as it is now.
        gpus: of the engines.
    """
    known = {index: gpu.used for index in gpus if (gpu := machine.gpu(index)) is not None and gpu.used is not None}
    cached = [tokens for url in urls if (tokens := cache_tokens(_metrics(url))) is not None]
    return Footprint(_resident(run_id), known, min(cached, default=None))


def cache_tokens(page: str) -> int | None:
    """Tokens that the KV cache holds, from vLLM's page of metrics; None where the page does not say."""
    found = CACHE.search(page)
    labels = dict(LABEL.findall(found["labels"])) if found else {}
    return (
        int(labels["block_size"]) * int(labels["num_gpu_blocks"]) if {"block_size", "num_gpu_blocks"} <= labels.keys() else None
    )


def _metrics(url: str) -> str:
    try:
        with _DIRECT.open(f"{url}/metrics", timeout=TIMEOUT_S) as answer:
            return answer.read().decode(errors="replace")
    except (urllib.error.URLError, OSError):
        return ""  # an engine that tells nothing of itself serves all the same


def _resident(run_id: str) -> int:
    total = 0
    for process in processes_of(run_id):
        with suppress(psutil.Error):  # it may end at this moment
            total += process.memory_info().rss
    return total
