"""Running engines for the checks: an event loop, a client, and the policy as a run would serve it."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, Self, TypeVar

from turnwise.config import RLConfig
from turnwise.inference.client import InferenceClient
from turnwise.inference.launcher import check_engine
from turnwise.launch.engines import Engines, client_of
from turnwise.launch.gpus import Machine
from turnwise.orchestrator.env_threads import EnvThreads
from turnwise.orchestrator.weights import Policy
from turnwise.transport import RunDir, WeightsStore

Answer = TypeVar("Answer")
OpenEngines = AbstractAsyncContextManager[Sequence[str]]  # starts engines and gives their URLs; ends them


class Session:
    """Engines that serve the untrained policy as version 0, until `close`.

    Nothing happens on the loop between two calls of `run`.

    Args:
        config: resolved, and written to the folder that it names.
        engines: entered on the session's loop.
        stop_ids: that end a reply.

    Raises:
        ConfigError: the engines do not start.
    """

    client: InferenceClient
    policy: Policy
    threads: EnvThreads

    def __init__(self, config: RLConfig, engines: OpenEngines, *, stop_ids: Sequence[int]) -> None:
        self._runner, self._exit = asyncio.Runner(), AsyncExitStack()
        try:
            self.run(self._open(config, engines, stop_ids))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """The result of a coroutine, on the loop that the client belongs to."""
        return self._runner.run(work)

    def close(self) -> None:
        """End the engines and everything that carries their run id."""
        try:
            self.run(self._exit.aclose())
        finally:
            self._runner.close()

    async def _open(self, config: RLConfig, engines: OpenEngines, stop_ids: Sequence[int]) -> None:
        urls = await self._exit.enter_async_context(engines)
        self.client = await self._exit.enter_async_context(client_of(config, urls))
        self.threads = EnvThreads()
        self._exit.push_async_callback(self.threads.drain)
        store = WeightsStore(RunDir(config.output_dir).weights)
        self.policy = Policy(self.client, store, stop_ids=stop_ids, max_loaded=config.adapter_slots, seeds=config.request_seeds)
        self._exit.push_async_callback(self.policy.close)
        # the base weights are version 0 until a swap: no trainer has published yet, and a fresh adapter changes nothing
        self.policy.kind, self.policy.version = "full", 0
        self.client.set_served(0)


@asynccontextmanager
async def real_engines(config: RLConfig, machine: Machine, run_id: str) -> AsyncGenerator[Sequence[str]]:
    """The engines of a resolved configuration, as processes of their own.

    Raises:
        ConfigError: the engine is not installed, or does not start.
    """
    check_engine(config)
    with Engines(config, machine, run_id=run_id) as engines:
        await engines.serving()
        yield engines.urls
