"""Containers for rollouts: a cap, a queue, some kept ready, GPUs lent, the dead buried, and failing engines left alone."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from turnwise.config.containers import ContainersConfig, LimitsConfig
from turnwise.containers.archive import Content
from turnwise.containers.box import Box
from turnwise.containers.errors import ContainerError, ContainerGone, EngineDown, PoolBusy
from turnwise.containers.leases import FairQueue, GpuLedger, Held, PoolState
from turnwise.containers.spec import Host, Spec

log = logging.getLogger(__name__)

KEEPER_TICK_S = 0.5


class Pool:
    """Leases boxes. Thread-safe; a context manager, whose end removes every container."""

    def __init__(self, hosts: Sequence[Host], config: ContainersConfig, gpus: Iterable[str] = ()):
        """`gpus`: those of `[gpus] containers`, as the engine names them; no other is ever given to a container."""
        self._hosts, self._config = tuple(hosts), config
        self._ledger = GpuLedger(gpus)
        self._queue = FairQueue()
        self._lock = self._queue.changed
        self._used: Counter[str] = Counter()  # places taken, by host
        self._ready: list[Held] = []
        self._leased: set[Held] = set()
        self._unburied: list[Held] = []
        self._starting = {host.name: threading.BoundedSemaphore(host.starts) for host in self._hosts}
        self._wanted: Spec | None = None  # what the last lease asked for, and the next one probably will
        self._closed = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="containers-keeper", daemon=True)

    def __enter__(self) -> Self:
        """Remove orphans of dead runs, and begin to keep boxes ready."""
        for host in self._hosts:
            try:
                if orphans := host.remove_orphans():
                    log.info("containers: removed %d left on %s by runs that have ended", orphans, host.name)
            except EngineDown as error:  # leases will wait for it and say so
                host.breaker.failure(str(error))
        self._keeper.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def state(self) -> PoolState:
        """What is leased, ready, waiting and down right now."""
        with self._lock:
            down = {host.name: reason for host in self._hosts if (reason := host.breaker.reason) is not None}
            return PoolState(len(self._leased), len(self._ready), self._queue.waiting, len(self._unburied), down)

    @contextmanager
    def lease(
        self, image: str, *, limits: LimitsConfig | None = None, gpus: int = 0, files: Mapping[str, Content] | None = None
    ) -> Generator[Box]:
        """A fresh container for as long as the block runs.

        Args:
            image: a recipe's name, or an image that the engine has.
            limits: `containers.limits` when None.
            gpus: how many of the pool's GPUs it gets for itself.
            files: written into its home folder.

        Raises:
            EngineDown: no engine came back within `containers.wait_s`.
            PoolBusy: no place or no GPU became free within `containers.wait_s`.
            ImageMissing, RecipeFailed: there is no such image.
            ValueError: more GPUs than the pool has.
        """
        held = self._acquire(image, limits or self._config.limits, gpus)
        try:
            if files:
                held.box.put(files)
            yield held.box
        except EngineDown as error:
            held.host.breaker.failure(str(error))
            raise
        finally:
            self._end(held)

    def _acquire(self, image: str, limits: LimitsConfig, gpus: int) -> Held:
        """A ready box, or a new one as soon as there is a place; where a start fails, the next try may be on another engine."""
        deadline = time.monotonic() + self._config.wait_s
        failure: EngineDown | None = None
        while True:
            lent = self._ledger.acquire(gpus, max(0.0, deadline - time.monotonic())) if gpus else ()
            spec = Spec(image, limits, lent)
            if not gpus:
                self._wanted = spec
            found = self._queue.take(lambda spec=spec: self._find(spec), max(0.0, deadline - time.monotonic()))
            if found is None:
                self._ledger.release(lent)
                raise self._nothing_found(image, failure)
            try:
                held = self._use(found, spec)
            except EngineDown as error:
                if time.monotonic() >= deadline:
                    raise self._nothing_found(image, error) from error
                failure = error
                continue
            if held is not None:
                with self._lock:
                    self._leased.add(held)
                return held

    def _find(self, spec: Spec) -> "Held | Host | None":
        """Under the lock: a ready box of this kind, a host with a free place, or a ready box of another kind that has to go."""
        if self._closed.is_set():
            raise ContainerGone("the pool of containers is closed")
        able = [host for host in self._hosts if host.breaker.reason is None and (host.has_gpus or not spec.gpus)]
        for held in self._ready:
            if held.box.spec == spec and held.host in able:
                self._ready.remove(held)
                return held
        free = [host for host in able if self._used[host.name] < host.capacity]
        if free:
            host = min(free, key=lambda host: self._used[host.name] / host.capacity)
            self._used[host.name] += 1
            return host
        for held in self._ready:
            if held.host in able:
                self._ready.remove(held)
                return held
        return None

    def _use(self, found: Held | Host, spec: Spec) -> Held | None:
        """Make a box of what was found; None when the place of a ready one could not be taken over. Raises as `_start`."""
        if not isinstance(found, Held):
            return self._start(spec, found)
        if found.box.spec == spec and found.box.healthy():
            return found
        found.ended = True
        if self._removed(found):  # dead, or of another kind: the new one takes its place
            return self._start(spec, found.host)
        self._ledger.release(spec.gpus)
        return None

    def _nothing_found(self, image: str, failure: EngineDown | None) -> ContainerError:
        state, waited = self.state, self._config.wait_s
        if failure is not None or len(state.down) == len(self._hosts):
            return EngineDown(
                f"no container engine works, after {waited:g} s of waiting: {'; '.join(state.down.values()) or failure}"
            )
        return PoolBusy(
            f"no place for a container ({image}) became free within containers.wait_s = {waited:g}; "
            f"{state.leased} are leased: raise containers.max_containers, or lower orchestrator.max_inflight"
        )

    def _start(self, spec: Spec, host: Host) -> Held:
        """A new box in a place and with GPUs that were taken for it, and that are given back when it fails.

        Raises EngineDown, also for a container that died at once: whatever the reason, the next one would as well.
        """
        held: Held | None = None
        try:
            host.prepare(spec.image)
            with self._starting[host.name]:
                held = Held(Box(host.start(spec), spec, self._config), host)
                held.box.warm_up()
        except BaseException as error:
            if held is None:
                self._give_back(host, spec)
            else:
                self._end(held)
            if not isinstance(error, (EngineDown, ContainerGone)):
                raise
            host.breaker.failure(str(error))
            raise EngineDown(str(error)) from error
        host.breaker.success()
        return held

    def _give_back(self, host: Host, spec: Spec) -> None:
        with self._lock:
            self._used[host.name] -= 1
            self._lock.notify_all()
        self._ledger.release(spec.gpus)

    def _end(self, held: Held) -> None:
        """Remove a box; place and GPUs are free once its engine has confirmed that."""
        with self._lock:
            if held.ended:
                return
            held.ended = True
            self._leased.discard(held)
        self._bury(held)

    def _bury(self, held: Held) -> None:
        if self._removed(held):
            self._give_back(held.host, held.box.spec)

    def _removed(self, held: Held) -> bool:
        """Remove a container; one whose end is not certain is kept for later."""
        try:
            held.box.close()
        except ContainerError as error:
            log.debug("containers: %s did not confirm the end of a container: %s", held.host.name, error)
            if isinstance(error, EngineDown):  # where all places are of such containers, no lease would come to notice it
                held.host.breaker.failure(str(error))
            with self._lock:
                self._unburied.append(held)
            return False
        return True

    def _keep(self) -> None:
        """Until the pool is closed: bury the dead, try engines that are down, keep boxes ready."""
        while not self._closed.wait(KEEPER_TICK_S):
            with self._lock:
                unburied, self._unburied = self._unburied, []
            for held in unburied:
                self._bury(held)
            for host in self._hosts:
                if host.breaker.trial_due:
                    self._try(host)
            while self._missing() and not self._closed.is_set():
                if not self._keep_ready(self._hosts):
                    break
            with self._lock:  # a breaker may have closed
                self._lock.notify_all()

    def _try(self, host: Host) -> None:
        """Call an engine that is down: with a container where it is known which and there is a place, else with a question."""
        if self._keep_ready([host], trial=True) or not host.breaker.trial_due:
            return
        try:
            host.remove_orphans()
        except ContainerError as error:
            host.breaker.failure(str(error))
        else:
            host.breaker.success()

    def _missing(self) -> bool:
        """Whether fewer boxes than wanted stand ready, and nobody waits for the places that they would take."""
        with self._lock:
            ready = sum(held.box.spec == self._wanted for held in self._ready)
            return self._wanted is not None and ready < self._config.warm and not self._queue.waiting

    def _keep_ready(self, hosts: Sequence[Host], *, trial: bool = False) -> bool:
        """Start one box and put it beside the ready ones; whether that worked."""
        spec = self._wanted
        with self._lock:
            able = [host for host in hosts if (trial or host.breaker.reason is None) and self._used[host.name] < host.capacity]
            if not able or spec is None:
                return False
            host = min(able, key=lambda host: self._used[host.name] / host.capacity)
            self._used[host.name] += 1
        try:
            held = self._start(spec, host)
        except ContainerError as error:
            log.debug("containers: none kept ready on %s: %s", host.name, error)
            if not isinstance(error, EngineDown):  # no such image: whoever leases it is told
                self._wanted = None
            return False
        with self._lock:
            self._ready.append(held)
            self._lock.notify_all()
        return True

    def close(self) -> None:
        """Remove every container, also those in use, and let go of the engines. Harmless a second time."""
        self._closed.set()
        if self._keeper.ident is not None:
            self._keeper.join()
        with self._lock:
            ready, self._ready = self._ready, []
            leased, unburied = list(self._leased), self._unburied
            self._unburied = []
            self._lock.notify_all()
        for held in [*ready, *leased]:
            self._end(held)
        for held in unburied:
            self._bury(held)
        if self._unburied:
            log.warning("containers: %d were not removed; the next run on this machine does it", len(self._unburied))
        for host in self._hosts:
            host.close()
