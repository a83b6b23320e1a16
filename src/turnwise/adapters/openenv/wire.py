"""OpenEnv's protocol as a client speaks it: one WebSocket a session, one JSON answer a message; routes of HTTP beside it.

Written against openenv 0.10. Their own client is not used: it connects anew when a connection is lost, which in the middle of an
episode means that the next action is played in a fresh environment.
"""

import asyncio
import atexit
import json
import threading
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, TypeVar, cast

import aiohttp

MAX_MESSAGE_BYTES = 32 << 20  # of one answer; a larger one ends the session
CLOSING = aiohttp.ClientWSTimeout(ws_close=2.0)  # pyright: ignore[reportCallIssue]  # s for a goodbye; made by attrs, not typed
FIRST_RETRY_S = 0.05  # after a server that is full; doubled up to a second

Result = TypeVar("Result")


class OpenEnvError(Exception):
    """An OpenEnv server is not there, broke off, did not answer in time, or answered what the protocol does not know."""


class Lost(OpenEnvError):
    """There is no connection, or no longer."""


class Refused(OpenEnvError):
    """The server answered with an error of its own.

    Args:
        code: the protocol's, such as `VALIDATION_ERROR`.
        errors: what pydantic found wrong, for that code: `loc` and `msg` of each.
    """

    def __init__(self, text: str, code: str, errors: Sequence[Any] = ()) -> None:
        super().__init__(text)
        self.code, self.errors = code, errors


