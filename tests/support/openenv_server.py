"""A server that speaks OpenEnv's protocol and says what a test scripts, on an event loop in a thread of its own."""

import asyncio
import json
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from aiohttp import WSMsgType, web

TEXT_ACTION = {
    "type": "object",
    "properties": {"message": {"type": "string"}, "metadata": {"type": "object"}},
    "required": ["message"],
    "additionalProperties": False,
}
TEXT_OBSERVATION = {
    "type": "object",
    "properties": {"said": {"type": "string"}, "done": {"type": "boolean"}, "reward": {}, "metadata": {"type": "object"}},
}
Play = Callable[[str, dict[str, Any]], object]  # (kind, data) -> message to send, text to send as it is, or one of below
HANG, BREAK_OFF = object(), object()


def observed(said: str, reward: object = 0.0, *, done: bool = False, **metadata: Any) -> dict[str, Any]:
    data = {"observation": {"said": said, "metadata": metadata}, "reward": reward, "done": done}
    return {"type": "observation", "data": {**data, **({"metadata": metadata} if metadata else {})}}


def refused(message: str, code: str, **more: Any) -> dict[str, Any]:
    return {"type": "error", "data": {"message": message, "code": code, **more}}


class FakeOpenEnv:
    """What the server plays and what it was sent."""

    def __init__(
        self, play: Play, *, action: dict[str, Any], observation: dict[str, Any], capacity: int, tasks: dict[str, int]
    ) -> None:
        self.play, self.capacity, self.tasks = play, capacity, tasks
        self.schema = {"action": action, "observation": observation, "state": {}}
        self.url = ""
        self.tools: list[dict[str, Any]] = []
        self.sent: list[tuple[str, Any]] = []
        self.sessions = 0

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes([web.get("/ws", self._session), web.get("/schema", self._schema)])
        app.add_routes(
            [web.get("/list_environments", self._names), web.post("/fake/num_tasks", self._count), web.post("/mcp", self._tools)]
        )
        return app

    async def _schema(self, _request: web.Request) -> web.Response:
        return web.json_response(self.schema)

    async def _names(self, _request: web.Request) -> web.Response:
        return web.json_response(["fake"])

    async def _count(self, request: web.Request) -> web.Response:
        if not self.tasks:
            return web.json_response({"detail": "not supported"}, status=501)
        return web.json_response({"num_tasks": self.tasks[(await request.json())["split"]]})

    async def _tools(self, _request: web.Request) -> web.Response:
        if not self.tools:
            return web.json_response({"id": 1, "error": {"code": -32603, "message": "Environment does not support MCP"}})
        return web.json_response({"id": 1, "result": {"tools": self.tools}})

    async def _session(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        if self.sessions >= self.capacity:
            await socket.send_json(refused("no place", "CAPACITY_REACHED"))
            await socket.close()
            return socket
        self.sessions += 1
        try:
            await self._converse(socket)
        finally:
            self.sessions -= 1
        return socket

    async def _converse(self, socket: web.WebSocketResponse) -> None:
        async for message in socket:
            assert message.type is WSMsgType.TEXT
            asked = json.loads(message.data)
            self.sent.append((asked["type"], asked.get("data")))
            if asked["type"] == "close":
                return
            answer = self.play(asked["type"], asked["data"])
            if answer is BREAK_OFF:
                await self._abort(socket)
            elif answer is not HANG:
                await socket.send_str(answer if isinstance(answer, str) else json.dumps(answer))

    async def _abort(self, socket: web.WebSocketResponse) -> None:
        """End the connection as the end of the process would."""
        request = socket._req
        assert request is not None
        assert request.transport is not None
        request.transport.abort()


@contextmanager
def fake_openenv(
    play: Play,
    *,
    action: dict[str, Any] | None = None,
    observation: dict[str, Any] | None = None,
    capacity: int = 100,
    tasks: dict[str, int] | None = None,
) -> Generator[FakeOpenEnv]:
    """A server on a free loopback port for as long as the block runs."""
    fake = FakeOpenEnv(
        play, action=action or TEXT_ACTION, observation=observation or TEXT_OBSERVATION, capacity=capacity, tasks=tasks or {}
    )
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> web.AppRunner:
        runner = web.AppRunner(fake.app(), shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    runner = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    try:
        yield fake
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
