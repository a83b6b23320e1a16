"""A process of the trainer: threads, seed, process group, and its part of a shared GPU."""

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch

from turnwise.config import RLConfig
from turnwise.trainer import fsdp
from turnwise.trainer.sharing import limit_memory, wait_for_engines


@contextmanager
def trainer_process(config: RLConfig, *, stop: Callable[[], bool]) -> Generator[torch.device]:
    """Be one of the trainer's processes; gives its device. Every rank enters it.

    Args:
        config: resolved.
        stop: whether to give up waiting for engines that share a GPU with the trainer.

    Raises:
        TimeoutError: such an engine does not answer.
        ValueError: the trainer's part of a shared GPU, or `trainer.model.replicas`, cannot be used.
    """
    torch.set_num_threads(config.trainer.threads or _fair_threads())
    torch.manual_seed(config.seed)
    wait_for_engines(timeout_s=config.inference.startup_timeout_s, stop=stop)
    cuda, replicas = bool(config.gpus.trainer), config.trainer.model.replicas
    with fsdp.process_group(cuda=cuda, timeout_s=config.trainer.timeout_s, replicas=replicas) as device:
        limit_memory(config, config.gpus.trainer)
        yield device


def _fair_threads() -> int:
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