class Session:
    """One session on a server, for one thread at a time. A session that failed is closed, and never connects again.

    Args:
        url: of the server, `http://` or `https://`.
        timeout_s: what the server may take for one answer.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url, self.timeout_s = url, timeout_s
        self.open = False
        self._socket: aiohttp.ClientWebSocketResponse | None = None

    def reset(self, data: Mapping[str, Any]) -> Mapping[str, Any]:
        """Begin an episode, waiting for a place where the server is full; `observation`, `reward`, `done`, `metadata`.

        Raises:
            OpenEnvError: no server, no place within `timeout_s`, or any of the failures of `step`.
        """
        return _clients().run(self._reset(data))

    def step(self, action: Mapping[str, Any]) -> Mapping[str, Any]:
        """Play an action; the same four keys.

        Raises:
            Refused: the server says what is wrong; after `VALIDATION_ERROR` the session is as good as before.
            OpenEnvError: anything else.
        """
        return _clients().run(self._ask("step", action))

    def close(self) -> None:
        """Give the session back; nothing happens to a closed one."""
        _clients().run(self._close())

    async def _reset(self, data: Mapping[str, Any]) -> Mapping[str, Any]:
        pause = FIRST_RETRY_S
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.timeout_s
        while True:
            if not self.open:
                await self._connect()
            try:
                return await self._ask("reset", data)
            except Refused as error:
                if error.code != "CAPACITY_REACHED":
                    raise
                if loop.time() + pause > deadline:
                    raise OpenEnvError(
                        f"{error}; no place became free within {self.timeout_s:g} s. Allow more sessions on the server "
                        "(max_concurrent_envs) or fewer rollouts at a time (orchestrator.max_inflight)."
                    ) from error
            await asyncio.sleep(pause)
            pause = min(1.0, 2 * pause)

    async def _connect(self) -> None:
        address = f"{self.url}/ws"
        try:
            async with asyncio.timeout(self.timeout_s):
                http = _clients().http()
                self._socket = await http.ws_connect(address, max_msg_size=MAX_MESSAGE_BYTES, timeout=CLOSING)
        except (aiohttp.ClientError, OSError) as error:
            raise Lost(f"no OpenEnv server can be reached at {address}: {error or type(error).__name__}") from error
        self.open = True

    async def _ask(self, kind: str, data: Mapping[str, Any]) -> Mapping[str, Any]:
        socket = self._socket
        if not self.open or socket is None:
            raise OpenEnvError(f"{kind}: the session with {self.url} is closed; begin an episode with reset")
        try:
            async with asyncio.timeout(self.timeout_s):
                with suppress(aiohttp.ClientConnectionError, ConnectionError):  # a reason may lie in the queue
                    await socket.send_str(json.dumps({"type": kind, "data": data}))
                message = await socket.receive()
            return _read(message, kind, self.url, socket.close_code)
        except TimeoutError as error:
            await self._close()
            raise OpenEnvError(
                f"{kind}: {self.url} did not answer within args.timeout_s = {self.timeout_s:g}; the session is closed"
            ) from error
        except OpenEnvError as error:
            if not (isinstance(error, Refused) and error.code in ("VALIDATION_ERROR", "EXECUTION_ERROR")):
                await self._close()
            raise

    async def _close(self) -> None:
        socket, self._socket, self.open = self._socket, None, False
        if socket is not None and not socket.closed:
            with suppress(aiohttp.ClientConnectionError, ConnectionError):  # gone already, which is what is wanted
                await socket.send_str('{"type": "close"}')
            await socket.close()


def get_json(url: str, *, timeout_s: float, body: Mapping[str, Any] | None = None) -> Any:
    """GET `url`, or POST where there is a body.

    Raises:
        Refused: a status of 400 and above; `code` is the status.
        OpenEnvError: nobody there, no answer in time, or no JSON.
    """
    return _clients().run(_get_json(url, timeout_s, body))


async def _get_json(url: str, timeout_s: float, body: Mapping[str, Any] | None) -> Any:
    try:
        async with asyncio.timeout(timeout_s):
            method = "GET" if body is None else "POST"
            async with _clients().http().request(method, url, json=body) as answer:
                text = await answer.text()
                if answer.status >= 400:
                    raise Refused(f"{url} answered {answer.status}: {text[:200]}", str(answer.status))
        return json.loads(text)
    except TimeoutError as error:
        raise OpenEnvError(f"{url} did not answer within {timeout_s:g} s") from error
    except (aiohttp.ClientError, OSError) as error:
        raise OpenEnvError(f"no OpenEnv server can be reached at {url}: {error or type(error).__name__}") from error
    except ValueError as error:
        raise OpenEnvError(f"{url} is no route of an OpenEnv server: its answer is no JSON ({error})") from error


def _read(message: aiohttp.WSMessage, kind: str, url: str, close_code: int | None) -> Mapping[str, Any]:
    """The data of an observation. Raises OpenEnvError."""
    if message.type is aiohttp.WSMsgType.ERROR:
        raise OpenEnvError(f"{kind}: the connection to {url} failed: {message.data}")
    if message.type is not aiohttp.WSMsgType.TEXT:
        raise Lost(f"{kind}: the server at {url} broke the connection off (code {close_code}); it may have ended")
    try:
        answer = json.loads(message.data)
    except ValueError as error:
        raise OpenEnvError(f"{kind}: {url} answered no JSON: {message.data[:80]!r}") from error
    data = cast(dict[str, Any], answer).get("data") if isinstance(answer, dict) else None
    if not isinstance(data, dict) or answer["type"] not in ("observation", "error"):
        raise OpenEnvError(f"{kind}: {url} answered {message.data[:80]!r}, which is no observation of OpenEnv")
    if answer["type"] == "error":
        code, errors = str(data.get("code")), data.get("errors")
        text = f"{kind}: {url} refused with {code}: {data.get('message')}"
        raise Refused(text, code, cast(list[Any], errors) if isinstance(errors, list) else ())
    return cast(dict[str, Any], data)


class _Clients:
    """The event loop of all sessions of this process, on a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._http: aiohttp.ClientSession | None = None
        threading.Thread(target=self._loop.run_forever, name="openenv-client", daemon=True).start()
        atexit.register(self.close)

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        """Close all connections, at the end of the process."""
        if self._http is not None:
            self.run(self._http.close())
        self._loop.call_soon_threadsafe(self._loop.stop)

    def http(self) -> aiohttp.ClientSession:
        if self._http is None:
            unlimited = aiohttp.TCPConnector(limit=0)  # every session holds one connection, and their number is the run's
            self._http = aiohttp.ClientSession(connector=unlimited)
        return self._http


@cache
def _made() -> _Clients:
    return _Clients()


def _clients() -> _Clients:
    with _LOCK:  # first called by many threads at once
        return _made()


_LOCK = threading.Lock()
