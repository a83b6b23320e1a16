"""Blocking calls of environments off the event loop, each on a daemon thread: one that hangs holds up neither loop nor exit."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


class Hung(Exception):
    """A call took longer than its limit. Its thread goes on; what it works on must not be used again."""


async def off_loop(function: Callable[[], Result], *, timeout_s: float) -> Result:
    """Run `function()` on a thread of its own.

    Raises:
        Hung: no answer within `timeout_s` seconds.
        Exception: whatever the function raised; `SystemExit` and its like as a RuntimeError.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(value: Result | None, error: Exception | None) -> None:
        if future.done():  # given up on
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(value)  # pyright: ignore[reportArgumentType]  # None only where the function returned it

    def work() -> None:
        value: Result | None = None
        failure: Exception | None = None
        try:
            value = function()
        except StopIteration as error:  # futures refuse it
            failure = RuntimeError(f"StopIteration: {error}")
        except Exception as error:
            failure = error
        except BaseException as error:
            failure = RuntimeError(f"{type(error).__name__}: {error}")
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits
            loop.call_soon_threadsafe(settle, value, failure)

    threading.Thread(target=work, name="turnwise-env", daemon=True).start()
    limit = asyncio.timeout(timeout_s)
    try:
        async with limit:
            return await future
    except TimeoutError as error:
        if limit.expired():
            raise Hung(f"no answer within {timeout_s:g} s") from error
        raise
