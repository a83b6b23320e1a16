"""A trainer beside an engine on one GPU: it comes second, and keeps to its part of the memory.

While an engine starts it compares the free memory of its GPU at two moments, and takes the difference for its own: memory that
another process takes meanwhile shrinks its cache, memory that one gives back ends it. So the trainer touches no GPU before every
engine answers. After that its allocator has a bound, so that what runs out of memory is the trainer, with a message that says so,
and not the engine.
"""

import os
import time
import urllib.request
from collections.abc import Callable, Sequence

from turnwise.config import RLConfig

WAIT_FOR = "TURNWISE_WAIT_FOR"  # health routes of the engines that must answer first, separated by spaces
POLL_S = 0.5
ANSWER_S = 2.0
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # engines of a run are never behind a proxy


def wait_for_engines(*, timeout_s: float, stop: Callable[[], bool]) -> None:
    """Return once all engines named in the environment have answered, at once where none is, or when `stop()` holds.

    Raises:
        TimeoutError: one has not answered within `timeout_s` seconds.
    """
    deadline = time.monotonic() + timeout_s
    waiting = os.environ.get(WAIT_FOR, "").split()
    while waiting := [url for url in waiting if not _answers(url)]:
        if stop():
            return
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"{', '.join(waiting)} did not answer within {timeout_s:.0f} s, and the trainer, which shares a GPU with it, "
                "must start after it; see the engine's log, or raise inference.startup_timeout_s"
            )
        time.sleep(POLL_S)


def memory_fraction(config: RLConfig, gpu: int, total: int) -> float | None:
    """Fraction of a GPU with `total` bytes that the trainer's allocator may take; None where it has the GPU for itself.

    Raises:
        ValueError: the engine's part leaves nothing.
    """
    allowed = config.trainer_memory(gpu, total)
    if allowed is None:
        return None
    if allowed <= 0:
        raise ValueError(
            f"gpus.share: the engine takes {config.engine_memory} of GPU {gpu} ({total / 2**30:.1f} GiB), "
            "which leaves the trainer nothing; lower gpus.inference_memory"
        )
    return allowed / total


def limit_memory(config: RLConfig, gpus: Sequence[int]) -> None:
    """Bound the allocator of this process on its device; `gpus` is `gpus.trainer`, of which this process has one.

    Raises:
        ValueError: as `memory_fraction`.
    """
    if not gpus:
        return
    import torch

    device = torch.cuda.current_device()
    fraction = memory_fraction(config, gpus[device], torch.cuda.get_device_properties(device).total_memory)
    if fraction is not None:
        torch.cuda.set_per_process_memory_fraction(fraction, device)


def _answers(url: str) -> bool:
    try:
        with _DIRECT.open(url, timeout=ANSWER_S) as answer:
            return answer.status == 200
    except OSError:  # refused, too slow, or an error status
        return False
