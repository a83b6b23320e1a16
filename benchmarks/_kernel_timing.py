"""Time of short calls on a GPU or a CPU, over rotated operands, within a limit for the whole run."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

Call = Callable[[], object]
ROUNDS = 5  # in which calls that are compared take turns
CPU_ROUNDS = 3
REPLAYS = (1, 40)  # of a round, fewest and most
SECONDS = 0.1  # of replays for one number, between those bounds


@dataclass(frozen=True)
class Replay:
    """What is timed as one: `count` calls."""

    run: Call
    count: int


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
        return self.medians([self.prepared(name, calls)])[0]

    def prepared(self, name: str, calls: Sequence[Call]) -> Replay:
        """The calls, warm. Raises whatever they raise."""
        for call in [*calls[:2], *calls] if self.device.type == "cuda" else calls[:2]:  # compile, choose algorithms, allocate
            call()

        def one_by_one() -> None:
            for call in calls:
                call()

        run: Call = one_by_one
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            try:
                run = self._captured(calls)
            except RuntimeError:
                self.uncaptured.add(name)
                torch.cuda.synchronize()
        return Replay(run, len(calls))

    def medians(self, replays: Sequence[Replay]) -> list[float]:
        """Seconds of a call of each, measured in turns: a GPU's clock falls as it gets warm, and other work comes and goes."""
        repeats = [self._repeats(replay) for replay in replays]
        times: list[list[float]] = [[] for _ in replays]
        for _ in range(ROUNDS if self.device.type == "cuda" else CPU_ROUNDS):
            for found, replay, number in zip(times, replays, repeats, strict=True):
                found += self._times(replay, number)
        return [statistics.median(found) / replay.count for found, replay in zip(times, replays, strict=True)]

    def _repeats(self, replay: Replay) -> int:
        """Replays of a round."""
        if self.device.type != "cuda":
            return 1
        (first,) = self._times(replay, 1)
        return min(max(int(SECONDS / ROUNDS / first), REPLAYS[0]), REPLAYS[1])

    def _captured(self, calls: Sequence[Call]) -> Call:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return graph.replay

    def _times(self, replay: Replay, repeats: int) -> list[float]:
        """Seconds of each replay; on a CPU of one."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            replay.run()
            return [time.perf_counter() - start]
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            replay.run()
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in pairwise(marks)]


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
