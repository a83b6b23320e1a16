"""What `--middleware turnwise.inference.vllm_route.TokenRoute` adds to vLLM's server: a short way from token ids to token ids.

vLLM's own `/v1/completions` turns every token into text twice, once for the reply and once for its logprob, and checks requests
and builds answers as trees of pydantic models. That takes its one process several milliseconds a request, and requests that end
together, as those of a batch do, wait for one another. Here a request goes to the engine as it is, no token becomes text, and
the answer is written from the lists that the engine hands over. Whatever is not exactly a request of `InferenceClient.generate`
goes on to vLLM's own route, and so does every request that the engine refuses: words and codes of errors are vLLM's.

Imported by the server of vLLM 0.26 to 0.32, in vLLM's environment.
"""

import asyncio
import itertools
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Annotated, Any, Literal

import msgspec

# vLLM is not in the environment that the types are checked in
from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError  # pyright: ignore[reportMissingImports]

PATH = "/v1/completions"
LOWEST_LOGPROB = -9999.0  # JSON has no infinity; as vLLM's route

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

TokenId = Annotated[int, msgspec.Meta(ge=0)]


class TokenRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The requests that are answered here; `turnwise.inference.wire.CompletionRequest` without prompt logprobs."""

    model: str
    prompt: Annotated[list[TokenId], msgspec.Meta(min_length=1)]
    logprobs: Literal[0]
    return_token_ids: Literal[True]
    add_special_tokens: Literal[False]
    temperature: Annotated[float, msgspec.Meta(ge=0)]
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] = 16
    seed: int | None = None
    stop_token_ids: list[int] = []


class Logprobs(msgspec.Struct):
    """Nats, one for each sampled token."""

    token_logprobs: list[float]


class Choice(msgspec.Struct):
    """The reply."""

    token_ids: list[int]
    logprobs: Logprobs
    finish_reason: str
    stop_reason: int | str | None
    index: int = 0
    text: str = ""


class Answer(msgspec.Struct):
    """As vLLM's, without text and without what repeats the request."""

    id: str
    model: str
    created: int
    choices: list[Choice]
    usage: dict[str, int]
    object: str = "text_completion"


class TokenRoute:
    """ASGI middleware in front of vLLM's application."""

    def __init__(self, app: App) -> None:
        self.app = app
        self._decoder = msgspec.json.Decoder(TokenRequest)
        self._encoder = msgspec.json.Encoder()
        self._numbers = itertools.count()
        self._guarded = bool(os.environ.get("VLLM_API_KEY"))  # whoever must be asked for a key is asked by vLLM

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PATH or scope["method"] != "POST" or self._guarded:
            await self.app(scope, receive, send)
            return
        body = await _body(receive)
        state = scope["app"].state
        try:
            request = self._decoder.decode(body)
            answer = await _unless_gone(self._answer(request, state), receive)
        except (msgspec.MsgspecError, ValueError, _NotHere, EngineDeadError, EngineGenerateError):
            await self.app(scope, _again(body, receive), send)
            return
        if answer is not None:
            headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": answer})

    async def _answer(self, request: TokenRequest, state: Any) -> bytes:
        """The body of the answer.

        Raises:
            _NotHere: vLLM's route must say what is wrong.
            ValueError: the engine refused the request.
        """
        models, engine = state.openai_serving_models, state.engine_client
        adapter = models.lora_requests.get(request.model)
        context = engine.model_config.max_model_len
        room = context - len(request.prompt)
        known = adapter is not None or models.is_base_model(request.model)
        if not known or room < 1 or request.max_tokens > context or state.args.api_key:
            raise _NotHere
        parameters = SamplingParams(
            temperature=request.temperature,
            max_tokens=min(request.max_tokens, room),
            seed=request.seed,
            stop_token_ids=request.stop_token_ids,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,
        )
        number = f"cmpl-turnwise-{next(self._numbers)}"
        prompt = {"type": "token", "prompt_token_ids": request.prompt}
        last: Any = None
        async for output in engine.generate(prompt, parameters, number, lora_request=adapter):
            last = output
        return self._encoder.encode(_reply(number, request, last.outputs[0]))


def _reply(number: str, request: TokenRequest, output: Any) -> Answer:
    if output.finish_reason == "error":
        raise _NotHere
    flat = output.logprobs
    # the sampled token comes first; NaN is not larger, stays, and is written as null
    logprobs = [max(flat.logprobs[start], LOWEST_LOGPROB) for start in flat.start_indices]
    ids = list(output.token_ids)
    choice = Choice(ids, Logprobs(logprobs), output.finish_reason, output.stop_reason)
    prompt = len(request.prompt)
    usage = {"prompt_tokens": prompt, "completion_tokens": len(ids), "total_tokens": prompt + len(ids)}
    return Answer(number, request.model, int(time.time()), [choice], usage)


class _NotHere(Exception):
    """For vLLM's own route."""


async def _body(receive: Receive) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands over a body which has been read, and then what comes after it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def once() -> Message:
        return messages.pop() if messages else await receive()

    return once


async def _unless_gone(answer: Awaitable[bytes], receive: Receive) -> bytes | None:
    """The answer; None when the client has left before it, and the request has been aborted."""
    working = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(receive())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()  # which makes the engine drop the request
        leaving.cancel()
