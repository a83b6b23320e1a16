"""A process group between trainer and engines, with a deadline on everything and errors that name peers.

It is independent of torch's default group, which trainer and engines each have for themselves. Ranks watch over each other while
they wait, through the trainer's store: NCCL does not notice that a process of the same machine is gone, and gloo (torch 2.13) not
when a send is under way.
"""

import os
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turnwise.transport.manifest import Backend

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch import Tensor

LOOPBACK = "127.0.0.1"
POLL_S = 0.0005  # a bucket of 512 MiB takes about 2 ms over NVLink
STORE_POLL_S = 0.01
HURRY_S = 10.0  # what a transfer that the run no longer needs may still take: they take about a second
LOOK_S = 0.2  # between two looks at whether the others are still there
FAILED = "failed"  # key of the store: why a rank left


class BroadcastError(Exception):
    """Weights did not get through. The group cannot be used any more."""


@dataclass
class UnderWay:
    """A broadcast that was begun; `work` is torch's handle of it."""

    work: Any
    flat: "Tensor"
    label: str  # for errors: which version, which bucket


class PeerGroup:
    """Rank 0 is the trainer's first process, ranks 1 and up are the engines' workers. Returns once all are there.

    Args:
        store: the one that the trainer hosts.
        rendezvous: its host:port, for errors.
        timeout_s: for all ranks to come, and for each broadcast, in seconds.
        hurry: whether the run is about to end; `HURRY_S` is the limit then.

    Raises:
        BroadcastError: a rank did not come, or the trainer went away.
    """

    def __init__(
        self,
        store: "dist.Store",
        rank: int,
        world_size: int,
        *,
        backend: Backend,
        rendezvous: str,
        timeout_s: float,
        hurry: Callable[[], bool] = lambda: False,
    ) -> None:
        import torch.distributed as dist  # late: `rl` reads this package without loading torch

        self._timeout_s, self._hurry = timeout_s, hurry
        self._who = f"broadcast through {rendezvous}, {_name(rank)}"
        self._store = dist.PrefixStore("turnwise.weights", store)
        self._peers = self._await_ranks(rank, world_size)
        try:
            self._group: Any = _process_group(self._store, rank, world_size, backend, timeout_s)
        except RuntimeError as error:
            raise BroadcastError(f"{self._who}: no group with the other processes: {first_line(error)}") from error

    def start(self, flat: "Tensor", label: str) -> UnderWay:
        """Send `flat` from rank 0, or receive into it elsewhere, without waiting.

        Raises:
            BroadcastError: a peer is gone.
        """
        import torch.distributed as dist

        if self._group is None:
            raise BroadcastError(f"{self._who}: weights {label}: the group was closed after an earlier failure")
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        try:
            return UnderWay(self._group.broadcast([flat], options), flat, label)
        except RuntimeError as error:
            raise self._failed(label, first_line(error)) from error

    def finish(self, sent: UnderWay) -> "Tensor":
        """The tensor once it is through.

        Raises:
            BroadcastError: it is not within the time limit, or a peer went away.
        """
        begun = time.monotonic()
        look = begun + min(LOOK_S, self._timeout_s)
        while not sent.work.is_completed():
            now = time.monotonic()
            if now > look:
                look = now + LOOK_S
                if trouble := self._trouble():
                    raise self._failed(sent.label, trouble)
                if now > begun + (limit := self._limit()):
                    raise self._failed(sent.label, f"not through within {limit:g} s")
            time.sleep(POLL_S)
        try:
            sent.work.wait()  # makes the current stream wait for that of NCCL
        except RuntimeError as error:
            raise self._failed(sent.label, first_line(error)) from error
        return sent.flat

    def close(self, reason: str = "") -> None:
        """Leave. Peers that wait for something fail, and say the reason."""
        if self._group is None:
            return
        if reason:
            try:
                self._store.set(FAILED, f"{self._who.rpartition(', ')[2]}: {reason}")
            except RuntimeError:  # the store is gone with the trainer, and so are those who would read it
                reason = ""
        self._group.abort()
        leaving, self._group = [self._group], None
        # in a thread, since gloo waits for a send that its peer will not take, up to its time limit
        threading.Thread(target=leaving.clear, daemon=True).start()

    def _await_ranks(self, rank: int, world_size: int) -> dict[int, "_Process"]:
        """The other ranks' processes, once all are there.

        What builds a group waits for a missing rank without a deadline of ours, and would not say which it is.
        """
        keys = {peer: f"here/{peer}" for peer in range(world_size)}
        begun = time.monotonic()
        try:
            self._store.set(keys[rank], _Process.mine().encode())
            while missing := [peer for peer, key in keys.items() if not self._store.check([key])]:
                if time.monotonic() > begun + (limit := self._limit()):
                    names = ", ".join(map(str, missing))
                    raise BroadcastError(f"{self._who}: of {world_size} ranks {names} did not come within {limit:g} s")
                time.sleep(STORE_POLL_S)
            return {peer: _Process.decode(self._store.get(key).decode()) for peer, key in keys.items() if peer != rank}
        except RuntimeError as error:
            raise BroadcastError(f"{self._who}: the trainer's store went away: {first_line(error)}") from error

    def _limit(self) -> float:
        return min(self._timeout_s, HURRY_S) if self._hurry() else self._timeout_s

    def _trouble(self) -> str:
        """Why nothing more will come; empty while nothing is wrong."""
        try:
            if self._store.check([FAILED]):
                return self._store.get(FAILED).decode()
        except RuntimeError as error:
            return f"the trainer's store went away: {first_line(error)}"
        gone = [f"{_name(rank)} (process {process.pid}) is gone" for rank, process in self._peers.items() if process.gone()]
        return ", ".join(gone)

    def _failed(self, label: str, reason: str) -> BroadcastError:
        reason = self._trouble() or reason
        self.close(f"{label}: {reason}")
        return BroadcastError(f"{self._who}: weights {label}: {reason}")


