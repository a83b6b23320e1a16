"""How segments divide between the GPU kernels, with plain-torch stand-ins for the kernels themselves."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from turnwise.trainer import attention_kernels
from turnwise.trainer.attention import Layout, segment_attention
from turnwise.trainer.attention_kernels import NO_PARENT, plan_kernels, run_kernels

HEADS, KV_HEADS, WIDTH = 4, 2, 8
CPU = torch.device("cpu")


def varlen_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    longest_query: int,
    longest_key: int,
    scaling: float | None,
) -> Tensor:
    """What the flash kernel computes: causal, aligned at the end of each segment."""
    outputs: list[Tensor] = []
    for (a, b), (c, d) in zip(_spans(query_ends), _spans(key_ends), strict=True):
        assert b - a <= longest_query
        assert d - c <= longest_key
        visible = torch.ones(b - a, d - c, dtype=torch.bool).tril((d - c) - (b - a))
        heads = (x.transpose(0, 1) for x in (query[a:b], key[c:d], value[c:d]))
        outputs.append(scaled_dot_product_attention(*heads, attn_mask=visible, scale=scaling, enable_gqa=True).transpose(0, 1))
    return torch.cat(outputs)


def _spans(ends: Tensor) -> list[tuple[int, int]]:
    values = [int(end) for end in ends]
    return list(pairwise(values))


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "varlen_kernel", varlen_reference)
    monkeypatch.setattr(attention_kernels, "LONG_MULTIPLE", 4)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths and parents of a layout."""
    lengths: list[int] = []
    parents: list[int] = []
    for index in range(draw(st.integers(1, 6))):
        roots = [i for i in range(index) if parents[i] == NO_PARENT]
        lengths.append(draw(st.integers(1, 9)))
        parents.append(draw(st.sampled_from([NO_PARENT, *roots])))
    return tuple(lengths), tuple(parents)


@settings(deadline=None, max_examples=150)
@given(layouts(), st.integers(1, 10))
def test_kernels_compute_what_segment_by_segment_attention_computes(
    lengths_and_parents: tuple[tuple[int, ...], tuple[int, ...]], long: int
) -> None:
    layout = Layout(*lengths_and_parents)
    torch.manual_seed(0)
    shapes = ((HEADS, "query"), (KV_HEADS, "key"), (KV_HEADS, "value"))
    inputs = [torch.randn(1, heads, sum(layout.lengths), WIDTH, dtype=torch.float64, requires_grad=True) for heads, _ in shapes]
    expected, _ = segment_attention(nn.Module(), *inputs, None, layout=layout, scaling=0.3)
    actual = run_kernels(*inputs, plan_kernels(layout.lengths, layout.parents, CPU, long=long), 0.3)
    torch.testing.assert_close(actual, expected)
    upstream = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(actual, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_a_pack_of_plain_short_segments_is_one_call_without_copies() -> None:
    kernels = plan_kernels((3, 4, 5), (NO_PARENT,) * 3, CPU, long=100)
    assert kernels.long == ()
    assert kernels.order is None
    assert kernels.short is not None
    assert kernels.short.query_rows is None
    assert kernels.short.key_rows is None
    assert kernels.short.query_ends.tolist() == kernels.short.key_ends.tolist() == [0, 3, 7, 12]
    assert kernels.short.query_ends.dtype == torch.int32


def test_long_segments_leave_the_flash_kernel_and_their_continuations_stay() -> None:
    kernels = plan_kernels((2, 8, 3, 9), (NO_PARENT, NO_PARENT, 1, NO_PARENT), CPU, long=8)
    assert kernels.long == ((2, 10), (13, 22))
    assert kernels.short is not None
    assert kernels.short.query_rows is not None
    assert kernels.short.query_rows.tolist() == [0, 1, 10, 11, 12]
    assert kernels.short.key_rows is not None
    assert kernels.short.key_rows.tolist() == [0, 1, *range(2, 13)]
    assert kernels.short.key_ends.tolist() == [0, 2, 13]


def test_attention_dropout_is_refused() -> None:
    tensor = torch.zeros(1, 2, 5, 4)
    with pytest.raises(ValueError, match=r"dropout of 0\.1"):
        segment_attention(nn.Module(), tensor, tensor, tensor, None, layout=Layout((5,), (NO_PARENT,)), dropout=0.1)
