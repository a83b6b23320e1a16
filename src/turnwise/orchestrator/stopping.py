"""The end of a run that comes before its last step."""

import asyncio
from collections.abc import Callable

from turnwise.transport import Control, StopRequest

POLL_S = 0.25


class StopRun(Exception):
    """The run is to end."""

    def __init__(self, request: StopRequest) -> None:
        super().__init__(request.reason)
        self.request = request


async def watch_stop(control: Control, *, ending: Callable[[], bool]) -> None:
    """Raise StopRun once somebody asks for the end. While the run is `ending` by itself, requests are its own."""
    while True:  # the request is a file, which nothing announces
        request = control.stop_request()
        if request is not None and not ending():
            raise StopRun(request)
        await asyncio.sleep(POLL_S)
