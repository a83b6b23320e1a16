"""What the plan says about task containers: places, images, GPUs, memory, and whether the engine answers."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

from turnwise.config import EnvConfig, RLConfig
from turnwise.envs import TextEnv, make
from turnwise.launch.memory import GIB

if TYPE_CHECKING:
    from turnwise.containers.engine import Engine

MIB = 2**20
COSTS = {"busybox": "about a second", "python": "10 to 20 s", "python-science": "some minutes"}


@dataclass(frozen=True)
class Hint:
    """Something about a run that is worth a word before it starts."""

    text: str
    fatal: bool = False  # the run cannot begin so
    remark: bool = False  # nothing is wrong with it


def environment_hints(config: RLConfig) -> list[Hint]:
    """What the environments of a configuration say about themselves, and what their containers need. Asks each engine once.

    An environment that cannot be made has no hints here: it is told of where its tasks are counted.
    """
    tables = [*config.orchestrator.env, *config.orchestrator.eval_env]
    made = [(table, env) for table in tables if (env := _made(table)) is not None]
    told = [text for table, env in made for text in env.plan_hints(config, table)]
    users = [env for _, env in made if env.uses_containers]
    return [*(Hint(text) for text in dict.fromkeys(told)), *(_container_hints(config, users) if users else ())]


def _made(table: EnvConfig) -> TextEnv | None:
    try:
        return make(table.id, table.args)
    except Exception:  # a user's environment may raise anything, and says so elsewhere
        return None


def _container_hints(config: RLConfig, envs: Sequence[TextEnv]) -> list[Hint]:
    images = sorted({env.container_image for env in envs if env.container_image})
    most = max(env.container_gpus for env in envs)
    remarks = [_memory(config), _idle_gpus(config, most)]
    hints = [Hint(text, remark=True) for text in remarks if text is not None]
    hints += [Hint(text) for text in [_places(config)] if text is not None]
    gpus = _too_few_gpus(config, most)
    return [*hints, *([Hint(gpus, fatal=True)] if gpus else []), *_backend(config, images)]


def places(config: RLConfig) -> int:
    """Most containers of agents at once."""
    hosts = config.containers.hosts if config.containers.backend == "docker" else []
    return sum(host.max_containers for host in hosts) or config.containers.max_containers


def _places(config: RLConfig) -> str | None:
    wanted, has = config.orchestrator.inflight_limit, places(config)
    if wanted <= has:
        return None
    return (
        f"containers: {wanted} rollouts are in flight and there are places for {has} containers: the others wait for one, "
        f"at most containers.wait_s = {config.containers.wait_s:g} s; raise containers.max_containers, or set "
        f"orchestrator.max_inflight = {has}"
    )


def _memory(config: RLConfig) -> str | None:
    """Where all containers are on this machine: whether it could hold them, were each as large as it may be."""
    settings = config.containers
    if any(not host.url.startswith("unix://") for host in settings.hosts):
        return None
    count = min(config.orchestrator.inflight_limit, places(config)) + settings.evaluations
    wanted, has = count * settings.limits.memory_mib * MIB, psutil.virtual_memory().total
    if wanted <= has:
        return None
    return (
        f"containers: {count} of them may use containers.limits.memory_mib = {settings.limits.memory_mib} each, "
        f"{wanted / GIB:.0f} GiB together, and this machine has {has / GIB:.0f}; few tasks use all of it, but nothing keeps them "
        "from it: lower memory_mib or max_containers where programs are killed"
    )


def _idle_gpus(config: RLConfig, most: int) -> str | None:
    if most or not config.gpus.containers:
        return None
    return (
        f"gpus.containers = {config.gpus.containers}: no environment leases one; they stay idle until args.gpus = 1 asks for one "
        "for each rollout"
    )


def _too_few_gpus(config: RLConfig, most: int) -> str | None:
    has = len(config.gpus.containers)
    if most <= has:
        return None
    return f"each container is to have {most} GPUs (args.gpus), and gpus.containers names {has}; name more, or lower args.gpus"


def _backend(config: RLConfig, images: Sequence[str]) -> list[Hint]:
    """Whether containers can be started, and what has to be made before the first."""
    from turnwise.containers.engine import Engine  # late: most runs need no engine's client
    from turnwise.containers.errors import ContainerError

    if config.containers.backend == "bubblewrap":
        there = shutil.which("bwrap") is not None
        return [] if there else [Hint("containers: there is no program `bwrap`; apt install bubblewrap", fatal=True)]
    found: list[Hint] = []
    for host in config.containers.hosts or [None]:
        engine = Engine(host)
        try:
            found += [hint for image in images if (hint := _image(engine, image)) is not None]
        except ContainerError as error:
            told = f"containers: {error}; start it, name another by DOCKER_HOST or containers.hosts, or set "
            found.append(Hint(f'{told}containers.backend = "bubblewrap", which isolates less', fatal=True))
        finally:
            engine.close()
    return found


def _image(engine: "Engine", image: str) -> Hint | None:
    """A word where an image is not there yet. Raises ContainerError."""
    from turnwise.containers.recipes import archive_path, recipes

    recipe = recipes().get(image)
    if recipe is None:
        if engine.image_labels(image) is not None:
            return None
        known = ", ".join(recipes())
        return Hint(
            f"containers: {engine.name} has no image {image!r}, and nothing is ever pulled; run `docker pull {image}` there, or "
            f"use one that is made here ({known})",
            fatal=True,
        )
    if engine.image_labels(f"turnwise/{image}:{recipe.hash}") is not None:
        return None
    if archive_path(image).exists():
        return Hint(f"containers: the image {image} is imported into {engine.name} first, which takes some seconds", remark=True)
    cost = COSTS.get(image, "a while")
    return Hint(
        f"containers: the image {image} is made first, once, of packages of the distribution, which takes {cost}", remark=True
    )
