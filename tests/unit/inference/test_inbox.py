"""Full weights that arrive in an engine: the embedded one over HTTP, a worker of vLLM by its extension."""

import threading
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.adapters import reference_logprobs
from support.engine_support import FAMILIES, GPT2, build, run, sequence
from turnwise.inference import vllm_broadcast
from turnwise.inference.embedded.build import build_decoder
from turnwise.inference.inbox import WeightsInbox
from turnwise.inference.vllm_broadcast import ReceivesWeights
from turnwise.transport import BroadcastError, Manifest, Sender, plan_buckets, spec_of, tensor_digest

LIMIT = 2**14  # bytes of a bucket: several buckets for the smallest models


def weights_of(model: Any) -> dict[str, Tensor]:
    """As the trainer names and types them."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class Trainer:
    """The sender's side in a thread."""

    def __init__(self, folder: Path, *, workers: int = 1) -> None:
        self.source = Sender(backend="gloo", workers=workers, timeout_s=20)
        self.folder = folder
        self.errors: list[Exception] = []
        self._thread: threading.Thread | None = None

    def announce(self, tensors: dict[str, Tensor], *, version: int = 1) -> tuple[str, str]:
        """Rendezvous and folder of a version that is sent as soon as the workers come."""
        manifest = Manifest(version, "gloo", self.source.world_size, plan_buckets(_specs(tensors), limit_bytes=LIMIT))
        manifest.write(self.folder)

        def send() -> None:
            try:
                self.source.send(manifest, tensors.items())
            except Exception as error:
                self.errors.append(error)

        self._thread = threading.Thread(target=send, daemon=True)
        self._thread.start()
        return self.source.rendezvous, str(self.folder)

    def join(self) -> None:
        assert self._thread is not None
        self._thread.join(30)
        assert not self._thread.is_alive()


def _specs(tensors: dict[str, Tensor]) -> list[Any]:
    return [spec_of(name, tensor) for name, tensor in tensors.items()]


@pytest.fixture
def trainer(tmp_path: Path) -> Generator[Trainer]:
    made = Trainer(tmp_path)
    yield made
    made.source.close()


@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_an_embedded_engine_computes_with_the_weights_that_it_received(family: str, trainer: Trainer) -> None:
    config = GPT2 if family == "gpt2" else FAMILIES[family]
    before, after = build(config), build(config, seed=1)
    decoder = build_decoder(before, max_length=128, cache_bytes=2**20, deterministic=False)
    rendezvous, folder = trainer.announce(weights_of(after))
    with torch.inference_mode():  # as in the engine's thread
        WeightsInbox().take(rendezvous, folder, 1, decoder.replace)
    trainer.join()
    assert trainer.errors == []
    assert decoder.digest(None) == tensor_digest(weights_of(after))
    item = sequence([5, 6, 7])
    run(decoder, [item])
    assert item.logprobs == pytest.approx(reference_logprobs(after, item.tokens)[2:], abs=2e-5)


@pytest.mark.parametrize("fault", ["a tensor is missing", "a tensor is unknown", "a shape is wrong"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_that_do_not_fit_change_nothing(family: str, fault: str, trainer: Trainer) -> None:
    config = GPT2 if family == "gpt2" else FAMILIES[family]
    decoder = build_decoder(build(config), max_length=128, cache_bytes=2**20, deterministic=False)
    before = decoder.digest(None)
    tensors = weights_of(build(config, seed=1))
    last = list(tensors)[-1]
    if fault != "a tensor is unknown":
        removed = tensors.pop(last)
        if fault == "a shape is wrong":
            tensors[last] = torch.cat([removed, removed])
    else:
        tensors["nonsense"] = torch.ones(3)
    rendezvous, folder = trainer.announce(tensors)
    with pytest.raises(ValueError, match="the tensors do not fit"):
        WeightsInbox().take(rendezvous, folder, 1, decoder.replace)
    assert decoder.digest(None) == before


class Worker(ReceivesWeights):
    """What the extension sees of a worker of vLLM."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.loaded: list[str] = []


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(worker: Worker, pairs: Iterable[tuple[str, Tensor]]) -> None:
        worker.loaded.append(tensor_digest(dict(pairs)))

    monkeypatch.setattr(vllm_broadcast, "load_into_model", load)


@pytest.mark.usefixtures("loading")
def test_the_workers_of_a_divided_model_receive_each_version_under_ranks_of_their_own(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, workers=3)
    workers = [Worker(0), Worker(0), Worker(1)]  # one engine of one worker, another of two
    digests: list[str] = []
    for version in (1, 2):
        tensors = {"weight": torch.full((4, 4), float(version))}
        digests.append(tensor_digest(tensors))
        rendezvous, folder = trainer.announce(tensors, version=version)
        with ThreadPoolExecutor(3) as pool:
            calls = [pool.submit(w.receive_weights, rendezvous, folder, r) for w, r in zip(workers, (1, 2, 2), strict=True)]
        assert [call.result() for call in calls] == [None, None, None]
        trainer.join()
    assert trainer.errors == []
    assert [worker.loaded for worker in workers] == [digests] * 3
    trainer.source.close()


def test_a_worker_tells_why_it_could_not_receive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(tmp_path)
    assert "manifest.json" in (Worker(0).receive_weights("127.0.0.1:1", str(tmp_path / "nowhere"), 1) or {})["error"]

    def refuse(worker: Worker, pairs: Iterable[tuple[str, Tensor]]) -> None:
        raise AssertionError(f"no place for {next(iter(pairs))[0]}")

    monkeypatch.setattr(vllm_broadcast, "load_into_model", refuse)
    tensors = {f"weight.{i}": torch.zeros(2_000_000) for i in range(4)}
    rendezvous, folder = trainer.announce(tensors)
    assert Worker(0).receive_weights(rendezvous, folder, 1) == {"error": "no place for weight.0"}
    trainer.join()
    (error,) = trainer.errors
    assert isinstance(error, BroadcastError)
    assert "worker 1: v1 could not be loaded" in str(error)
