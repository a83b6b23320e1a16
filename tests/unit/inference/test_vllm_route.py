"""The short way through vLLM's server: which requests take it, what is answered, and that all else reaches vLLM's own route."""

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turnwise.inference.wire import CompletionRequest, CompletionResponse

Message = dict[str, Any]
REQUEST = {
    "model": "v3",
    "prompt": [5, 6, 7],
    "max_tokens": 4,
    "temperature": 1.0,
    "logprobs": 0,
    "stop_token_ids": [9],
    "return_token_ids": True,
    "add_special_tokens": False,
}


class Params:
    """Keeps what it was made with, as vLLM's SamplingParams."""

    def __init__(self, **given: Any) -> None:
        if given["temperature"] > 2:
            raise ValueError("temperature must be at most 2")
        self.given = given


class Dead(Exception):
    pass


@pytest.fixture(autouse=True)
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As much of the package vllm as the route imports."""
    modules = {name: ModuleType(name) for name in ("vllm", "vllm.sampling_params", "vllm.v1", "vllm.v1.engine")}
    errors = modules["vllm.v1.engine.exceptions"] = ModuleType("vllm.v1.engine.exceptions")
    vars(modules["vllm"])["SamplingParams"] = Params
    vars(modules["vllm.sampling_params"])["RequestOutputKind"] = SimpleNamespace(FINAL_ONLY="final only")
    vars(errors).update(EngineDeadError=Dead, EngineGenerateError=Dead)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield
    sys.modules.pop("turnwise.inference.vllm_route", None)


class Engine:
    """Answers with the ids and logprobs that it was given; remembers what it was asked for."""

    def __init__(self, ids: Sequence[int], logprobs: Sequence[float], reason: str = "stop", stop: int | None = 9) -> None:
        width = 2  # as in a batch with requests for more logprobs: the sampled token's comes first
        flat = SimpleNamespace(
            logprobs=[value for logprob in logprobs for value in (logprob, -50.0)],
            start_indices=list(range(0, width * len(ids), width)),
        )
        output = SimpleNamespace(token_ids=tuple(ids), logprobs=flat, finish_reason=reason, stop_reason=stop)
        self.outputs = [SimpleNamespace(outputs=[output])]
        self.model_config = SimpleNamespace(max_model_len=100)
        self.asked: list[tuple[Any, dict[str, Any], Any]] = []
        self.hold = asyncio.Event()
        self.hold.set()
        self.refusal: Exception | None = None
        self.aborted = 0

    async def generate(self, prompt: Any, parameters: Params, number: str, *, lora_request: Any) -> AsyncGenerator[Any]:
        self.asked.append((prompt, parameters.given, lora_request))
        if self.refusal is not None:
            raise self.refusal
        try:
            await self.hold.wait()
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        for output in self.outputs:
            yield output


class Server:
    """vLLM's application behind the route: remembers what reached it."""

    def __init__(self, engine: Engine, api_key: str | None = None) -> None:
        from turnwise.inference.vllm_route import TokenRoute

        models = SimpleNamespace(lora_requests={"v3": "adapter 3"}, is_base_model=lambda name: name == "base")
        self.state = SimpleNamespace(engine_client=engine, openai_serving_models=models, args=SimpleNamespace(api_key=api_key))
        self.reached: list[bytes] = []
        self.route = TokenRoute(self.inner)

    async def inner(self, scope: Message, receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        body, more = b"", scope["type"] == "http"
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.reached.append(body)

    async def post(self, body: bytes, *, pieces: int = 1, path: str = "/v1/completions", leave: bool = False) -> list[Message]:
        """Send a request in pieces; returns what was sent back. A client that may leave does so after its request."""
        size = -(-len(body) // pieces)
        parts = [body[i * size : (i + 1) * size] for i in range(pieces)]
        inbox = [{"type": "http.request", "body": part, "more_body": i < pieces - 1} for i, part in enumerate(parts)]
        sent: list[Message] = []

        async def receive() -> Message:
            if inbox:
                return inbox.pop(0)
            if not leave:
                await asyncio.Event().wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {"type": "http", "path": path, "method": "POST", "app": SimpleNamespace(state=self.state)}
        async with asyncio.timeout(30):
            await self.route(scope, receive, send)
        return sent


def encoded(**changes: Any) -> bytes:
    return json.dumps({**REQUEST, **changes}).encode()


async def test_what_our_client_sends_is_answered_without_vllms_route():
    request = CompletionRequest(
        model="v3",
        prompt=[5, 6, 7],
        max_tokens=4,
        temperature=0.7,
        seed=11,
        logprobs=0,
        stop_token_ids=[9],
        return_token_ids=True,
        add_special_tokens=False,
    )
    engine = Engine([8, 9], [-0.5, float("-inf")])
    server = Server(engine)
    start, body = await server.post(msgspec.json.encode(request), pieces=3)
    assert (start["status"], dict(start["headers"])[b"content-length"]) == (200, b"%d" % len(body["body"]))
    choice = msgspec.json.decode(body["body"], type=CompletionResponse).choices[0]
    assert choice.token_ids == [8, 9]
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == [-0.5, -9999.0]
    assert choice.finish_reason == "stop"
    assert json.loads(body["body"])["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    ((prompt, given, adapter),) = engine.asked
    assert (prompt, adapter) == ({"type": "token", "prompt_token_ids": [5, 6, 7]}, "adapter 3")
    wanted = {"temperature": 0.7, "max_tokens": 4, "seed": 11, "stop_token_ids": [9], "logprobs": 0, "detokenize": False}
    assert wanted.items() <= given.items()
    assert server.reached == []


async def test_a_logprob_of_logits_that_are_not_finite_is_told_as_null_and_not_as_a_very_small_one():
    _, body = await Server(Engine([8, 9], [-0.5, float("nan")])).post(encoded())
    assert json.loads(body["body"])["choices"][0]["logprobs"] == {"token_logprobs": [-0.5, None]}


async def test_the_base_model_is_asked_without_an_adapter_and_never_for_more_than_the_context_holds():
    engine = Engine([1], [-1.0], reason="length", stop=None)
    await Server(engine).post(encoded(model="base", prompt=[1] * 98, max_tokens=50))
    ((_, given, adapter),) = engine.asked
    assert (adapter, given["max_tokens"], given["seed"]) == (None, 2, None)


async def test_a_reply_cut_by_a_pause_comes_back_in_part():
    _, body = await Server(Engine([1, 2], [-1.0, -2.0], reason="abort", stop=None)).post(encoded())
    assert json.loads(body["body"])["choices"][0]["finish_reason"] == "abort"


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt_logprobs": 0},
        {"logprobs": 2},
        {"logprobs": None},
        {"prompt": "text"},
        {"prompt": []},
        {"prompt": [[1, 2]]},
        {"prompt": [3, -1]},
        {"prompt": [1] * 100},  # leaves no room for a reply
        {"model": "v4"},
        {"return_token_ids": False},
        {"stream": True},
        {"max_tokens": 0},
        {"max_tokens": 101},
        {"temperature": -1.0},
        {"temperature": 3.0},  # what the parameters refuse
    ],
)
async def test_every_other_request_reaches_vllms_own_route_as_it_was(changes: dict[str, Any]):
    engine = Engine([1], [-1.0])
    server = Server(engine)
    assert await server.post(encoded(**changes), pieces=2) == []
    assert server.reached == [encoded(**changes)]
    assert engine.asked == []


@pytest.mark.parametrize("refusal", [ValueError("token id 99999 is out of vocabulary"), Dead()])
async def test_vllm_says_itself_why_its_engine_refuses(refusal: Exception):
    engine = Engine([1], [-1.0])
    engine.refusal = refusal
    server = Server(engine)
    assert await server.post(encoded()) == []
    assert server.reached == [encoded()]


async def test_a_reply_that_ended_in_an_error_is_left_to_vllm():
    server = Server(Engine([], [], reason="error"))
    await server.post(encoded())
    assert server.reached == [encoded()]


async def test_an_error_of_our_own_is_not_hidden():
    engine = Engine([1], [-1.0])
    engine.refusal = KeyError("a bug")
    with pytest.raises(KeyError, match="a bug"):
        await Server(engine).post(encoded())


async def test_a_client_that_leaves_makes_the_engine_drop_its_request():
    engine = Engine([1], [-1.0])
    engine.hold.clear()
    server = Server(engine)
    assert await server.post(encoded(), leave=True) == []
    await asyncio.sleep(0)
    assert (engine.aborted, server.reached) == (1, [])


async def test_a_server_that_asks_for_a_key_asks_for_it(monkeypatch: pytest.MonkeyPatch):
    with_flag = Server(Engine([1], [-1.0]), api_key="secret")
    await with_flag.post(encoded())
    assert with_flag.reached == [encoded()]
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    with_variable = Server(Engine([1], [-1.0]))
    await with_variable.post(encoded())
    assert with_variable.reached == [encoded()]


async def test_other_paths_are_not_touched():
    server = Server(Engine([1], [-1.0]))
    await server.post(encoded(), path="/v1/chat/completions")
    assert server.reached == [encoded()]


@given(st.binary(max_size=200))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_that_are_no_request_reach_vllms_own_route(body: bytes):
    async def send() -> list[bytes]:
        server = Server(Engine([1], [-1.0]))
        await server.post(body)
        return server.reached

    assert asyncio.run(send()) == [body]
