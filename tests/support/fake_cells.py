"""Containers without containers: cells whose shell answers the framing and runs nothing, on hosts that can be made to fail."""

import queue
import re
import threading
import time
from dataclasses import dataclass, field

from turnwise.config.containers import ContainersConfig
from turnwise.containers.breaker import Breaker, Listener
from turnwise.containers.errors import ContainerGone, EngineDown
from turnwise.containers.spec import Counters, Fate, Spec

LINE = re.compile(rb"printf '\\n%s\\n' (\w+);.* printf '\\n%s %d\\n' (\w+) ", re.DOTALL)


class ObedientShell:
    """Answers each command with nothing and status 0."""

    def __init__(self) -> None:
        self.output: queue.Queue[bytes] = queue.Queue()
        self.closed = False

    def send(self, data: bytes, deadline: float) -> None:
        markers = LINE.match(data)
        assert markers is not None, data
        self.output.put(b"\n%b\n\n%b 0\n" % (markers[1], markers[2]))

    def receive(self, deadline: float) -> bytes:
        try:
            return self.output.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise TimeoutError from None

    def close(self) -> None:
        self.closed = True

    def exit_code(self) -> int | None:
        return 0


@dataclass
class FakeCell:
    """One of a FakeHost."""

    host: "FakeHost"
    spec: Spec
    dead: bool = False
    destroyed: bool = False

    def open(self, *, root: bool = False) -> ObedientShell:
        self.check()
        return ObedientShell()

    def check(self) -> None:
        if self.host.down:
            raise EngineDown("planted: the engine is down")
        if self.dead or self.destroyed:
            raise ContainerGone("planted: the container is gone")

    def sweep(self) -> None:
        self.check()

    def counters(self) -> Counters:
        self.check()
        return Counters()

    def fate(self) -> Fate:
        return Fate(running=not self.dead, oom=False)

    def destroy(self) -> None:
        if self.destroyed:
            return
        if self.host.down:
            raise EngineDown("planted: the engine is down")
        self.destroyed = True
        with self.host.lock:
            self.host.living.remove(self)


@dataclass
class FakeHost:
    """An engine in this process."""

    name: str = "fake"
    capacity: int = 4
    starts: int = 4
    has_gpus: bool = True
    failures: int = 2
    listener: Listener | None = None
    down: bool = False
    stillborn: bool = False  # containers die as they start
    living: list[FakeCell] = field(default_factory=list[FakeCell])
    started: list[FakeCell] = field(default_factory=list[FakeCell])
    most: int = 0  # containers at once, ever
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.breaker = Breaker(self.name, threshold=self.failures, pause_s=0.02, max_pause_s=0.1, listener=self.listener)

    def prepare(self, image: str) -> None:
        if self.down:
            raise EngineDown("planted: the engine is down")

    def start(self, spec: Spec) -> FakeCell:
        if self.down:
            raise EngineDown("planted: the engine is down")
        cell = FakeCell(self, spec, dead=self.stillborn)
        with self.lock:
            self.living.append(cell)
            self.started.append(cell)
            self.most = max(self.most, len(self.living))
        return cell

    def remove_orphans(self) -> int:
        return 0

    def close(self) -> None:
        pass


def quick_config(**changes: object) -> ContainersConfig:
    """Waits are short."""
    return ContainersConfig.model_validate({"warm": 0, "wait_s": 0.2, **changes})
