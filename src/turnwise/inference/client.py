"""Token-level client of one or more inference engines that speak vLLM's HTTP routes."""

import asyncio
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import aiohttp
import msgspec

from turnwise.inference.administration import ADMIN_TIMEOUT_S, CONNECT_TIMEOUT_S, TRANSPORT_ERRORS, Administration, backoff
from turnwise.inference.answers import Answer, refusal
from turnwise.inference.completion import Completion, FinishReason, extend_spans
from turnwise.inference.errors import EngineError, EngineUnavailable
from turnwise.inference.gate import Gate, Open
from turnwise.inference.replicas import Replica, Replicas
from turnwise.inference.wire import CacheReset, CompletionRequest, NoiseReport, decoded, noise_reports
from turnwise.transport import adapter_name

REPAUSE_S = 0.25  # a pause reaches an engine in milliseconds, and so do requests that were sent before it
KEEP_ALIVE_S = 60.0  # of idle connections: engines keep them longer (75 and 300 s), so that no request meets one that closes
SEED_STRIDE = 0x9E3779B97F4A7C15  # odd: continuation seeds of one request never meet
JSON_HEADERS = {"Content-Type": "application/json"}

_cache_reset = msgspec.json.Decoder(CacheReset)


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
        self._gate = Gate()  # closed between pause() and resume()
        self._encoder = msgspec.json.Encoder()
        self._session: aiohttp.ClientSession | None = None
        self._engines = Administration(self.replicas, lambda: self._open, max_retries=max_retries)

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
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
        evaluation: bool = False,
    ) -> Completion:
        """Sample one reply. An abort (weight swap) is taken up again from the tokens that are already there.

        Args:
            version: LoRA version to sample from; None for the full weights, whatever version they are.
            affinity: conversation; its turns prefer one replica, whose prefix cache knows the prompt.
            evaluation: whether the request goes on after `resume(evaluation=True)`.

        Raises:
            EngineError: the engine refused the request, or its logits were not finite.
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
            answer = await self._post_completion(request, affinity, evaluation=evaluation)
            choice_ids, choice_logprobs, reason = answer.reply(version)
            ids += choice_ids
            logprobs += choice_logprobs
            if choice_ids:
                extend_spans(spans, answer.served if version is None else version, len(choice_ids))
            if reason == "abort" and len(ids) < max_tokens:
                request.prompt = [*prompt_ids, *ids]
                request.max_tokens = max_tokens - len(ids)
                request.seed = None if seed is None else (seed + SEED_STRIDE * len(ids)) % 2**63
                continue
            finish: FinishReason = "stop" if reason == "stop" else "length"
            return Completion(tuple(ids), tuple(logprobs), finish, tuple(spans))

    async def prompt_logprobs(self, ids: Sequence[int], *, version: int | None, replica: Replica | None = None) -> list[float]:
        """Logprobs (nats, temperature 1) of ids[1:] given what precedes each: `len(ids) - 1` values.

        vLLM computes the whole prompt for it, whatever its prefix cache holds.

        Args:
            replica: the engine to ask, and no other.

        Raises:
            EngineError: the engine refused the request, left tokens out, or its logits were not finite.
            EngineUnavailable: it did not answer within the allowed repetitions.
        """
        request = CompletionRequest(
            model=self.model if version is None else adapter_name(version),
            prompt=ids,
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=0,
            return_token_ids=True,
            add_special_tokens=False,
        )
        answer = await self._post_completion(request, None, replica)
        return answer.prompt_logprobs(ids, version)

    async def load_adapter(self, version: int, path: str) -> None:
        """Load a PEFT adapter folder on every replica under its version's name.

        Raises:
            EngineError: an engine refused it (no such file, unknown tensors, wrong shapes).
            EngineUnavailable: an engine did not answer.
        """
        body = {"lora_name": adapter_name(version), "lora_path": str(path)}
        await self._engines.post("/v1/load_lora_adapter", body, done_already="already been loaded")

    async def unload_adapter(self, version: int) -> None:
        """Unload a version on every replica, once its last request is done."""
        body = {"lora_name": adapter_name(version)}
        await self._engines.post("/v1/unload_lora_adapter", body, done_already="found")

    async def digest(self, version: int | None) -> list[str]:
        """`tensor_digest` of the tensors resident in each engine: of an adapter version, or (None) of the full weights."""
        args = [] if version is None else [adapter_name(version)]
        results = await self._engines.rpc("weights_digest", *args)
        return [str(worker) for replica in results for worker in replica]

    async def pause(self) -> None:
        """Stop generation on every replica. Every request has come back when this returns; they go on after `resume()`.

        A request may reach its engine after the pause, which would then keep it for the weights that come; the pause is repeated
        for it.

        Raises:
            EngineUnavailable: a request did not come back within `ADMIN_TIMEOUT_S`.
        """
        self._gate.set(Open.NONE)
        deadline = time.monotonic() + ADMIN_TIMEOUT_S
        while True:
            await self._engines.post("/pause?mode=abort")
            if await self.replicas.idle(REPAUSE_S):
                return
            if time.monotonic() > deadline:
                raise EngineUnavailable(f"requests were still under way {ADMIN_TIMEOUT_S:g} s after POST /pause?mode=abort")

    async def resume(self, *, evaluation: bool = False) -> None:
        """Go on after `pause()`, with an empty prefix cache: its blocks belong to the weights before.

        Args:
            evaluation: whether only requests of evaluations go on; the others wait for a `pause` and a `resume` of their own.

        Raises:
            EngineError: an engine still holds blocks of requests from before the pause, and cannot empty it.
        """
        for answer in await self._engines.post("/reset_prefix_cache"):
            if answer and not decoded(answer, _cache_reset, "POST /reset_prefix_cache").success:
                raise EngineError("POST /reset_prefix_cache: the engine could not empty its prefix cache")
        await self._engines.post("/resume")
        self._gate.set(Open.EVALUATION if evaluation else Open.ALL)

    async def reload_weights(self, path: str) -> None:
        """Replace the full weights on every replica by the checkpoint folder `path`; call between pause and resume."""
        await self._engines.rpc("reload_weights", weights_path=str(path))

    async def receive_weights(self, rendezvous: str, folder: str, *, workers: int) -> None:
        """Have all engines receive the full weights that the trainer broadcasts; call between pause and resume.

        Args:
            rendezvous: host:port where the trainer waits.
            folder: of the version, with its manifest.
            workers: of all engines together, each an equal part.

        Raises:
            EngineError: an engine did not get them, or could not load them.
            EngineUnavailable: an engine did not answer. Nothing is repeated: the trainer sends once.
        """
        each = workers // len(self.replicas.all)
        first_ranks = [1 + index * each for index in range(len(self.replicas.all))]  # rank 0 is the trainer
        await self._engines.rpc_once("receive_weights", [[rendezvous, folder, rank] for rank in first_ranks])

    async def apply_noise(self, sigma: float, seed: int) -> list[NoiseReport]:
        """Set the norms of every worker to their clean weights plus N(0, sigma), or for sigma = 0 to these alone; call between
        pause and resume.

        Returns:
            What each worker of each engine holds now.

        Raises:
            EngineError: an engine refused it, or a worker did not say what it holds.
            EngineUnavailable: an engine did not answer.
        """
        return noise_reports(await self._engines.rpc("apply_noise", sigma, seed))

    async def wait_healthy(self, timeout_s: float) -> None:
        """Wait until every replica answers `/health`.

        Raises:
            EngineUnavailable: one did not within `timeout_s` seconds.
        """
        await self._engines.wait_healthy(timeout_s)

    async def _post_completion(
        self, request: CompletionRequest, affinity: str | None, only: Replica | None = None, *, evaluation: bool = False
    ) -> Answer:
        """The answer, with the version that was served when the request was sent; `pause` waits for it before that changes."""
        body = self._encoder.encode(request)
        failed: list[Replica] = []
        reason = ""
        for attempt in range(self.max_retries + 1):
            if attempt:
                await asyncio.sleep(backoff(attempt))
            await self._wait_resumed(evaluation)
            replica = only or self.replicas.choose(affinity, failed)
            served = self.served
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
                return Answer.of(content, replica.url, served)
            reason = refusal(replica.url, status, content)
            if status < 500:
                raise EngineError(reason)
            failed.append(replica)
        raise EngineUnavailable(f"no completion after {self.max_retries + 1} attempts; the last one: {reason}")

    async def _wait_resumed(self, evaluation: bool) -> None:
        try:
            await self._gate.passed(evaluation=evaluation, timeout_s=self._timeout.total)
        except TimeoutError:
            raise EngineUnavailable(f"generation was paused for more than {self._timeout.total} s") from None

    @property
    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("the client is not open; use `async with InferenceClient(...) as client:`")
        return self._session
