"""A trainer that shares a GPU: it waits for the engines, and its part is what the configuration says."""

import http.server
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from support.batches import ConfigOf
from turnwise.config import RLConfig
from turnwise.config.root import shared_gpu_reserve
from turnwise.trainer import sharing
from turnwise.trainer.loop import run_trainer
from turnwise.trainer.sharing import WAIT_FOR, limit_memory, memory_fraction, wait_for_engines
from turnwise.transport import Control, RunDir, WeightsStore

GIB = 2**30


@contextmanager
def engine(
    statuses: list[int], when_asked: Callable[[http.server.BaseHTTPRequestHandler], None] = lambda _: None
) -> Generator[tuple[str, list[int]]]:
    """A health route that answers with these statuses, one after the other, the last one for good; and what it has answered."""
    given: list[int] = []

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            when_asked(self)
            given.append(statuses[min(len(given), len(statuses) - 1)])
            self.send_response(given[-1])
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Health) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/health", given
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "POLL_S", 0.01)


def never() -> bool:
    return False


def test_the_trainer_begins_once_every_engine_has_answered(monkeypatch: pytest.MonkeyPatch):
    with engine([503, 503, 200]) as (slow, slow_answers), engine([200]) as (quick, quick_answers):
        monkeypatch.setenv(WAIT_FOR, f"{slow} {quick}")
        wait_for_engines(timeout_s=60.0, stop=never)
        assert slow_answers == [503, 503, 200]
        assert quick_answers == [200]  # not asked again


def test_without_a_shared_gpu_nobody_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(WAIT_FOR, raising=False)
    wait_for_engines(timeout_s=0.0, stop=never)


def test_a_request_to_stop_ends_the_wait(monkeypatch: pytest.MonkeyPatch):
    asked: list[bool] = []
    with engine([503]) as (url, _):
        monkeypatch.setenv(WAIT_FOR, url)
        wait_for_engines(timeout_s=60.0, stop=lambda: bool(asked.append(True) or len(asked) > 2))
    assert len(asked) == 3


def test_an_engine_that_never_answers_is_named(monkeypatch: pytest.MonkeyPatch):
    with engine([503]) as (url, _):
        monkeypatch.setenv(WAIT_FOR, f"{url} http://127.0.0.1:1/health")
        with pytest.raises(TimeoutError, match=rf"{url}, http://127\.0\.0\.1:1/health did not answer within 0 s"):
            wait_for_engines(timeout_s=0.0, stop=never)


def shared(**gpus: Any) -> RLConfig:
    tables = {"inference": [0, 1], "trainer": [1, 2], "share": True, "inference_memory": 0.75, **gpus}
    return RLConfig.model_validate({"gpus": tables, "inference": {"engine": "vllm"}})


@pytest.mark.parametrize(
    ("gpu", "changes", "fraction"),
    [
        (1, {}, 0.25 - shared_gpu_reserve(80 * GIB) / (80 * GIB)),
        (2, {}, None),  # the trainer's alone
        (1, {"share": False, "inference": [0]}, None),
        (1, {"inference_memory": None}, None),
    ],
)
def test_the_part_of_the_trainer(gpu: int, changes: dict[str, Any], fraction: float | None):
    assert memory_fraction(shared(**changes), gpu, 80 * GIB) == (None if fraction is None else pytest.approx(fraction))


def test_a_part_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"the engine takes 0.99 of GPU 1 \(80.0 GiB\), which leaves the trainer nothing"):
        memory_fraction(shared(inference_memory=0.99), 1, 80 * GIB)


class Device:
    """What `limit_memory` asks of torch.cuda."""

    total_memory = 80 * GIB

    def __init__(self, index: int) -> None:
        self.index = index
        self.limits: list[tuple[float, int]] = []

    def put_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.index)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: self)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *limit: self.limits.append(limit))


@pytest.mark.parametrize(("index", "limited"), [(0, True), (1, False)])
def test_the_allocator_is_bounded_on_the_shared_gpu_of_this_rank_only(index: int, limited: bool, monkeypatch: pytest.MonkeyPatch):
    device = Device(index)
    device.put_in(monkeypatch)
    limit_memory(shared(), [1, 2])
    assert device.limits == ([(pytest.approx(0.25 - shared_gpu_reserve(80 * GIB) / (80 * GIB)), 0)] if limited else [])


def test_nothing_is_asked_of_cuda_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("asked for a device"))
    limit_memory(RLConfig(), [])


def test_a_trainer_touches_nothing_before_the_engine_serves(config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch):
    """The whole of it: no policy is published while the engine starts, and the first one is once it serves."""
    config = config_of(max_steps=1)
    run_dir = RunDir(config.output_dir)
    published: list[list[int]] = []

    def starting(_: http.server.BaseHTTPRequestHandler) -> None:
        published.append(WeightsStore(run_dir.weights).versions())
        if len(published) == 3:
            Control(run_dir.root).request_stop("interrupted", "seen enough")

    with engine([503, 503, 200], starting) as (url, _):
        monkeypatch.setenv(WAIT_FOR, url)
        run_trainer(config)
    assert published == [[], [], []]
    assert WeightsStore(run_dir.weights).versions() == [0]
