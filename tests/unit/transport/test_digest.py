"""Digests of tensors: equal for equal tensors, different for every accident."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.transport import Digest, served_adapter, tensor_digest
from turnwise.transport import digest as digest_module
from turnwise.transport.digest import BLOCK, ROWS


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
    place = bit % len(values)
    flipped[place] ^= torch.tensor(1 << bit if bit < 31 else -(1 << 31), dtype=torch.int32)
    assert tensor_digest({"a": tensor}) != tensor_digest({"a": flipped.view(torch.float32)})


@pytest.mark.parametrize("size", [BLOCK - 1, BLOCK, BLOCK * ROWS, BLOCK * ROWS + 7])
def test_the_digest_sees_exchanged_elements_within_and_across_blocks(size: int) -> None:
    tensor = torch.arange(size, dtype=torch.int32)
    whole = tensor_digest({"a": tensor})
    for first, second in [(0, 1), (3, size - 1), (size // 2, size - 2)]:
        other = tensor.clone()
        other[first], other[second] = tensor[second], tensor[first]
        assert tensor_digest({"a": other}) != whole


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_a_tensor_of_one_block_is_summed_as_one_of_many(size: int) -> None:
    """The words of both, by the formula: element i of block b times multiplier i times (b * golden | 1), modulo 2^64."""
    words = torch.arange(size, dtype=torch.int32) * 7 - 3
    multipliers = digest_module._multipliers(torch.device("cpu")).tolist()
    wanted = 0
    for place, word in enumerate(words.tolist()):
        block, index = divmod(place, BLOCK)
        wanted += word * multipliers[index] * (block * digest_module.GOLDEN | 1)
    found = int(digest_module._word_sum(words))
    assert (found - wanted) % 2**64 == 0


def test_changes_that_cancel_in_a_plain_or_linear_sum_show() -> None:
    plain = torch.zeros(64, dtype=torch.int32)
    cancelling = plain.clone()
    cancelling[10:13] = torch.tensor([1, -2, 1])
    assert tensor_digest({"a": cancelling}) != tensor_digest({"a": plain})


def test_an_adapter_as_served_has_the_engines_type_and_the_scale_in_b() -> None:
    tensors = {"m.lora_A.weight": torch.full((1, 2), 0.1), "m.lora_B.weight": torch.full((2, 1), 0.1)}
    served = served_adapter(tensors, dtype=torch.bfloat16, scale=2.0)
    assert served["m.lora_A.weight"].tolist() == [[0.10009765625, 0.10009765625]]
    assert served["m.lora_B.weight"].tolist() == [[0.2001953125], [0.2001953125]]


def test_the_digest_of_tensors_one_by_one_equals_that_of_all() -> None:
    tensors = {"b": torch.randn(3, 4), "a": torch.arange(5), "c": torch.tensor(2.0)}
    digest = Digest()
    for name, tensor in tensors.items():
        digest.add(name, tensor)
    assert digest.hexdigest() == tensor_digest(tensors)
    assert Digest().hexdigest() == tensor_digest({})


def test_a_name_enters_the_digest_once() -> None:
    digest = Digest()
    digest.add("a", torch.ones(1))
    with pytest.raises(ValueError, match="the digest holds a tensor a already"):
        digest.add("a", torch.ones(1))
