"""Weights by gloo: between threads where only the protocol matters, between processes where one dies."""

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from turnwise.transport import BroadcastError, Manifest, Receiver, Sender, peer_group, plan_buckets, spec_of, tensor_digest
from turnwise.transport.peer_group import LOOPBACK

WORKER = Path(__file__).parents[2] / "support" / "broadcast_worker.py"
T = TypeVar("T")


def weights(version: int, *, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Some tensors of several shapes and two types."""
    generator = torch.Generator().manual_seed(version)
    shapes = {"embed": (50, 8), "norm": (8,), "scale": (), "up": (16, 8), "down": (8, 16)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return tensors | {"rotary": torch.arange(6, dtype=torch.float32)}


def manifest_of(tensors: dict[str, Tensor], *, version: int = 0, workers: int = 1, limit: int = 300) -> Manifest:
    specs = [spec_of(name, tensor) for name, tensor in tensors.items()]
    return Manifest(version, "gloo", workers + 1, plan_buckets(specs, limit_bytes=limit))


def in_thread(function: Callable[[], T]) -> "Future[T]":
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


@contextlib.contextmanager
def sender(*, workers: int = 1, timeout_s: float = 30) -> Generator[Sender]:
    made = Sender(backend="gloo", workers=workers, timeout_s=timeout_s)
    try:
        yield made
    finally:
        made.close()


def receive(rendezvous: str, manifest: Manifest, *, rank: int = 1, timeout_s: float = 30) -> dict[str, Tensor]:
    receiver = Receiver(rendezvous, rank=rank, manifest=manifest, timeout_s=timeout_s)
    received = dict(receiver.receive(manifest))
    receiver.close()
    return received


def test_every_worker_gets_every_tensor_to_the_bit_and_in_order() -> None:
    tensors = weights(0)
    manifest = manifest_of(tensors, workers=2)
    assert len(manifest.buckets) > 3
    with sender(workers=2) as source:
        both = [in_thread(lambda rank=rank: receive(source.rendezvous, manifest, rank=rank)) for rank in (1, 2)]
        source.send(manifest, tensors.items())
        for future in both:
            received = future.result(30)
            assert list(received) == list(tensors)
            assert tensor_digest(received) == tensor_digest(tensors)
            assert received["scale"].shape == ()


def test_the_group_stays_open_from_version_to_version() -> None:
    manifests = [manifest_of(weights(version), version=version) for version in range(3)]
    with sender() as source:

        def follow() -> list[str]:
            receiver = Receiver(source.rendezvous, rank=1, manifest=manifests[0], timeout_s=30)
            return [tensor_digest(dict(receiver.receive(manifest))) for manifest in manifests]

        digests = in_thread(follow)
        for version, manifest in enumerate(manifests):
            source.send(manifest, weights(version).items())
        assert digests.result(30) == [tensor_digest(weights(version)) for version in range(3)]


def test_the_default_group_of_torch_is_left_alone() -> None:
    with sender() as source:
        manifest = manifest_of(weights(0))
        received = in_thread(lambda: receive(source.rendezvous, manifest))
        source.send(manifest, weights(0).items())
        received.result(30)
        assert not torch.distributed.is_initialized()


def test_a_manifest_without_tensors_is_through_at_once() -> None:
    manifest = Manifest(0, "gloo", 2, [])
    with sender() as source:
        received = in_thread(lambda: receive(source.rendezvous, manifest))
        source.send(manifest, [])
        assert received.result(30) == {}


def test_the_rendezvous_is_reachable_from_this_machine_only() -> None:
    with sender() as source:
        host, _, port = source.rendezvous.partition(":")
        assert host == LOOPBACK
        listening = "\n".join(path.read_text() for path in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")) if path.exists())
        entries = [line.split()[1] for line in listening.splitlines() if f":{int(port):04X} " in line and line.split()[3] == "0A"]
        assert entries == [f"0100007F:{int(port):04X}"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pairs: pairs[1:], "the manifest has .*embed"),
        (lambda pairs: pairs[:-1], "what comes is None"),
        (lambda pairs: [*pairs, ("more", torch.zeros(1))], "more is not in the manifest of v0"),
        (lambda pairs: [(pairs[0][0], pairs[0][1].float()), *pairs[1:]], "float32"),
        (lambda pairs: [(pairs[0][0], pairs[0][1].T), *pairs[1:]], r"shape=\[8, 50\]"),
    ],
)
def test_tensors_that_are_not_those_of_the_manifest_are_refused_on_both_sides(
    change: Callable[[list[tuple[str, Tensor]]], list[tuple[str, Tensor]]], message: str
) -> None:
    manifest = manifest_of(weights(0))
    with sender() as source:
        received = in_thread(lambda: receive(source.rendezvous, manifest))
        with pytest.raises(ValueError, match=message):
            source.send(manifest, change(list(weights(0).items())))
        if "more" not in message:  # there everything that was announced got through
            with pytest.raises(BroadcastError, match=r"worker 1: weights v0, bucket \d of \d"):
                received.result(30)


def test_workers_that_do_not_come_are_named_at_the_deadline() -> None:
    manifest = manifest_of(weights(0), workers=3)
    with sender(workers=3, timeout_s=0.5) as source:
        alone = in_thread(lambda: receive(source.rendezvous, manifest, rank=2, timeout_s=0.2))
        with pytest.raises(BroadcastError, match=r"127\.0\.0\.1:\d+, trainer: of 4 ranks 1, 3 did not come within 0\.5 s"):
            source.send(manifest, weights(0).items())
        with pytest.raises(BroadcastError, match=r"worker 2: of 4 ranks 0?,? ?1, 3 did not come within 0\.2 s"):
            alone.result(30)


def test_a_run_that_ends_does_not_wait_long_for_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_group, "HURRY_S", 0.3)
    source = Sender(backend="gloo", workers=1, timeout_s=60, hurry=lambda: True)
    with pytest.raises(BroadcastError, match=r"of 2 ranks 1 did not come within 0\.3 s"):
        source.send(manifest_of(weights(0)), weights(0).items())


def test_a_run_that_ends_does_not_wait_long_for_a_worker_that_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_group, "HURRY_S", 0.5)
    ending = threading.Event()
    large = {f"layer.{index}": torch.zeros(4_000_000) for index in range(3)}
    manifest = manifest_of(large, limit=1)
    source = Sender(backend="gloo", workers=1, timeout_s=60, hurry=ending.is_set)
    sent = in_thread(lambda: source.send(manifest, large.items()))
    receiver = Receiver(source.rendezvous, rank=1, manifest=manifest, timeout_s=60)
    ending.set()
    with pytest.raises(BroadcastError, match=r"trainer: weights v0, bucket \d of 3: not through within 0\.5 s"):
        sent.result(30)
    receiver.close()


def test_a_rendezvous_where_nobody_is_gets_a_clear_error() -> None:
    with pytest.raises(BroadcastError, match=r"worker 1: no trainer answers at 127\.0\.0\.1:1: "):
        receive("127.0.0.1:1", manifest_of(weights(0)), timeout_s=0.2)
    with pytest.raises(BroadcastError, match="no trainer answers at nonsense"):
        receive("nonsense", manifest_of(weights(0)), timeout_s=0.2)


def test_a_trainer_that_stops_sending_is_noticed_at_the_deadline() -> None:
    manifest = manifest_of(weights(0))
    hold = threading.Event()

    def slow() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights(0).items():
            if name == "down":
                hold.wait(30)
            yield name, tensor

    with sender() as source:
        sent = in_thread(lambda: source.send(manifest, slow()))
        with pytest.raises(BroadcastError, match=r"worker 1: weights v0, bucket 3 of 4: not through within 0\.5 s"):
            receive(source.rendezvous, manifest, timeout_s=0.5)
        hold.set()
        with pytest.raises(BroadcastError, match=r"trainer: weights v0, bucket \d of \d: worker 1: v0, .* not through within"):
            sent.result(30)
        with pytest.raises(BroadcastError, match="the group was closed after an earlier failure"):
            source.send(manifest, weights(0).items())


def test_a_reader_that_gives_up_ends_the_sender_too() -> None:
    large = {f"layer.{index}": torch.zeros(4_000_000) for index in range(4)}  # more than sockets hold
    manifest = manifest_of(large, limit=1)

    def give_up(source: Sender) -> None:
        receiver = Receiver(source.rendezvous, rank=1, manifest=manifest, timeout_s=30)
        with contextlib.closing(receiver.receive(manifest)) as pairs:
            for name, _ in pairs:
                raise ValueError(f"{name} does not fit")

    with sender() as source:
        received = in_thread(lambda: give_up(source))
        with pytest.raises(BroadcastError, match=r"trainer: weights v0, bucket \d of 4: worker 1: v0 could not be loaded"):
            source.send(manifest, large.items())
        with pytest.raises(ValueError, match=r"layer\.0 does not fit"):
            received.result(30)


@contextlib.contextmanager
def worker_of(source: Sender, folder: Path, *more: str) -> "Generator[subprocess.Popen[str]]":
    command = [sys.executable, str(WORKER), source.rendezvous, "1", str(folder), "60", *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        try:
            yield worker
        finally:
            worker.kill()


def announce(manifest: Manifest, folder: Path) -> None:
    folder.mkdir()
    manifest.write(folder)
    (folder / "go").touch()


def test_a_worker_in_another_process_gets_two_versions_by_their_manifests(tmp_path: Path) -> None:
    with sender(timeout_s=60) as source, worker_of(source, tmp_path, "--versions", "2") as worker:
        for version in (0, 1):
            manifest = manifest_of(weights(version), version=version)
            announce(manifest, tmp_path / str(version))
            source.send(manifest, weights(version).items())
        output, _ = worker.communicate(timeout=60)
        assert output.split() == [tensor_digest(weights(0)), tensor_digest(weights(1))]


def test_a_worker_that_dies_midway_is_named(tmp_path: Path) -> None:
    large = {f"layer.{index}": torch.zeros(4_000_000) for index in range(8)}
    manifest = manifest_of(large, limit=1)
    announce(manifest, tmp_path / "0")
    with sender(timeout_s=60) as source, worker_of(source, tmp_path, "--die-after", "2") as worker:
        with pytest.raises(
            BroadcastError, match=r"trainer: weights v0, bucket \d of 8: .*(worker 1 \(process \d+\) is gone|peer)"
        ):
            source.send(manifest, large.items())
        assert worker.wait(60) == 9


def test_a_trainer_that_fails_midway_tells_the_worker_why(tmp_path: Path) -> None:
    manifest = manifest_of(weights(0))
    announce(manifest, tmp_path / "0")

    def failing() -> Iterator[tuple[str, Tensor]]:
        yield from list(weights(0).items())[:2]
        raise MemoryError("no room for a gather")

    with sender(timeout_s=60) as source, worker_of(source, tmp_path) as worker:
        with pytest.raises(MemoryError):
            source.send(manifest, failing())
        output, _ = worker.communicate(timeout=60)
        assert worker.returncode == 1
        assert output.startswith(f"BroadcastError: broadcast through {source.rendezvous}, worker 1: weights v0, bucket")
        assert output.strip().endswith("trainer: MemoryError: no room for a gather")


def test_a_trainer_that_is_killed_is_noticed_by_its_store(tmp_path: Path) -> None:
    script = (
        "import sys; from turnwise.transport import *; from pathlib import Path; import os, torch\n"
        "source = Sender(backend='gloo', workers=1, timeout_s=60); print(source.rendezvous, flush=True)\n"
        "manifest = Manifest.read(Path(sys.argv[1]))\n"
        "def dying():\n yield 'first', torch.zeros(10)\n os._exit(9)\n"
        "source.send(manifest, dying())"
    )
    manifest = manifest_of({"first": torch.zeros(10), "second": torch.zeros(10)}, limit=1)
    manifest.write(tmp_path)
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        rendezvous = trainer.stdout.readline().strip()
        amid = r"weights v0, bucket \d of 2: (the trainer's store went away|trainer .* is gone|.*peer)"
        sooner = "no group with the other processes: .*peer"  # the trainer may be ahead of us by the whole of its life
        with pytest.raises(BroadcastError, match=f"worker 1: ({amid}|{sooner})"):
            receive(rendezvous, manifest, timeout_s=60)
        assert trainer.wait(60) == 9
