"""A server of OpenEnv's protocol for an image, of aiohttp alone: `openenv_counter.py [deaf]` listens on every address at 8000.

Each session counts its steps; the third ends the episode with its reward. A deaf one does not hear SIGTERM.
"""

import json
import signal
import sys
from typing import Any

from aiohttp import WSMsgType, web

SCHEMA = {
    "action": {"type": "object", "properties": {"message": {"type": "string"}}, "required": ["message"]},
    "observation": {"type": "object", "properties": {"said": {"type": "string"}}},
}


def observed(said: str, steps: int) -> dict[str, Any]:
    data = {"observation": {"said": said}, "reward": 1.0 if steps == 3 else 0.0, "done": steps == 3}
    return {"type": "observation", "data": data}


async def session(request: web.Request) -> web.WebSocketResponse:
    socket = web.WebSocketResponse()
    await socket.prepare(request)
    steps, seed = 0, None
    async for message in socket:
        assert message.type is WSMsgType.TEXT
        asked = json.loads(message.data)
        if asked["type"] == "close":
            break
        if asked["type"] == "reset":
            steps, seed = 0, asked["data"]["seed"]
            said = f"seed {seed}"
        else:
            steps += 1
            said = f"seed {seed}, step {steps}: {asked['data']['message']}"
        await socket.send_json(observed(said, steps))
    return socket


async def schema(_request: web.Request) -> web.Response:
    return web.json_response(SCHEMA)


async def health(_request: web.Request) -> web.Response:
    return web.json_response({"status": "healthy"})


if __name__ == "__main__":
    app = web.Application()
    app.add_routes([web.get("/ws", session), web.get("/schema", schema), web.get("/health", health)])
    deaf = sys.argv[1:] == ["deaf"]
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    web.run_app(app, host="0.0.0.0", port=8000, handle_signals=not deaf, print=None)
