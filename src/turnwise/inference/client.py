"""Token-level client of one or more inference engines that speak vLLM's HTTP routes."""

import asyncio
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import aiohttp
import msgspec

from turnwise.inference.completion import Completion, FinishReason, extend_spans
from turnwise.inference.errors import EngineError, EngineUnavailable
from turnwise.inference.replicas import Replica, Replicas
from turnwise.inference.wire import CacheReset, CompletionRequest, CompletionResponse, RpcResponse, error_message
from turnwise.transport import adapter_name

ADMIN_TIMEOUT_S = 300.0  # loading or reloading weights; vLLM reloads 4B parameters in well under a minute
CONNECT_TIMEOUT_S = 30.0  # a busy engine may leave the listen queue full for some seconds
BACKOFF_S = 0.25  # before the first repetition, doubled for each further one
MAX_BACKOFF_S = 8.0
HEALTH_POLL_S = 0.2
SEED_STRIDE = 0x9E3779B97F4A7C15  # odd: continuation seeds of one request never meet
JSON_HEADERS = {"Content-Type": "application/json"}
TRANSPORT_ERRORS = (aiohttp.ClientError, TimeoutError, OSError)


class InferenceClient:
    """Sends prompts to the least loaded engine and administers all of them. An async context manager.

    Args:
        urls: base URLs of the replicas, all with the same model.
        model: the name under which the engines serve the base weights.
        request_timeout_s: deadline of one attempt of a generation request, in seconds.
        max_retries: repetitions after transport failures and 5xx, on another replica where there is one.
    """

    def __init__(self, urls: Sequence[str], *, model: str, request_timeout_s: float, max_retries: int) -> None:
        self.replicas = Replicas(urls)
        self.model = model
        self.max_retries = max_retries
        self.served = 0  # version of the full weights; LoRA requests name theirs
        self._timeout = aiohttp.ClientTimeout(total=request_timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        self._running = asyncio.Event()  # cleared between pause() and resume()
        self._running.set()
        self._decoder = msgspec.json.Decoder(CompletionResponse)
        self._encoder = msgspec.json.Encoder()
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=120.0),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent"),
            headers=JSON_HEADERS,
            timeout=self._timeout,
        )
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._session is not None:
            await self._session.close()

    def set_served(self, version: int) -> None:
        """Say which version the full weights are from now on; spans of replies carry it."""
        self.served = version

    async def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        version: int | None,
        max_tokens: int,
        temperature: float,
        seed: int | None,
        stop_token_ids: Sequence[int],
        affinity: str | None = None,
    ) -> Completion:
        """Sample one reply. An abort (weight swap) is taken up again from the tokens that are already there.

        Args:
            version: LoRA version to sample from; None for the full weights, whatever version they are.
            affinity: conversation; its turns prefer one replica, whose prefix cache knows the prompt.

        Raises:
            EngineError: the engine refused the request.
            EngineUnavailable: no engine answered within the allowed repetitions.
        """
        request = CompletionRequest(
            model=self.model if version is None else adapter_name(version),
            prompt=prompt_ids,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
            logprobs=0,
            stop_token_ids=stop_token_ids,
            return_token_ids=True,
            add_special_tokens=False,
        )
        ids: list[int] = []
        logprobs: list[float] = []
        spans: list[tuple[int, int]] = []
        while True:
            choice_ids, choice_logprobs, reason = await self._complete(request, affinity)
            ids += choice_ids
            logprobs += choice_logprobs
            if choice_ids:
                extend_spans(spans, self.served if version is None else version, len(choice_ids))
            if reason == "abort" and len(ids) < max_tokens:
                request.prompt = [*prompt_ids, *ids]
                request.max_tokens = max_tokens - len(ids)
                request.seed = None if seed is None else (seed + SEED_STRIDE * len(ids)) % 2**63
                continue
            finish: FinishReason = "stop" if reason == "stop" else "length"
            return Completion(tuple(ids), tuple(logprobs), finish, tuple(spans))

    async def prompt_logprobs(self, ids: Sequence[int], *, version: int | None) -> list[float]:
        """Logprobs (nats, temperature 1) of ids[1:] given what precedes each: `len(ids) - 1` values."""
        request = CompletionRequest(
            model=self.model if version is None else adapter_name(version),
            prompt=ids,
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            return_token_ids=True,
            add_special_tokens=False,
        )
        entries = (await self._post_completion(request, None)).choices[0].prompt_logprobs
        if entries is None or len(entries) != len(ids):
            raise EngineError(f"the engine returned prompt_logprobs for {len(entries or [])} of {len(ids)} tokens")
        known = zip(ids[1:], entries[1:], strict=True)
        return [entry[str(token)].logprob for token, entry in known if entry is not None]

    async def load_adapter(self, version: int, path: str) -> None:
        """Load a PEFT adapter folder on every replica under its version's name.

        Raises:
            EngineError: an engine refused it (no such file, unknown tensors, wrong shapes).
            EngineUnavailable: an engine did not answer.
        """
        body = {"lora_name": adapter_name(version), "lora_path": str(path)}
        await self._everywhere("POST", "/v1/load_lora_adapter", body, done_already="already been loaded")

    async def unload_adapter(self, version: int) -> None:
        """Unload a version on every replica, once its last request is done."""
        body = {"lora_name": adapter_name(version)}
        await self._everywhere("POST", "/v1/unload_lora_adapter", body, done_already="found")

    async def digest(self, version: int | None) -> list[str]:
        """`tensor_digest` of the tensors resident in each engine: of an adapter version, or (None) of the full weights."""
        args = [] if version is None else [adapter_name(version)]
        results = await self._rpc("weights_digest", args)
        return [str(worker) for replica in results for worker in replica]

    async def pause(self) -> None:
        """Stop generation on every replica. Running requests come back in part and go on after `resume()`."""
        self._running.clear()
        await self._everywhere("POST", "/pause?mode=abort", None)

    async def resume(self) -> None:
        """Go on after `pause()`, with an empty prefix cache: its blocks belong to the weights before.

        Raises:
            EngineError: an engine still holds blocks of requests from before the pause, and cannot empty it.
        """
        for answer in await self._everywhere("POST", "/reset_prefix_cache", None):
            if answer and not msgspec.json.decode(answer, type=CacheReset).success:
                raise EngineError("POST /reset_prefix_cache: the engine could not empty its prefix cache")
        await self._everywhere("POST", "/resume", None)
        self._running.set()

    async def reload_weights(self, path: str) -> None:
        """Replace the full weights on every replica by the checkpoint folder `path`; call between pause and resume."""
        await self._rpc("reload_weights", kwargs={"weights_path": str(path)})

    async def wait_healthy(self, timeout_s: float) -> None:
        """Wait until every replica answers `/health`.

        Raises:
            EngineUnavailable: one did not within `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        await asyncio.gather(*(self._wait_healthy(replica, deadline, timeout_s) for replica in self.replicas.all))

    async def _complete(self, request: CompletionRequest, affinity: str | None) -> tuple[list[int], list[float], str]:
        choice = (await self._post_completion(request, affinity)).choices[0]
        if choice.token_ids is None or choice.finish_reason is None:
            raise EngineError("the engine's reply has no token_ids or finish_reason; it must support return_token_ids")
        logprobs = choice.logprobs.token_logprobs if choice.logprobs is not None else []
        if len(logprobs) != len(choice.token_ids):
            raise EngineError(f"the engine returned {len(choice.token_ids)} token ids with {len(logprobs)} logprobs")
        return choice.token_ids, logprobs, choice.finish_reason

    async def _post_completion(self, request: CompletionRequest, affinity: str | None) -> CompletionResponse:
        body = self._encoder.encode(request)
        failed: list[Replica] = []
        reason = ""
        for attempt in range(self.max_retries + 1):
            if attempt:
                await asyncio.sleep(_backoff(attempt))
            if not self._running.is_set():
                await self._wait_resumed()
            replica = self.replicas.choose(affinity, failed)
            replica.sent()
            try:
                async with self._open.post(replica.completions, data=body) as response:
                    content = await response.read()
                    status = response.status
            except TRANSPORT_ERRORS as error:
                reason = f"{replica.url}: {type(error).__name__}: {error}"
                replica.failed()
                failed.append(replica)
                continue
            finally:
                replica.returned()
            if status == 200:
                replica.answered()
                return self._decoder.decode(content)
            reason = f"{replica.url}: HTTP {status}: {error_message(content)}"
            if status < 500:
                raise EngineError(reason)
            failed.append(replica)
        raise EngineUnavailable(f"no completion after {self.max_retries + 1} attempts; the last one: {reason}")

    async def _wait_resumed(self) -> None:
        try:
            await asyncio.wait_for(self._running.wait(), self._timeout.total)
        except TimeoutError:
            raise EngineUnavailable(f"generation was paused for more than {self._timeout.total} s") from None

    async def _everywhere(self, method: str, path: str, body: object, done_already: str | None = None) -> list[bytes]:
        """The same administrative request to every replica; see `_admin`."""
        return list(await asyncio.gather(*(self._admin(r, method, path, body, done_already) for r in self.replicas.all)))

    async def _admin(self, replica: Replica, method: str, path: str, body: object, done_already: str | None) -> bytes:
        """`done_already`: words of the 4xx with which the engine answers a repetition whose first attempt did arrive."""
        data = None if body is None else self._encoder.encode(body)
        timeout = aiohttp.ClientTimeout(total=ADMIN_TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S)
        reason = ""
        for attempt in range(self.max_retries + 1):
            if attempt:
                await asyncio.sleep(_backoff(attempt))
            try:
                async with self._open.request(method, replica.url + path, data=data, timeout=timeout) as response:
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
                raise EngineError(f"{method} {replica.url}{path}: {reason}")
        raise EngineUnavailable(f"{method} {replica.url}{path}: no answer after {self.max_retries + 1} attempts; {reason}")

    async def _rpc(self, method: str, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> list[list[Any]]:
        body = {"method": method, "args": list(args), "kwargs": kwargs or {}, "timeout": ADMIN_TIMEOUT_S}
        answers = await self._everywhere("POST", "/collective_rpc", body)
        results = [msgspec.json.decode(answer, type=RpcResponse).results for answer in answers]
        for replica, workers in zip(self.replicas.all, results, strict=True):
            for worker in workers:
                if isinstance(worker, dict) and "error" in worker:
                    raise EngineError(f"{method} {replica.url}: {worker['error']}")
        return results

    async def _wait_healthy(self, replica: Replica, deadline: float, timeout_s: float) -> None:
        while True:
            try:
                timeout = aiohttp.ClientTimeout(total=max(0.1, min(5.0, deadline - time.monotonic())))
                async with self._open.get(f"{replica.url}/health", timeout=timeout) as response:
                    if response.status == 200:
                        return
                    reason = f"HTTP {response.status}"
            except TRANSPORT_ERRORS as error:
                reason = f"{type(error).__name__}: {error}"
            if time.monotonic() > deadline:
                raise EngineUnavailable(f"{replica.url}/health did not answer within {timeout_s:.0f} s: {reason}")
            await asyncio.sleep(HEALTH_POLL_S)

    @property
    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("the client is not open; use `async with InferenceClient(...) as client:`")
        return self._session


def _backoff(attempt: int) -> float:
    return min(MAX_BACKOFF_S, BACKOFF_S * 2 ** (attempt - 1))
