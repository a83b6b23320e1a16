"""The plan of a broadcast: nothing lost, nothing reordered, one type a bucket, and within its size."""

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.transport import Manifest, plan_buckets
from turnwise.transport.manifest import ITEM_BYTES, MANIFEST, TensorSpec

specs = st.lists(
    st.builds(
        TensorSpec,
        st.text(max_size=5),
        st.sampled_from(sorted(ITEM_BYTES)),
        st.lists(st.integers(0, 40), max_size=3),
    ),
    max_size=30,
)


@given(specs, st.integers(1, 5000))
def test_buckets_hold_every_tensor_in_order_one_type_each_and_no_more_than_fits(tensors: list[TensorSpec], limit: int) -> None:
    buckets = plan_buckets(tensors, limit_bytes=limit)
    assert [tensor for bucket in buckets for tensor in bucket] == tensors
    for bucket in buckets:
        assert len({tensor.dtype for tensor in bucket}) == 1
        size = sum(tensor.nbytes for tensor in bucket)
        filled = [tensor for tensor in bucket if tensor.nbytes > 0]
        assert size <= limit or len(filled) == 1


@given(specs, st.integers(1, 5000))
def test_no_bucket_could_take_in_the_first_tensor_of_the_next(tensors: list[TensorSpec], limit: int) -> None:
    buckets = plan_buckets(tensors, limit_bytes=limit)
    for bucket, following in itertools.pairwise(buckets):
        full = sum(tensor.nbytes for tensor in bucket) + following[0].nbytes > limit
        assert full or following[0].dtype != bucket[0].dtype


@given(specs)
def test_a_manifest_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, tensors: list[TensorSpec]) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    manifest = Manifest(3, "gloo", 4, plan_buckets(tensors))
    manifest.write(folder)
    assert Manifest.read(folder) == manifest


def test_a_scalar_has_one_element_and_an_empty_tensor_none() -> None:
    assert TensorSpec("scale", "float32", []).nbytes == 4
    assert TensorSpec("nothing", "bfloat16", [0, 5]).nbytes == 0


def test_a_type_that_weights_do_not_have_is_named() -> None:
    with pytest.raises(ValueError, match="head is of type complex64; weights travel as float64, float32"):
        plan_buckets([TensorSpec("head", "complex64", [2])])


def test_a_file_that_is_no_manifest_is_named(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"version": "three"}')
    with pytest.raises(ValueError, match=r"manifest\.json is not a manifest"):
        Manifest.read(tmp_path)
    with pytest.raises(FileNotFoundError):
        Manifest.read(tmp_path / "nowhere")
