"""Task containers for the environments of a configuration, where one of them works in some."""

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from turnwise.config import EnvConfig, RLConfig
from turnwise.envs.registry import load

if TYPE_CHECKING:
    from turnwise.containers import Pools

GPUS_VARIABLE = "TURNWISE_CONTAINER_GPUS"
"""The GPUs of `[gpus] containers` as a container engine names them; processes that see no GPU themselves are told by it."""


def used_by(envs: Sequence[EnvConfig]) -> list[str]:
    """Ids of the environments that work in containers. Raises ValueError for one that cannot be loaded."""
    return [env.id for env in envs if load(env.id).uses_containers]


@contextmanager
def containers_of(config: RLConfig, say: Callable[[str], None] = print) -> Generator["Pools | None"]:
    """Open pools for as long as the block runs; None where no environment needs any.

    Args:
        config: training and evaluation environments, and `[containers]`.
        say: is told when an engine counts as down, and when it works again. Called from other threads.
    """
    settings = config.orchestrator
    if not used_by([*settings.env, *settings.eval_env]):
        yield None
        return
    from turnwise.containers import open_pools  # late: most runs need no engine's client

    def tell(name: str, reason: str | None) -> None:
        if reason is None:
            say(f"containers: {name} works again; rollouts go on")
        else:
            say(f"containers: {name} is down ({reason}); rollouts wait for it, and none of them is scored")

    gpus = os.environ.get(GPUS_VARIABLE)
    named = gpus.split(",") if gpus else [str(gpu) for gpu in config.gpus.containers]
    with open_pools(config.containers, run=config.run_name or config.output_dir.name, gpus=named, listener=tell) as pools:
        yield pools
