"""What a container is made of, and what a backend must offer: the one seam between Docker and bubblewrap."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from turnwise.config.containers import LimitsConfig
from turnwise.containers.breaker import Breaker
from turnwise.containers.channel import Channel

HOME = "/home/agent"
DATA = "/data"  # written by turnwise alone
ENVIRONMENT = {
    "HOME": HOME,
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "TERM": "dumb",
    "PYTHONUNBUFFERED": "1",  # what a command printed before its deadline is seen
}


@dataclass(frozen=True)
class Spec:
    """Which containers are alike, so that one may stand ready for the lease of another."""

    image: str  # a recipe's name, or an image that the engine has
    limits: LimitsConfig
    gpus: tuple[str, ...] = ()


class Counters(NamedTuple):
    """How often a limit was hit since the container began."""

    oom: int = 0  # processes killed for memory
    pids: int = 0  # processes refused


class Fate(NamedTuple):
    """Whether a container runs, and whether its own hunger for memory ended it."""

    running: bool
    oom: bool


class Process(Channel, Protocol):
    """A process in a container: its streams, and how it ended."""

    def exit_code(self) -> int | None:
        """Its status once its output has ended; None when it is not known."""
        ...


class Cell(Protocol):
    """One isolated place in which processes run. Raises EngineDown and ContainerGone."""

    def open(self, *, root: bool = False) -> Process:
        """Start a shell that reads commands from its input. `root`: it may write DATA."""
        ...

    def sweep(self) -> None:
        """End every process of the task, also those that ignore signals or left their session. Files stay."""
        ...

    def counters(self) -> Counters:
        """Read the kernel's counters."""
        ...

    def fate(self) -> Fate:
        """Ask whoever runs it."""
        ...

    def destroy(self) -> None:
        """End it and remove all of it. Harmless a second time. Raises EngineDown when that is not certain."""
        ...


class Host(Protocol):
    """A place where cells are made."""

    name: str
    capacity: int
    starts: int
    has_gpus: bool
    breaker: Breaker

    def prepare(self, image: str) -> None:
        """Make sure that an image is there. Raises ImageMissing, RecipeFailed, EngineDown."""
        ...

    def start(self, spec: Spec) -> Cell:
        """A new cell, running. Raises EngineDown, ContainerError."""
        ...

    def remove_orphans(self) -> int:
        """Remove what dead processes of this machine left here, and nothing else; how many there were."""
        ...

    def close(self) -> None:
        """Let go of connections."""
        ...
