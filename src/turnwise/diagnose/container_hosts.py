"""Whether there is something that task containers can run on. Asked before a lease, which would wait for it."""

import shutil

from turnwise.config import RLConfig
from turnwise.diagnose.core import CheckFailed
from turnwise.envs.containers import used_by


def wants_containers(config: RLConfig) -> bool:
    """Whether an environment of the configuration works in containers; False where one cannot be loaded, which others tell."""
    settings = config.orchestrator
    try:
        return bool(used_by([*settings.env, *settings.eval_env]))
    except ValueError:
        return False


def check_hosts(config: RLConfig) -> None:
    """Raises CheckFailed when bubblewrap is not there, or a container engine does not answer."""
    from turnwise.containers.engine import Engine  # late: most runs need no engine's client
    from turnwise.containers.errors import ContainerError

    if config.containers.backend == "bubblewrap":
        if shutil.which("bwrap") is None:
            raise CheckFailed(
                'containers.backend = "bubblewrap", and bwrap is not on the path',
                'install bubblewrap, or set containers.backend = "docker"',
            )
        return
    for host in config.containers.hosts or [None]:
        engine = Engine(host)
        try:
            with engine.call() as api:
                api.ping()
        except ContainerError as error:
            remedy = "start the container engine, name another (containers.hosts, DOCKER_HOST), or ask for the right to use it"
            raise CheckFailed(f"environments need containers: {error}", remedy) from error
        finally:
            engine.close()
