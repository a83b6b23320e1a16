"""Time of short calls on a GPU or a CPU, over rotated operands, within a limit for the whole run."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

Call = Callable[[], object]
REPLAYS = (5, 200)  # fewest and most
SECONDS = 0.02  # of replays for one number, between those bounds


@dataclass
class Clock:
    """Median seconds of a call.

    On a GPU the calls are captured into one CUDA graph, each with operands of its own, so that neither the CPU's launches nor
    weights left in the cache are measured; what cannot be captured is timed as it is, and named in `uncaptured`.
    """

    device: torch.device
    limit: float  # seconds from the making of the clock
    began: float = field(default_factory=time.monotonic)
    uncaptured: set[str] = field(default_factory=set)

    def exhausted(self) -> bool:
        return time.monotonic() - self.began > self.limit

    def seconds(self, name: str, calls: Sequence[Call]) -> float:
        """Median over repeats of the mean over `calls`."""
        for call in calls[:2]:  # compile, choose algorithms, allocate
            call()
        if self.device.type != "cuda":
            return self._on_cpu(calls)
        for call in calls:
            call()
        torch.cuda.synchronize()
        try:
            return self._of(self._captured(calls)) / len(calls)
        except RuntimeError:
            self.uncaptured.add(name)
            torch.cuda.synchronize()
            return self._of(lambda: [call() for call in calls]) / len(calls)

    def _captured(self, calls: Sequence[Call]) -> Call:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def _of(self, replay: Call) -> float:
        first = self._events(replay, 2)
        repeats = min(max(int(SECONDS / max(first)), REPLAYS[0]), REPLAYS[1])
        return statistics.median(self._events(replay, repeats))

    def _events(self, replay: Call, repeats: int) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            replay()
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in pairwise(marks)]

    def _on_cpu(self, calls: Sequence[Call]) -> float:
        times: list[float] = []
        for call in [*calls, *calls, *calls][: max(3, len(calls))]:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return statistics.median(times)


def copies(bytes_each: int, device: torch.device) -> int:
    """Sets of operands to rotate: together at least four times the cache, so that none of it is there when it is needed."""
    if device.type != "cuda":
        return 3
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(-(-4 * cache // bytes_each), 3), 64)


def copy_bandwidth(clock: Clock) -> float:
    """Bytes a second of a device-to-device copy, read and written: the faster of a copy and of a kernel that reads and writes.

    Within a CUDA graph a copy is a node of its own kind, which on an H200 moved 2.7 TB/s where kernels moved 3.8.
    """
    size = 1 << 30 if clock.device.type == "cuda" else 1 << 24
    source = torch.full((size // 8,), 7, dtype=torch.int64, device=clock.device)
    target = torch.empty_like(source)
    ways = {"copy": lambda: target.copy_(source), "negate": lambda: torch.neg(source, out=target)}
    return 2 * size / min(clock.seconds(name, [way] * 2) for name, way in ways.items())
