"""Published versions: announced whole, pruned behind the served one."""

import math
from pathlib import Path

import pytest

from turnwise.transport import Served, WeightsReady, WeightsStore, adapter_name


def publish(store: WeightsStore, version: int, content: bytes = b"w", **metrics: float) -> WeightsReady:
    ready = WeightsReady(version, "lora", str(store.path(version)), "0" * 64, metrics)
    store.publish(ready, lambda folder: (folder / "adapter_model.safetensors").write_bytes(content) and None)
    return ready


def test_a_version_is_announced_with_its_files(tmp_path: Path) -> None:
    store = WeightsStore(tmp_path / "weights")
    assert store.poll(0) is None
    assert store.versions() == []
    ready = publish(store, 0)
    assert store.poll(0) == ready
    assert (store.path(0) / "adapter_model.safetensors").read_bytes() == b"w"
    assert store.path(0).name == adapter_name(0) == "v0"


def test_nothing_is_announced_while_files_are_written(tmp_path: Path) -> None:
    store = WeightsStore(tmp_path)

    def fill(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"w")
        assert store.poll(1) is None
        assert store.versions() == []

    store.publish(WeightsReady(1, "lora", "p", "d"), fill)
    assert store.versions() == [1]


def test_a_publication_that_fails_announces_nothing(tmp_path: Path) -> None:
    store = WeightsStore(tmp_path)

    def fill(folder: Path) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        store.publish(WeightsReady(1, "lora", "p", "d"), fill)
    assert list(tmp_path.iterdir()) == []


def test_a_step_whose_metrics_are_not_finite_is_announced_all_the_same(tmp_path: Path) -> None:
    store = WeightsStore(tmp_path)
    publish(store, 1, **{"actor/loss": math.nan, "actor/lr": 0.5})
    ready = store.poll(1)
    assert ready is not None
    assert math.isnan(ready.metrics["actor/loss"])
    assert ready.metrics["actor/lr"] == 0.5


def test_a_version_published_again_replaces_the_first(tmp_path: Path) -> None:
    store = WeightsStore(tmp_path)
    publish(store, 3, b"before the resume")
    publish(store, 3, b"after it")
    assert (store.path(3) / "adapter_model.safetensors").read_bytes() == b"after it"


def test_pruning_keeps_the_served_version_those_before_it_and_all_later_ones(tmp_path: Path) -> None:
    store = WeightsStore(tmp_path)
    for version in range(7):
        publish(store, version)
    store.prune(keep=2)
    assert store.versions() == list(range(7))  # nothing beyond version 0 is served yet
    store.acknowledge(Served(4))
    assert store.served() == 4
    store.prune(keep=2)
    assert store.versions() == [3, 4, 5, 6]
    store.prune(keep=0)
    assert store.versions() == [4, 5, 6]


def test_a_resume_forgets_the_later_lineage(tmp_path: Path) -> None:
    store = WeightsStore(tmp_path)
    for version in range(5):
        publish(store, version)
    store.acknowledge(Served(4))
    store.forget_after(2)
    assert store.versions() == [0, 1, 2]
    assert store.served() == 2
    store.forget_after(3)
    assert store.served() == 2


def test_foreign_folders_are_no_versions(tmp_path: Path) -> None:
    store = WeightsStore(tmp_path)
    publish(store, 1)
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision" / "ready.json").write_text("{}")
    assert store.versions() == [1]


def test_a_broadcast_whose_sender_is_gone_is_forgotten(tmp_path: Path) -> None:
    store = WeightsStore(tmp_path)
    publish(store, 1)
    store.publish(WeightsReady(2, "full", "p", "d", transfer="broadcast", rendezvous="127.0.0.1:1"), lambda folder: None)
    store.acknowledge(Served(2))
    store.forget_after(2)
    assert store.versions() == [1]
    assert store.served() == 2


def test_a_claim_appears_in_the_folder_of_its_version_and_leaves_with_it(tmp_path: Path) -> None:
    store = WeightsStore(tmp_path)
    publish(store, 1)
    assert not store.claim_path(1).exists()
    store.claim(1)
    assert store.claim_path(1).exists()
    assert store.poll(1) is not None
    publish(store, 1)  # announced anew: nobody has claimed that
    assert not store.claim_path(1).exists()
