"""Calls of an environment under a time limit: one that hangs must not hang whoever judges it."""

import threading
from collections.abc import Callable
from queue import Queue
from typing import TypeVar

from turnwise.envs.checks import raised_words

Answer = TypeVar("Answer")


class CallFailed(Exception):
    """The call raised or hung; the text says where and what."""


def limited(what: str, call: Callable[[], Answer], *, timeout_s: float) -> Answer:
    """The answer of a call, made on a thread of its own as in a run.

    Raises:
        CallFailed: it raised, or did not answer within `timeout_s` seconds; its thread is left to the exit of the process then.
    """
    outcome: Queue[tuple[list[Answer], BaseException | None]] = Queue()

    def work() -> None:
        try:
            outcome.put(([call()], None))
        except BaseException as error:  # SystemExit inside an environment is its failure, not our end
            outcome.put(([], error))

    thread = threading.Thread(target=work, name="check-env", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise CallFailed(f"{what} does not answer within orchestrator.env.timeout_s = {timeout_s:g} s")
    answers, error = outcome.get()
    if error is not None:
        raise CallFailed(f"{what} raises {raised_words(error)}") from error
    return answers[0]
