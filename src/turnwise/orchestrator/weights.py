"""Which policy version is served: loading, proof, acknowledgement, and unloading after the last request."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from turnwise.inference.client import Completion, InferenceClient
from turnwise.inference.errors import EngineError, EngineUnavailable
from turnwise.orchestrator.noise import EngineNoise
from turnwise.transport import Manifest, Served, WeightsReady, WeightsStore

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 5.0  # at the end of a run, for an engine that may be gone already

Generate = Callable[[Sequence[int], int, int], Awaitable[Completion]]


class WrongWeights(Exception):
    """An engine does not hold the weights that the trainer published."""


class Policy:
    """The policy as engines serve it. LoRA versions live side by side; full weights are replaced in place, which waits for pins:
    a trainer that hands them over by broadcast waits for an evaluation, too.

    All requests of an engine share its norms. Where these get noise, a version changes them between a pause and a resume; that
    waits for pins, too, since what is pinned is to be sampled without noise.

    Args:
        max_loaded: adapters that an engine may hold; a swap waits for the last request of an old one where all are in use.
        noise: in the norms, for everything but pinned versions; None for none.
        seeds: whether requests for the newest version have seeds; those for pinned versions always do.
    """

    def __init__(
        self,
        client: InferenceClient,
        store: WeightsStore,
        *,
        stop_ids: Sequence[int],
        max_loaded: int | None = None,
        noise: EngineNoise | None = None,
        seeds: bool = True,
    ) -> None:
        self.client, self.store, self.stop_ids, self.max_loaded = client, store, list(stop_ids), max_loaded
        self.noise = noise
        self.seeds = seeds
        self.version = -1  # newest served; -1 before the first
        self.kind = "lora"
        self.swap_s = 0.0  # seconds of the newest swap
        self._leases: Counter[int] = Counter()  # requests in flight and pins, by version
        self._loaded: set[int] = set()
        self._leaving: set[int] = set()  # being unloaded
        self._freed = asyncio.Event()  # an adapter was unloaded
        self._pins = 0
        self._unpinned = asyncio.Event()  # full weights may be replaced, and noise changed
        self._unpinned.set()
        self.sampled_tokens = 0  # over the life of the run
        self._unloads: set[asyncio.Task[None]] = set()
        self._receiving: asyncio.Task[None] | None = None

    async def swap(self, ready: WeightsReady) -> None:
        """Serve a version for new requests, after its digest was proven on every engine, and acknowledge it.

        Raises:
            WrongWeights: an engine holds other tensors than the trainer published.
            WrongNoise: an engine's norms are not those that the version is to be sampled with.
            EngineError, EngineUnavailable: an engine refused or did not answer.
        """
        started = time.perf_counter()
        self.kind = ready.kind
        if ready.kind == "lora":
            await self._load_adapter(ready)
        else:
            await self._replace(ready)
        before, self.version = self.version, ready.version
        self.store.acknowledge(Served(ready.version))
        self.swap_s = time.perf_counter() - started
        self._release_idle(before)

    def generator(self, *, temperature: float, affinity: str, version: int | None = None) -> Generate:
        """A function that samples replies from the newest version at each request, or from the pinned `version`."""

        async def generate(prompt_ids: Sequence[int], max_tokens: int, seed: int) -> Completion:
            wanted = self.version if version is None else version
            with self._lease(wanted):
                reply = await self.client.generate(
                    prompt_ids,
                    version=wanted if self.kind == "lora" else None,
                    max_tokens=max_tokens,
                    temperature=temperature,
                    seed=seed if self.seeds or version is not None else None,
                    stop_token_ids=self.stop_ids,
                    affinity=affinity,
                    evaluation=version is not None,
                )
            self.sampled_tokens += len(reply.token_ids)
            return reply

        return generate

    @contextmanager
    def pinned(self, version: int) -> Generator[None]:
        """Keep a version served as it is; full weights are not swapped meanwhile."""
        with self._lease(version):
            self._pins += 1
            self._unpinned.clear()
            try:
                yield
            finally:
                self._pins -= 1
                if not self._pins:
                    self._unpinned.set()

    @asynccontextmanager
    async def without_noise(self) -> AsyncGenerator[None]:
        """Engines with clean norms, for requests of pinned versions alone: all others stop where they are, and go on afterwards
        with the noise as it was. Without noise in the run nothing happens.

        Raises:
            WrongNoise: the norms of an engine are not the clean ones; or, at the end, not those with noise.
            EngineError, EngineUnavailable: an engine refused or did not answer.
        """
        if self.noise is None:
            yield
            return
        await self.client.pause()
        await self.noise.clear()
        await self.client.resume(evaluation=True)
        yield
        await self.client.pause()
        await self.noise.apply(self.version)
        await self.client.resume()

    async def close(self) -> None:
        """Wait for adapters that are being unloaded, and for a broadcast that was claimed."""
        under_way = [*self._unloads, *([self._receiving] if self._receiving is not None else [])]
        if under_way:
            done, _ = await asyncio.wait(under_way, timeout=CLOSE_TIMEOUT_S)
            for failed in (task.exception() for task in done if not task.cancelled()):
                if failed is not None:  # who waited for it has been told, or has ended
                    logger.warning("at the end of the run: %s", failed)

    def noise_metrics(self) -> dict[str, float]:
        """Of the noise with which training rollouts are sampled."""
        return {} if self.noise is None else self.noise.metrics()

    @property
    def requests(self) -> int:
        """Requests in flight."""
        return sum(self._leases.values()) - self._pins

    async def _load_adapter(self, ready: WeightsReady) -> None:
        while self.max_loaded is not None and len(self._loaded) >= self.max_loaded:
            self._freed.clear()
            await self._freed.wait()
        await self.client.load_adapter(ready.version, ready.path)
        self._loaded.add(ready.version)
        self._prove(ready, await self.client.digest(ready.version))
        if self.noise is not None and self.noise.due(ready.version):
            await self._unpinned.wait()
            await self.client.pause()
            await self.noise.apply(ready.version)
            await self.client.resume()

    async def _replace(self, ready: WeightsReady) -> None:
        """Full weights. Engines sample nothing between the pause and the proof, and nothing any more where it fails."""
        await self._unpinned.wait()
        await self.client.pause()
        if self.noise is not None:
            await self.noise.clear()  # what is to be replaced and proven are the weights without it
            self.noise.base_replaced()
        if ready.transfer == "broadcast":
            self._receiving = asyncio.create_task(self._receive(ready))
            await asyncio.shield(self._receiving)  # once claimed, a version is received, also when the run ends meanwhile
        else:
            await self.client.reload_weights(ready.path)
        self._prove(ready, await self.client.digest(None))
        if self.noise is not None:
            await self.noise.apply(ready.version)
        self.client.set_served(ready.version)
        await self.client.resume()

    async def _receive(self, ready: WeightsReady) -> None:
        manifest = Manifest.read(Path(ready.path))
        self.store.claim(ready.version)  # the trainer, which has waited for this, sends now
        await self.client.receive_weights(ready.rendezvous, ready.path, workers=manifest.world_size - 1)

    def _prove(self, ready: WeightsReady, digests: Sequence[str]) -> None:
        for engine, digest in enumerate(digests):
            if digest != ready.digest:
                raise WrongWeights(
                    f"version {ready.version}: engine {engine} holds tensors with the digest {digest[:16]}..., the trainer "
                    f"published {ready.digest[:16]}... in {ready.path}; rollouts would come from another policy"
                )
        if not digests:
            raise WrongWeights(f"version {ready.version}: no engine said which tensors it holds")

    @contextmanager
    def _lease(self, version: int) -> Generator[None]:
        self._leases[version] += 1
        try:
            yield
        finally:
            self._leases[version] -= 1
            self._release_idle(version)

    def _release_idle(self, version: int) -> None:
        """Unload an adapter that is not the newest, once its last request is done."""
        if self._leases[version] > 0:
            return
        del self._leases[version]
        if version in self._loaded and version < self.version and version not in self._leaving:
            self._leaving.add(version)
            task = asyncio.get_running_loop().create_task(self._unload(version))
            self._unloads.add(task)
            task.add_done_callback(self._unloads.discard)

    async def _unload(self, version: int) -> None:
        try:
            await self.client.unload_adapter(version)
        except (EngineError, EngineUnavailable) as error:  # costs memory, not correctness; a dead engine shows elsewhere
            logger.warning("adapter v%d could not be unloaded: %s", version, error)
        self._loaded.discard(version)
        self._leaving.discard(version)
        self._freed.set()
