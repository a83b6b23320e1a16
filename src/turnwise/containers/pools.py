"""The containers of a run: a pool for agents, and one for scoring what they submit."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import NamedTuple

from turnwise.config.containers import ContainersConfig
from turnwise.containers.backends import make_pool
from turnwise.containers.breaker import Listener
from turnwise.containers.pool import Pool


class Pools(NamedTuple):
    """Both pools, open. An agent that holds a place of the first waits for one of the second, never the other way round."""

    tasks: Pool
    evaluation: Pool


@contextmanager
def open_pools(
    config: ContainersConfig, *, run: str, gpus: Iterable[str] = (), listener: Listener | None = None
) -> Generator[Pools]:
    """Both pools for as long as the block runs; arguments as of `make_pool`. GPUs are lent to agents alone."""
    scoring = config.model_copy(update={"max_containers": config.evaluations, "warm": min(config.warm, 1)})
    with make_pool(config, run=run, gpus=gpus, listener=listener) as tasks, make_pool(scoring, run=run) as evaluation:
        yield Pools(tasks, evaluation)
