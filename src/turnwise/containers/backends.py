"""From the configuration to a pool."""

from collections.abc import Iterable

from turnwise.config.containers import ContainersConfig
from turnwise.containers.breaker import Breaker, Listener
from turnwise.containers.bubblewrap import BubblewrapHost
from turnwise.containers.docker_host import DockerHost
from turnwise.containers.engine import Engine
from turnwise.containers.pool import Pool
from turnwise.containers.spec import Host


def make_pool(config: ContainersConfig, *, run: str, gpus: Iterable[str] = (), listener: Listener | None = None) -> Pool:
    """A pool on the hosts of `[containers]`; enter it to use it. Nothing is called before.

    Args:
        config: the table.
        run: a name of the run, which its containers carry as a label for people to read.
        gpus: the GPUs of `[gpus] containers`, as the engine names them: index or UUID.
        listener: is told when an engine counts as down (name, reason) and when it works again (name, None), by whatever thread
            noticed.
    """

    def breaker(name: str) -> Breaker:
        return Breaker(name, threshold=config.failures, pause_s=config.pause_s, listener=listener)

    hosts: list[Host] = []
    if config.backend == "bubblewrap":
        hosts.append(BubblewrapHost(config, breaker(BubblewrapHost.name)))
    else:
        for entry in config.hosts or [None]:
            engine = Engine(entry)
            capacity = entry.max_containers if entry else config.max_containers
            hosts.append(DockerHost(engine, config, breaker(engine.name), capacity=capacity, run=run))
    return Pool(hosts, config, gpus)
