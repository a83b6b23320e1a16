"""What the engine is asked for, relaxation by relaxation."""

from typing import Any

import docker
import docker.errors
import pytest
import requests

from turnwise.config.containers import ContainersConfig, HostConfig, LimitsConfig
from turnwise.containers import ContainerError, ContainerGone, EngineDown, ImageMissing
from turnwise.containers.breaker import Breaker
from turnwise.containers.docker_host import DockerHost
from turnwise.containers.engine import Engine
from turnwise.containers.recipes import SHELL_LABEL
from turnwise.containers.spec import Spec


class RecordingApi:
    """The SDK's real host configuration, and the last request for a container."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}

    def create_host_config(self, **options: Any) -> dict[str, Any]:
        return docker.types.HostConfig(version="1.41", **options)

    def create_container(self, image: str, command: list[str], **options: Any) -> dict[str, Any]:
        self.asked = {"image": image, "command": command, **options}
        return {"Id": "1"}

    def inspect_image(self, image: str) -> dict[str, Any]:
        if image == "missing":
            raise docker.errors.ImageNotFound("no such image")
        return {"Config": {"Labels": {SHELL_LABEL: "/x/sh"} if image == "ours" else None}}


def asked(image: str = "ours", gpus: tuple[str, ...] = (), **relaxations: Any) -> dict[str, Any]:
    config = ContainersConfig.model_validate(relaxations)
    api, engine = RecordingApi(), Engine(HostConfig(url="unix:///nowhere"))
    engine._client = api
    host = DockerHost(engine, config, Breaker("x", threshold=1, pause_s=1), capacity=1, run="r")
    host.prepare(image)
    host.create(api, Spec(image, config.limits, gpus), "/x/sh")
    return api.asked


def test_hardened_by_default():
    made = asked()
    limits, host = LimitsConfig(), made["host_config"]
    assert (made["user"], made["network_disabled"], made["tty"]) == ("1000:1000", True, False)
    assert (host["CapDrop"], host.get("CapAdd"), host["SecurityOpt"]) == (["ALL"], None, ["no-new-privileges"])
    assert (host["ReadonlyRootfs"], host["NetworkMode"], host["IpcMode"]) == (True, "none", "private")
    assert host["Memory"] == host["MemorySwap"] == limits.memory_mib * 2**20
    assert (host["PidsLimit"], host["NanoCpus"], host["ShmSize"]) == (limits.pids, 10**9, limits.shm_mib * 2**20)
    assert set(host["Tmpfs"]) == {"/home/agent", "/tmp", "/data"}
    assert all("nosuid,nodev" in options and "size=" in options for options in host["Tmpfs"].values())
    assert "Binds" not in host
    assert "DeviceRequests" not in host
    assert made["environment"]["NVIDIA_VISIBLE_DEVICES"] == "void"


def test_each_relaxation_changes_what_it_names_and_nothing_else():
    base = asked()

    def differences(**relaxation: Any) -> set[str]:
        other = asked(**relaxation)
        flat = [{**made, **made["host_config"], "host_config": None} for made in (base, other)]
        return {key for key in flat[0] | flat[1] if flat[0].get(key) != flat[1].get(key)}

    assert differences() == set()
    assert differences(network="bridge") == {"NetworkMode", "network_disabled"}
    assert differences(user="0:0") == {"user", "Tmpfs"}
    assert differences(read_only=False) == {"ReadonlyRootfs"}
    assert differences(capabilities=["NET_RAW"]) == {"CapAdd"}


def test_leased_gpus_and_no_others_are_asked_for():
    made = asked(gpus=("GPU-5", "GPU-6"))
    (request,) = made["host_config"]["DeviceRequests"]
    assert (request["DeviceIDs"], request["Capabilities"]) == (["GPU-5", "GPU-6"], [["gpu"]])
    assert made["environment"]["NVIDIA_VISIBLE_DEVICES"] == "GPU-5,GPU-6"


def test_an_image_that_is_missing_is_named_with_a_remedy():
    with pytest.raises(ImageMissing, match=r"docker pull missing.*"):
        asked("missing")


class FailingApi:
    """Raises what it was given."""

    def __init__(self, error: Exception):
        self.error = error

    def inspect_container(self, container: str) -> None:
        raise self.error


def refusal(status: int) -> docker.errors.APIError:
    response = requests.Response()
    response.status_code = status
    return (docker.errors.NotFound if status == 404 else docker.errors.APIError)("said", response, "why")


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (refusal(404), ContainerGone),
        (refusal(409), ContainerGone),
        (refusal(400), ContainerError),
        (refusal(500), EngineDown),
        (requests.ConnectionError("refused"), EngineDown),
        (requests.ReadTimeout("slow"), EngineDown),
        (ConnectionResetError("reset"), EngineDown),
        (docker.errors.DockerException("version"), EngineDown),
    ],
)
def test_errors_of_the_engine_are_told_apart(error: Exception, ours: type[ContainerError]):
    engine = Engine(HostConfig(url="unix:///nowhere"))
    engine._client = FailingApi(error)
    with pytest.raises(ContainerError) as raised, engine.call() as api:
        api.inspect_container("x")
    assert type(raised.value) is ours


def test_an_engine_that_is_not_there_is_down():
    with pytest.raises(EngineDown, match="unix:///nowhere does not answer"), Engine(HostConfig(url="unix:///nowhere")).call():
        pass
