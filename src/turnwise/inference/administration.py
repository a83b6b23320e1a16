"""Requests that every engine of a run gets alike: loading weights, pausing, asking what is resident."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
import msgspec

from turnwise.inference.errors import EngineError, EngineUnavailable
from turnwise.inference.replicas import Replica, Replicas
from turnwise.inference.wire import RpcResponse, decoded, error_message

ADMIN_TIMEOUT_S = 300.0  # loading or reloading weights; vLLM reloads 4B parameters in well under a minute
CONNECT_TIMEOUT_S = 30.0  # a busy engine may leave the listen queue full for some seconds
BACKOFF_S = 0.25  # before the first repetition, doubled for each further one
MAX_BACKOFF_S = 8.0
HEALTH_POLL_S = 0.2
TRANSPORT_ERRORS = (aiohttp.ClientError, TimeoutError, OSError)

_rpc_response = msgspec.json.Decoder(RpcResponse)


class Administration:
    """Each request has a deadline of `ADMIN_TIMEOUT_S` seconds, and is repeated after transport failures and 5xx.

    Args:
        replicas: the engines.
        session: gives the open HTTP session.
        max_retries: repetitions of a request.
    """

    def __init__(self, replicas: Replicas, session: Callable[[], aiohttp.ClientSession], *, max_retries: int) -> None:
        self._replicas, self._session, self._max_retries = replicas, session, max_retries

    async def post(self, path: str, body: object = None, *, done_already: str | None = None) -> list[bytes]:
        """The same request to every engine; the content of each answer.

        Args:
            path: of the route.
            body: sent as JSON.
            done_already: words of the 4xx with which an engine answers a repetition whose first attempt did arrive.

        Raises:
            EngineError: an engine refused it.
            EngineUnavailable: an engine did not answer.
        """
        retries = self._max_retries
        return list(await asyncio.gather(*(self._post(r, path, body, done_already, retries) for r in self._replicas.all)))

    async def rpc(self, method: str, *args: Any, **kwargs: Any) -> list[list[Any]]:
        """Call a method of every worker; the results of the workers of each engine.

        Raises:
            EngineError: an engine refused it, or a worker could not do it.
            EngineUnavailable: an engine did not answer.
        """
        body = _rpc_body(method, args, kwargs)
        return self._results(method, await self.post("/collective_rpc", body))

    async def rpc_once(self, method: str, args: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """`rpc` with arguments of its own for each engine, and without repetitions; raises the same."""
        calls = zip(self._replicas.all, args, strict=True)
        bodies = [self._post(replica, "/collective_rpc", _rpc_body(method, of_one, {}), None, 0) for replica, of_one in calls]
        return self._results(method, await asyncio.gather(*bodies))

    async def wait_healthy(self, timeout_s: float) -> None:
        """Wait until every engine answers `/health`.

        Raises:
            EngineUnavailable: one did not within `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        await asyncio.gather(*(self._wait_healthy(replica, deadline, timeout_s) for replica in self._replicas.all))

    def _results(self, method: str, answers: Sequence[bytes]) -> list[list[Any]]:
        pairs = zip(self._replicas.all, answers, strict=True)
        results = [decoded(answer, _rpc_response, f"{method} {replica.url}").results for replica, answer in pairs]
        for replica, workers in zip(self._replicas.all, results, strict=True):
            for worker in workers:
                if isinstance(worker, dict) and "error" in worker:
                    raise EngineError(f"{method} {replica.url}: {worker['error']}")
        return results

    async def _post(self, replica: Replica, path: str, body: object, done_already: str | None, retries: int) -> bytes:
        data = None if body is None else msgspec.json.encode(body)
        timeout = aiohttp.ClientTimeout(total=ADMIN_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S)
        reason = ""
        for attempt in range(retries + 1):
            if attempt:
                await asyncio.sleep(backoff(attempt))
            try:
                async with self._session().post(replica.url + path, data=data, timeout=timeout) as response:
                    content = await response.read()
            except TRANSPORT_ERRORS as error:
                reason = f"{type(error).__name__}: {error}"
                continue
            if response.status == 200:
                return content
            reason = f"HTTP {response.status}: {error_message(content)}"
            if response.status < 500:
                if attempt and done_already is not None and done_already in reason:
                    return content
                raise EngineError(f"POST {replica.url}{path}: {reason}")
        raise EngineUnavailable(f"POST {replica.url}{path}: no answer after {retries + 1} attempts; {reason}")

    async def _wait_healthy(self, replica: Replica, deadline: float, timeout_s: float) -> None:
        while True:
            try:
                timeout = aiohttp.ClientTimeout(total=max(0.1, min(5.0, deadline - time.monotonic())))
                async with self._session().get(f"{replica.url}/health", timeout=timeout) as response:
                    if response.status == 200:
                        return
                    reason = f"HTTP {response.status}"
            except TRANSPORT_ERRORS as error:
                reason = f"{type(error).__name__}: {error}"
            if time.monotonic() > deadline:
                raise EngineUnavailable(f"{replica.url}/health did not answer within {timeout_s:.0f} s: {reason}")
            await asyncio.sleep(HEALTH_POLL_S)


def backoff(attempt: int) -> float:
    """Seconds to wait before a repetition, counted from 1."""
    return min(MAX_BACKOFF_S, BACKOFF_S * 2 ** (attempt - 1))


def _rpc_body(method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"method": method, "args": list(args), "kwargs": kwargs, "timeout": ADMIN_TIMEOUT_S}
