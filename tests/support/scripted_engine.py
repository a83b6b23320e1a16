"""An engine without a model: the real HTTP routes, replies from a script or from a seeded random stream."""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
from aiohttp import web

Script = Callable[[dict[str, Any]], Sequence[int]] | Sequence[Sequence[int]]
PromptLogprobs = Callable[[dict[str, Any]], Sequence[float]]  # of a request's prompt, all tokens but the first


@dataclass
class Fault:
    """A planted failure: an HTTP status with words, or "drop" (connection cut) or "hang" (no answer)."""

    kind: int | str
    message: str = "planted"
    path: str = "/v1/completions"


@dataclass
class ScriptedEngine:
    """Serves on a free port of 127.0.0.1 inside the running event loop.

    `script` is a function of the request body that gives the ids of the reply, or a list of replies used in turn (the last
    one again and again), or None for random ids below `vocab` from the request's seed, ended by a stop id or by max_tokens.
    """

    script: Script | None = None
    vocab: int = 256
    logprob: float = -1.0
    prompt_logprobs: PromptLogprobs | None = None  # instead of `logprob`
    latency_s: float = 0.0
    arrival_s: float = 0.0  # a completion request is on its way for so long
    answer_s: float = 0.0  # and so is its answer
    model: str = "base"
    require_adapters: bool = True  # False: any model name is served
    digest: str | None = None  # answer of weights_digest instead of the true one
    requests: list[dict[str, Any]] = field(default_factory=list)  # bodies of /v1/completions
    admin: list[str] = field(default_factory=list)  # administrative requests, in order
    adapters: dict[str, str] = field(default_factory=dict)  # name -> folder
    faults: list[Fault] = field(default_factory=list)  # used up one by one
    load: dict[str, float] = field(
        default_factory=dict
    )  # values on /metrics by vLLM's name; running and waiting are the true ones
    metrics: bool = True  # False: no such page
    reloads: int = 0  # times that full weights were replaced
    running: int = 0
    peak: int = 0

    async def __aenter__(self) -> Self:
        self._resumed = asyncio.Event()
        self._resumed.set()
        self._abort = asyncio.Event()
        self.busy = asyncio.Event()  # set once a completion has been asked for
        self._replies = 0
        app = web.Application(client_max_size=2**26, middlewares=[self._plant])
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/metrics", self._metrics),
                web.get("/v1/models", self._models),
                web.post("/v1/completions", self._completions),
                web.post("/v1/load_lora_adapter", self._load),
                web.post("/v1/unload_lora_adapter", self._unload),
                web.post("/pause", self._pause),
                web.post("/resume", self._resume),
                web.post("/reset_prefix_cache", self._reset),
                web.post("/collective_rpc", self._rpc),
            ]
        )
        self._runner = web.AppRunner(
            app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True
        )  # as vLLM ends requests
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, backlog=4096)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Stop serving: later requests are refused by the system, as from a dead engine."""
        await self._runner.cleanup()

    @web.middleware
    async def _plant(self, request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
        fault = next((f for f in self.faults if f.path == request.path), None)
        if fault is None:
            return await handler(request)
        self.faults.remove(fault)
        if fault.kind == "hang":
            await asyncio.sleep(3600)
        if fault.kind == "drop":
            if request.transport is not None:
                request.transport.close()
            return web.Response(status=500)
        return _error(int(fault.kind), fault.message)

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _metrics(self, request: web.Request) -> web.Response:
        """As much as vLLM's page has for an engine, under labels like its."""
        if not self.metrics:
            return _error(404, "no metrics")
        values = {"vllm:num_requests_running": self.running, "vllm:num_requests_waiting": 0.0, **self.load}
        lines = [
            f'# TYPE {name} gauge\n{name}{{engine="0",model_name="{self.model}"}} {float(v)}\n' for name, v in values.items()
        ]
        return web.Response(text="# HELP python_gc_objects_collected_total Objects\n" + "".join(lines))

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": name} for name in (self.model, *self.adapters)]})

    async def _completions(self, request: web.Request) -> web.Response:
        body = msgspec.json.decode(await request.read())
        self.requests.append(body)
        if self.require_adapters and body["model"] != self.model and body["model"] not in self.adapters:
            return _error(404, f"The model `{body['model']}` does not exist.")
        self.running += 1
        self.busy.set()
        self.peak = max(self.peak, self.running)
        try:
            await asyncio.sleep(self.arrival_s)
            ids: list[int] = []
            reason = "abort"
            if await self._admitted():
                ids = self._reply(body)[: body.get("max_tokens", 16)]
                reason = await self._finish(body, ids)
            await asyncio.sleep(self.answer_s)
        finally:
            self.running -= 1
        ids = ids[: len(ids) // 2] if reason == "abort" else ids
        return web.Response(body=msgspec.json.encode(self._answer(body, ids, reason)), content_type="application/json")

    async def _admitted(self) -> bool:
        """Wait while the engine is paused; False when a further pause aborts what waits."""
        if self._resumed.is_set():
            return True
        waits = [asyncio.ensure_future(event.wait()) for event in (self._resumed, self._abort)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        return self._resumed.is_set()

    async def _finish(self, body: dict[str, Any], ids: Sequence[int]) -> str:
        """Wait as long as generation would take; the reply is cut in half when a pause comes in between."""
        if self.latency_s > 0:
            try:
                await asyncio.wait_for(self._abort.wait(), self.latency_s)
            except TimeoutError:
                pass
            else:
                return "abort"
        return "stop" if ids and ids[-1] in body.get("stop_token_ids", []) else "length"

    def _reply(self, body: dict[str, Any]) -> list[int]:
        if self.script is None:
            return self._random(body)
        if callable(self.script):
            return list(self.script(body))
        reply = self.script[min(self._replies, len(self.script) - 1)]
        self._replies += 1
        return list(reply)

    def _random(self, body: dict[str, Any]) -> list[int]:
        stops = body.get("stop_token_ids", [])
        stream = random.Random(f"{body.get('seed')}|{body['model']}|{body['prompt']}")
        ids: list[int] = []
        while len(ids) < body.get("max_tokens", 16):
            stop = bool(stops) and stream.random() < 0.1
            ids.append(stops[0] if stop else stream.randrange(self.vocab))
            if stop:
                break
        return ids

    def _answer(self, body: dict[str, Any], ids: Sequence[int], reason: str) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": 0,
            "text": "",
            "finish_reason": reason,
            "stop_reason": None,
            "token_ids": list(ids),
            "prompt_token_ids": body["prompt"],
            "logprobs": {"token_logprobs": [self.logprob] * len(ids), "tokens": [f"token_id:{i}" for i in ids]},
        }
        if body.get("prompt_logprobs") is not None:
            values = self.prompt_logprobs(body) if self.prompt_logprobs else [self.logprob] * (len(body["prompt"]) - 1)
            told = zip(body["prompt"][1:], values, strict=True)
            choice["prompt_logprobs"] = [None, *({str(i): {"logprob": value, "rank": 1}} for i, value in told)]
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(ids)}
        return {"id": "cmpl-0", "object": "text_completion", "model": body["model"], "choices": [choice], "usage": usage}

    async def _load(self, request: web.Request) -> web.Response:
        body = msgspec.json.decode(await request.read())
        self.admin.append(f"load {body['lora_name']}")
        if body["lora_name"] in self.adapters:
            return _error(400, f"The lora adapter '{body['lora_name']}' has already been loaded.")
        self.adapters[body["lora_name"]] = body["lora_path"]
        return web.Response(text="Success")

    async def _unload(self, request: web.Request) -> web.Response:
        name = msgspec.json.decode(await request.read())["lora_name"]
        self.admin.append(f"unload {name}")
        if self.adapters.pop(name, None) is None:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        return web.Response(text="Success")

    async def _pause(self, request: web.Request) -> web.Response:
        self.admin.append(f"pause {request.query.get('mode', 'abort')}")
        self._resumed.clear()
        if request.query.get("mode", "abort") == "abort":
            self._abort.set()
            await asyncio.sleep(0)
            self._abort.clear()
        return web.json_response({"status": "paused"})

    async def _resume(self, request: web.Request) -> web.Response:
        self.admin.append("resume")
        self._resumed.set()
        return web.json_response({"status": "resumed"})

    async def _reset(self, request: web.Request) -> web.Response:
        self.admin.append("reset_prefix_cache")
        return web.Response()

    async def _rpc(self, request: web.Request) -> web.Response:
        body = msgspec.json.decode(await request.read())
        self.admin.append(body["method"])
        self.reloads += body["method"] in ("reload_weights", "receive_weights")
        if body["method"] != "weights_digest":
            return web.json_response({"results": [None]})
        return web.json_response({"results": [self.digest or self._true_digest(body["args"][0])]})

    def _true_digest(self, name: str) -> str:
        from safetensors.torch import load_file

        from turnwise.transport import tensor_digest

        return tensor_digest(load_file(Path(self.adapters[name]) / "adapter_model.safetensors"))


def _error(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "type": "PlantedError", "code": status}}, status=status)