@dataclass(frozen=True)
class _Process:
    """A process, to be asked whether it lives; one of another pid namespace (a container) counts as alive."""

    pid: int
    namespace: str

    @staticmethod
    def mine() -> "_Process":
        namespace = Path("/proc/self/ns/pid")
        return _Process(os.getpid(), os.readlink(namespace) if namespace.is_symlink() else "")

    def encode(self) -> str:
        return f"{self.pid} {self.namespace}"

    @staticmethod
    def decode(text: str) -> "_Process":
        pid, _, namespace = text.partition(" ")
        return _Process(int(pid), namespace)

    def gone(self) -> bool:
        import psutil

        if self.namespace != _Process.mine().namespace:
            return False
        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


def _name(rank: int) -> str:
    return "trainer" if rank == 0 else f"worker {rank}"


def _process_group(store: "dist.Store", rank: int, world_size: int, backend: Backend, timeout_s: float) -> Any:
    """torch's backend without the registry around it, which knows one world a process."""
    import torch.distributed as dist

    own = timedelta(seconds=2 * timeout_s)  # our deadline comes first, and has words
    if backend == "gloo":
        kind: Any = dist.ProcessGroupGloo
        options = kind._Options()
        options._devices = [kind.create_device(hostname=LOOPBACK)]  # its own choice asks for the host's name
        options._timeout = own
        return kind(store, rank, world_size, options)
    kind = dist.ProcessGroupNCCL
    options = kind.Options()
    options._timeout = own
    with _failures_are_ours():
        return kind(store, rank, world_size, options)


@contextmanager
def _failures_are_ours() -> Generator[None]:
    """A group made in here reports a failure to who waits for it, where torch's watchdog would end the process."""
    key = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(key)
    os.environ[key] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


def first_line(error: Exception) -> str:
    """torch appends a C++ stack to some messages."""
    return str(error).strip().partition("\n")[0]
