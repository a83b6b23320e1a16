"""`openenv:IMAGE` with a real engine: images of a server are run, played, and gone with the run.

The engine has the network that an engine usually has, in a namespace of its own; what plays runs in that namespace.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import docker
import pytest

import turnwise
from support.docker_engine import PrivateEngine
from support.openenv_images import build, packaged, sources
from turnwise.containers.recipes import archive
from turnwise.envs import make

SUPPORT = Path(__file__).parents[1] / "support"
COUNTER, PLAYER = SUPPORT / "openenv_counter.py", SUPPORT / "openenv_player.py"
WORDLE = {"style": "shortlist", "shortlist": 8, "max_turns": 3}
START_S = 120  # s until a server is healthy; their package takes seconds to import


@pytest.fixture(scope="module")
def networked() -> Generator[PrivateEngine]:
    engine = PrivateEngine(Path(f"/tmp/tw-openenv-{time.monotonic_ns()}"), network="bridge")
    engine.start()
    yield engine
    engine.remove()


@pytest.fixture(scope="module")
def images(networked: PrivateEngine) -> Generator[Any]:
    """The engine's API, with the images of the small server."""
    api = docker.APIClient(networked.start(), version="auto", timeout=300)
    with archive("python").open("rb") as file:
        api.import_image(file, repository="python")
    files = {**packaged("aiohttp", "typing_extensions"), "site/openenv_counter.py": COUNTER}
    for name, command in {
        "counter": "exec python3 -m openenv_counter",
        "deaf": "exec python3 -m openenv_counter deaf",
        "broken": "echo no such game >&2; exit 3",
    }.items():
        build(api, f"games/{name}", "python", files, command)
    yield api
    api.close()


class Player:
    """A run that plays an image; see support/openenv_player.py."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def told(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the player ended with {self.process.wait()}"
        return json.loads(line)

    def reply(self, text: str) -> Any:
        assert self.process.stdin is not None
        print(text, file=self.process.stdin, flush=True)
        return self.told()


@contextmanager
def playing(engine: PrivateEngine, image: str, *, sessions: int = 1, **args: Any) -> Generator[Player]:
    """Play `image` for as long as the block runs."""
    given = json.dumps({"start_timeout_s": START_S, "log": str(engine.home / "server.log"), **args})
    words = [*engine.inside(), sys.executable, str(PLAYER), f"openenv:{image}", given, str(sessions)]
    environment = {**os.environ, "DOCKER_HOST": engine.start()}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(words, env=environment, text=True, start_new_session=True, **pipes) as process:
        yield Player(process)


def containers(api: Any) -> list[str]:
    return [one["Image"] for one in api.containers(all=True)]


def test_a_group_is_played_side_by_side_in_one_container_that_ends_with_the_run(networked: PrivateEngine, images: Any):
    with playing(networked, "games/counter", sessions=2) as player:
        assert player.told() == ["seed 0", "seed 1"]
        assert containers(images) == ["games/counter"]
        for number, word in enumerate(("one", "two", "three"), 1):
            for seed, step in enumerate(player.reply(word)):
                assert step[:4] == [f"seed {seed}, step {number}: {word}", float(number == 3), number == 3, False]
    assert player.process.returncode == 0
    assert containers(images) == []


def test_a_container_that_is_killed_in_the_middle_of_an_episode_is_an_error(networked: PrivateEngine, images: Any):
    with playing(networked, "games/counter") as player:
        assert player.told() == ["seed 0"]
        images.kill(images.containers()[0]["Id"])
        (answer,) = player.reply("one")
        assert "broke the connection off" in answer["error"]
        assert "ended with exit code 137" in answer["error"]
    assert containers(images) == []


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("games/broken", ["ended with exit code 3", "ends with:\nno such game"]),
        ("games/nowhere:1", ["ended with exit code 125", "Unable to find image 'games/nowhere:1' locally"]),
    ],
)
def test_an_image_that_does_not_serve_is_an_error_with_what_it_or_the_engine_said(
    networked: PrivateEngine, images: Any, image: str, said: list[str]
):
    with playing(networked, image, log=str(networked.home / f"{said[0][-3:]}.log")) as player:
        error = player.told()["error"]
    assert [text for text in said if text not in error] == []
    assert containers(images) == []


def test_the_container_of_a_killed_run_is_removed_even_when_its_server_does_not_hear_the_request_to_end(
    networked: PrivateEngine, images: Any
):
    with playing(networked, "games/deaf") as player:
        assert player.told() == ["seed 0"]
        os.killpg(player.process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while containers(images) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert containers(images) == []


def test_wordle_served_by_their_package_in_an_image_is_the_one_played_here(networked: PrivateEngine, images: Any):
    if importlib.util.find_spec("openenv") is None:
        pytest.skip("needs turnwise[openenv]")
    with tarfile.open(archive("python-science")) as tar:
        if f"usr/bin/python{sys.version_info[0]}.{sys.version_info[1]}" not in tar.getnames():
            pytest.skip(
                f"the distribution's Python is not {sys.version_info[0]}.{sys.version_info[1]}, which packages here are for"
            )
    with archive("python-science").open("rb") as file:
        images.import_image(file, repository="science")
    needed = packaged("openenv", "gymnasium", "msgspec", "prime-pydantic-config", "pydantic-settings")
    files = {**needed, **sources(Path(turnwise.__file__).parent, "turnwise")}
    serve = "exec python3 -m turnwise.cli.turnwise serve-env wordle --host 0.0.0.0"
    build(images, "games/wordle", "science", files, " ".join((serve, *(f"--{key} {value}" for key, value in WORDLE.items()))))
    native = [make("wordle", WORDLE) for _ in range(2)]
    parts = {"components": "reward_components", "metrics": "metrics", "system_prompt": native[0].system_prompt}
    with playing(networked, "games/wordle", sessions=2, tasks="server", max_turns=3, **parts) as player:
        begun = [env.reset(seed=0, options={"task": env.tasks("train")[number]})[0] for number, env in enumerate(native)]
        assert player.told() == begun
        for word in ("crane", "slate", "mulch"):
            for env, there in zip(native, player.reply(word), strict=True):
                *here, info = env.step(word)
                assert there[:4] == here
                assert there[4]["reward_components"] == info["reward_components"]
    assert containers(images) == []
