"""vLLM's HTTP routes in front of the engine."""

import asyncio
import itertools
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from turnwise.inference.embedded.engine import Engine
from turnwise.inference.embedded.lora import AdapterError
from turnwise.inference.embedded.protocol import (
    CompletionBody,
    LoadBody,
    RequestError,
    RpcBody,
    ServedChoice,
    ServedCompletion,
    ServedLogprobs,
    UnloadBody,
    bad_request,
    not_found,
)
from turnwise.inference.embedded.sequence import Sequence
from turnwise.inference.inbox import WeightsInbox
from turnwise.inference.norms import NormNoise
from turnwise.transport import BroadcastError

MAX_BODY = 64 * 2**20
T = TypeVar("T", bound=msgspec.Struct)


class Server:
    """The routes of one engine.

    Args:
        model: name under which the base weights are served.
        eos_ids: tokens that end a reply unless a request says `ignore_eos`.
        vocabulary: number of token ids; prompts outside are refused.
    """

    def __init__(self, engine: Engine, *, model: str, eos_ids: frozenset[int], vocabulary: int) -> None:
        self.engine = engine
        self.model = model
        self.eos_ids = eos_ids
        self.vocabulary = vocabulary
        self._retiring: set[str] = set()  # adapters that take no new requests
        self._numbers = itertools.count()
        self._inbox = WeightsInbox()
        self._noise = NormNoise()  # used in the engine's thread

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY, middlewares=[_errors])
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/metrics", self._metrics),
                web.get("/v1/models", self._models),
                web.post("/v1/completions", self._completions),
                web.post("/v1/load_lora_adapter", self._load_adapter),
                web.post("/v1/unload_lora_adapter", self._unload_adapter),
                web.post("/pause", self._pause),
                web.post("/resume", self._resume),
                web.post("/reset_prefix_cache", self._reset_prefix_cache),
                web.post("/collective_rpc", self._rpc),
            ]
        )
        return app

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.engine.alive else 503)

    async def _models(self, request: web.Request) -> web.Response:
        names = [self.model, *self.engine.decoder.adapters]
        data = [{"id": n, "object": "model", "parent": None if n == self.model else self.model} for n in names]
        return web.json_response({"object": "list", "data": data})

    async def _metrics(self, request: web.Request) -> web.Response:
        values = {
            "vllm:num_requests_running": ("gauge", self.engine.running),
            "vllm:num_requests_waiting": ("gauge", self.engine.waiting),
            "vllm:generation_tokens_total": ("counter", self.engine.generated),
            "vllm:prompt_tokens_total": ("counter", self.engine.prompted),
            "vllm:prefix_cache_queries_total": ("counter", self.engine.asked),
            "vllm:prefix_cache_hits_total": ("counter", self.engine.asked - self.engine.prompted),
        }
        label = f'{{model_name="{self.model}"}}'
        lines = [f"# TYPE {name} {kind}\n{name}{label} {float(value)}\n" for name, (kind, value) in values.items()]
        return web.Response(text="".join(lines))

    async def _completions(self, request: web.Request) -> web.Response:
        body = _decode(await request.read(), CompletionBody)
        prompt = self._check(body)
        adapter = self._adapter(body.model)
        prompt_logprobs = None
        if body.prompt_logprobs is not None:
            prompt_logprobs = await _finish(self.engine.call(lambda: self._prompt_logprobs(prompt, adapter)))
            adapter = self._adapter(body.model)  # it may have been unloaded meanwhile
        sequence = await self._generate(body, prompt, adapter)
        choice = _choice(body, sequence, prompt_logprobs)
        sampled = len(sequence.logprobs)
        usage = {"prompt_tokens": len(prompt), "completion_tokens": sampled, "total_tokens": len(prompt) + sampled}
        name = self.model if adapter is None else adapter
        answer = ServedCompletion(f"cmpl-{next(self._numbers)}", name, int(time.time()), [choice], usage)
        return web.Response(body=msgspec.json.encode(answer), content_type="application/json")

    def _prompt_logprobs(self, prompt: list[int], adapter: str | None) -> list[float]:
        if adapter is not None and adapter not in self.engine.decoder.adapters:
            raise not_found(f"The model `{adapter}` does not exist.")
        return self.engine.decoder.prompt_logprobs(prompt, adapter)

    async def _generate(self, body: CompletionBody, prompt: list[int], adapter: str | None) -> Sequence:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def settle() -> None:
            if not future.done():
                future.set_result(None)

        def on_done(_: Sequence) -> None:
            loop.call_soon_threadsafe(settle)

        sequence = Sequence(
            prompt=prompt,
            max_tokens=min(body.max_tokens, self.engine.decoder.max_length - len(prompt)),  # as vLLM does
            temperature=body.temperature,
            seed=int.from_bytes(os.urandom(8)) if body.seed is None else body.seed,
            stop_ids=frozenset(body.stop_token_ids or ()) | (frozenset() if body.ignore_eos else self.eos_ids),
            adapter=adapter,
            on_done=on_done,
        )
        self.engine.submit(sequence)
        try:
            await future
        except asyncio.CancelledError:
            self.engine.cancel(sequence)
            raise
        if sequence.error:
            raise RequestError(500, "InternalServerError", sequence.error)
        return sequence

    def _check(self, body: CompletionBody) -> list[int]:
        """The prompt's ids. Raises RequestError for what this engine does not do, instead of doing something else."""
        ids = body.prompt
        if not isinstance(ids, list) or not ids:
            raise bad_request("prompt must be one non-empty list of token ids; this engine has no tokenizer.")
        outside = next((token for token in ids if not 0 <= token < self.vocabulary), None)
        if outside is not None:
            raise bad_request(f"prompt holds token id {outside}, out of vocabulary (0 to {self.vocabulary - 1}).")
        if body.n != 1 or body.stream or body.top_p != 1.0 or body.top_k not in (0, -1):
            raise bad_request("n, stream, top_p and top_k are not supported; send n requests without them.")
        if body.max_tokens < 1:
            raise bad_request(f"max_tokens must be at least 1, got {body.max_tokens}.")
        length = self.engine.decoder.max_length
        if body.max_tokens > length:
            raise bad_request(f"max_tokens={body.max_tokens} cannot be greater than max_model_len={length}; raise seq_len.")
        if body.temperature < 0:
            raise bad_request(f"temperature must be non-negative, got {body.temperature}.")
        if len(ids) >= length:
            raise bad_request(
                f"This model's maximum context length is {length} tokens, and your prompt contains {len(ids)} "
                f"tokens, which leaves none for a reply. Send a shorter prompt or raise seq_len."
            )
        return ids

    def _adapter(self, model: str | None) -> str | None:
        if model is None or model == self.model:
            return None
        if model not in self.engine.decoder.adapters or model in self._retiring:
            raise not_found(f"The model `{model}` does not exist.")
        return model

    async def _load_adapter(self, request: web.Request) -> web.Response:
        body = _decode(await request.read(), LoadBody)
        if body.lora_name in self.engine.decoder.adapters and not body.load_inplace:
            raise bad_request(
                f"The lora adapter '{body.lora_name}' has already been loaded. If you want to load the adapter in place, set "
                "'load_inplace' to True."
            )
        try:
            await _finish(self.engine.call(lambda: self._load(body)))
        except AdapterError as error:
            raise bad_request(str(error)) from error
        return web.Response(text=f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    def _load(self, body: LoadBody) -> None:
        self.engine.decoder.load_adapter(body.lora_name, Path(body.lora_path))

    async def _unload_adapter(self, request: web.Request) -> web.Response:
        name = _decode(await request.read(), UnloadBody).lora_name
        if name not in self.engine.decoder.adapters or name in self._retiring:
            raise not_found(f"The lora adapter '{name}' cannot be found.")
        self._retiring.add(name)
        try:
            await _finish(self.engine.when_unused(name))
            await _finish(self.engine.call(lambda: self.engine.decoder.unload_adapter(name)))
        finally:
            self._retiring.discard(name)
        return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")

    async def _pause(self, request: web.Request) -> web.Response:
        mode = request.query.get("mode", "abort")
        if mode not in ("abort", "wait", "keep"):
            raise bad_request(f"mode must be abort, wait or keep, got {mode}.")
        await _finish(self.engine.pause(mode))
        return web.json_response({"status": "paused"})

    async def _resume(self, request: web.Request) -> web.Response:
        await _finish(self.engine.resume())
        return web.json_response({"status": "resumed"})

    async def _reset_prefix_cache(self, request: web.Request) -> web.Response:
        await _finish(self.engine.call(self.engine.decoder.reset_prefix_cache))
        return web.Response()

    async def _rpc(self, request: web.Request) -> web.Response:
        body = _decode(await request.read(), RpcBody)
        calls: dict[str, Callable[..., object]] = {
            "weights_digest": self._digest,
            "reload_weights": self._reload,
            "receive_weights": self._receive,
            "apply_noise": self._apply_noise,
        }
        if body.method not in calls:
            raise bad_request(f"method must be one of {', '.join(calls)}, got {body.method}.")
        try:
            result = await _finish(self.engine.call(lambda: calls[body.method](*body.args, **body.kwargs)))
        except (TypeError, ValueError, OSError, BroadcastError) as error:
            raise bad_request(f"{body.method}: {error}") from error
        return web.json_response({"results": [result]})

    def _digest(self, name: str | None = None) -> str:
        if name is not None and name not in self.engine.decoder.adapters:
            raise ValueError(f"The lora adapter '{name}' cannot be found.")
        return self.engine.decoder.digest(name)

    def _reload(self, weights_path: str) -> None:
        self._check_idle()
        self.engine.decoder.reload(Path(weights_path))

    def _receive(self, rendezvous: str, folder: str, first_rank: int) -> None:
        self._check_idle()
        self._inbox.take(rendezvous, folder, first_rank, self.engine.decoder.replace)

    def _apply_noise(self, sigma: float, seed: int) -> dict[str, Any]:
        self._check_idle()
        return self._noise.apply(self.engine.decoder.norms(), sigma, seed)

    def _check_idle(self) -> None:
        if self.engine.decoder.rows:
            raise ValueError("requests are running; POST /pause?mode=abort first.")


def _choice(body: CompletionBody, sequence: Sequence, prompt_logprobs: list[float] | None) -> ServedChoice:
    ids = sequence.sampled
    choice = ServedChoice(finish_reason=sequence.finish_reason or "abort")
    if body.return_token_ids:
        choice.token_ids, choice.prompt_token_ids = ids, sequence.prompt
    if body.logprobs is not None:
        choice.logprobs = ServedLogprobs(sequence.logprobs, [f"token_id:{token}" for token in ids])
    if sequence.finish_reason == "stop" and ids[-1] in (body.stop_token_ids or ()):
        choice.stop_reason = ids[-1]
    if prompt_logprobs is not None:
        known = zip(sequence.prompt[1:], prompt_logprobs, strict=True)
        choice.prompt_logprobs = [None, *({str(token): {"logprob": value}} for token, value in known)]
    return choice


def _decode(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise bad_request(f"invalid request body: {error}") from error


async def _finish(future: Any) -> Any:
    """Await what the worker thread computes. A client that goes away does not undo it."""
    return await asyncio.shield(asyncio.wrap_future(future))


@web.middleware
async def _errors(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
    try:
        return await handler(request)
    except RequestError as error:
        return web.Response(body=error.body(), status=error.status, content_type="application/json")
