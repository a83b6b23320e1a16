"""GPU kernels under packed attention: torch's variable-length flash attention for most segments, cuDNN's for long ones.

On an H200 (head_dim 128, 32 heads over 8, causal) cuDNN's forward and backward ran at 547 TFLOP/s on a segment of 16,384 tokens,
the flash kernel's at 320. But cuDNN plans every shape anew, and one call does one length; so it gets long segments only, padded
to few lengths, and all others go through the flash kernel together.
"""

import inspect
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

NO_PARENT = -1
KERNEL_TYPES = (torch.bfloat16, torch.float16)
LONG = 4096  # tokens from which a segment goes to cuDNN
LONG_MULTIPLE = 1024  # cuDNN sees lengths that are multiples of it; the padding lies behind, where a causal mask hides it
DENSE_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]  # in this order where one cannot


@dataclass(frozen=True)
class Varlen:
    """Segments for one call of the flash kernel: which rows of the packed sequence their queries and keys are."""

    query_rows: Int[Tensor, " queries"] | None  # None: all rows, in order
    key_rows: Int[Tensor, " keys"] | None  # with those of parents in front
    query_ends: Int[Tensor, " ends"]  # int32, cumulative, from 0
    key_ends: Int[Tensor, " ends"]
    longest_query: int
    longest_key: int


@dataclass(frozen=True)
class Kernels:
    """Which kernel does which part of a layout."""

    long: tuple[tuple[int, int], ...]  # first row and the one after the last, of segments without a parent
    short: Varlen | None
    order: Int[Tensor, " tokens"] | None  # place of each row in the outputs of long segments and then short; None: as it is


def plan_kernels(lengths: tuple[int, ...], parents: tuple[int, ...], device: torch.device, *, long: int | None = None) -> Kernels:
    """Divide the segments of a layout.

    Args:
        lengths: tokens of each segment.
        parents: index of the segment that each one goes on from, or `NO_PARENT`.
        device: where the tensors are needed.
        long: tokens from which a segment goes to cuDNN; `LONG` on a GPU of compute capability 9 or more, else none does.
    """
    if long is None:
        long = LONG if torch.cuda.get_device_capability(device)[0] >= 9 else sum(lengths) + 1
    ends = [0, *accumulate(lengths)]
    rows = [range(start, end) for start, end in pairwise(ends)]
    apart = [i for i, parent in enumerate(parents) if parent == NO_PARENT and lengths[i] >= long]
    rest = sorted(set(range(len(lengths))) - set(apart))
    spans = tuple((rows[i].start, rows[i].stop) for i in apart)
    if not apart:
        return Kernels((), _varlen(rows, parents, rest, device), None)
    places = [row for i in (*apart, *rest) for row in rows[i]]
    in_order = places == list(range(ends[-1]))
    order = None if in_order else _upload(sorted(range(len(places)), key=places.__getitem__), torch.int64, device)
    return Kernels(spans, _varlen(rows, parents, rest, device) if rest else None, order)


def run_kernels(
    query: Float[Tensor, "1 heads tokens head_dim"],
    key: Float[Tensor, "1 kv_heads tokens head_dim"],
    value: Float[Tensor, "1 kv_heads tokens head_dim"],
    kernels: Kernels,
    scaling: float | None,
) -> Float[Tensor, "1 tokens heads head_dim"]:
    """Attention output of all segments."""
    outputs = [_long(query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], scaling) for a, b in kernels.long]
    if kernels.short is not None:
        short = _short(query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), kernels.short, scaling)
        outputs.append(short[None])
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return output if kernels.order is None else output.index_select(1, kernels.order)


def _long(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    tokens = query.shape[2]
    missing = -tokens % LONG_MULTIPLE
    if missing:
        query, key, value = (pad(x, (0, 0, 0, missing)) for x in (query, key, value))
    with sdpa_kernel(DENSE_BACKENDS, set_priority=True):
        output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return output[:, :, :tokens].transpose(1, 2)


def _short(query: Tensor, key: Tensor, value: Tensor, layout: Varlen, scaling: float | None) -> Tensor:
    if layout.query_rows is not None:
        query = query.index_select(0, layout.query_rows)
    if layout.key_rows is not None:
        key, value = key.index_select(0, layout.key_rows), value.index_select(0, layout.key_rows)
    ends = (layout.query_ends, layout.key_ends, layout.longest_query, layout.longest_key)
    return varlen_kernel(query, key, value, *ends, scaling)


def varlen_kernel(
    query: Float[Tensor, "queries heads head_dim"],
    key: Float[Tensor, "keys kv_heads head_dim"],
    value: Float[Tensor, "keys kv_heads head_dim"],
    query_ends: Int[Tensor, " ends"],
    key_ends: Int[Tensor, " ends"],
    longest_query: int,
    longest_key: int,
    scaling: float | None,
) -> Float[Tensor, "queries heads head_dim"]:
    """Flash attention; the last query of a segment sees all its keys, each one before it one key less."""
    ends = (query_ends, key_ends, longest_query, longest_key)
    return _VARLEN(query, key, value, *ends, scale=scaling, window_size=(-1, 0), **_GROUPED)


def _find_kernel() -> tuple[Any, dict[str, bool]]:
    """torch's varlen attention, and how it is told that keys have fewer heads than queries: 2.11 takes that as it comes."""
    from torch.nn.attention.varlen import varlen_attn

    known = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return varlen_attn, {"enable_gqa": True} if known else {}


_VARLEN, _GROUPED = _find_kernel()


def _varlen(rows: list[range], parents: tuple[int, ...], segments: list[int], device: torch.device) -> Varlen:
    keys = [[*(rows[parents[i]] if parents[i] != NO_PARENT else ()), *rows[i]] for i in segments]
    whole = len(segments) == len(rows)
    return Varlen(
        None if whole else _upload([row for i in segments for row in rows[i]], torch.int64, device),
        None if whole and set(parents) == {NO_PARENT} else _upload([row for one in keys for row in one], torch.int64, device),
        _upload([0, *accumulate(len(rows[i]) for i in segments)], torch.int32, device),
        _upload([0, *accumulate(len(one) for one in keys)], torch.int32, device),
        max(len(rows[i]) for i in segments),
        max(len(one) for one in keys),
    )


def _upload(values: list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
