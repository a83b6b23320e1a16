"""Published versions: announced whole, pruned behind the served one, proven by a digest."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.transport import Served, WeightsReady, WeightsStore, adapter_name, tensor_digest


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


def test_the_digest_does_not_depend_on_order_or_memory_layout() -> None:
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(2)
    assert tensor_digest({"a": a, "b": b}) == tensor_digest({"b": b, "a": a})
    assert tensor_digest({"a": a.t().contiguous().t()}) == tensor_digest({"a": a})
    assert tensor_digest({"a": a.clone().requires_grad_()}) == tensor_digest({"a": a})


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.tensor([1.0, 2.0, 3.5])},
        {"b": torch.tensor([1.0, 2.0, 3.0])},
        {"a": torch.tensor([[1.0, 2.0, 3.0]])},
        {"a": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)},
        {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.tensor([])},
        {},
    ],
)
def test_the_digest_sees_values_names_shapes_and_types(other: dict[str, torch.Tensor]) -> None:
    assert tensor_digest({"a": torch.tensor([1.0, 2.0, 3.0])}) != tensor_digest(other)


def test_the_digest_tells_types_of_equal_bytes_apart() -> None:
    digests = {tensor_digest({"a": torch.zeros(4, dtype=dtype)}) for dtype in (torch.bfloat16, torch.float16, torch.int16)}
    assert len(digests) == 3
    assert len({tensor_digest({"a": torch.tensor(1.0)}), tensor_digest({"a": torch.tensor([1.0])})}) == 2


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20), st.integers(0, 31))
def test_one_flipped_bit_changes_the_digest(values: list[float], bit: int) -> None:
    tensor = torch.tensor(values, dtype=torch.float32)
    flipped = tensor.clone().view(torch.int32)
    flipped[0] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
    assert tensor_digest({"a": tensor}) != tensor_digest({"a": flipped.view(torch.float32)})
