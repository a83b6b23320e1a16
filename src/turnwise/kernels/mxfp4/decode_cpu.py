"""Dequantise on a CPU by looking pairs of codes up, into a workspace that stays.

Two codes of one byte under one scale byte have 65,536 values in all: a table of 256 KB in bfloat16 and 512 KB in float32, which a
core keeps in its cache. A look-up costs 0.3 to 0.5 ns a weight on one core of a Zen 5 (bit arithmetic in plain torch took 3.5 to
9), so the product of 512 tokens in bfloat16, 2 to 4 ns a weight, becomes 15 to 20 % slower. With 8 tokens, 0.1 ns a weight, the
look-up dominates: `layer.decoded_once` is for that.
"""

import functools
import threading

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from turnwise.kernels.mxfp4 import reference
from turnwise.kernels.mxfp4.format import BLOCK

CHUNK_BYTES = 1 << 18  # bytes of codes at a time: their indices and values stay in a core's cache

_WORDS = {torch.bfloat16: torch.int32, torch.float16: torch.int32, torch.float32: torch.int64}  # a pair of values as one integer
_workspaces = threading.local()  # a thread each, since a product is not finished when the next thread decodes


def supported(dtype: torch.dtype) -> bool:
    """Whether there is a table for this dtype."""
    return dtype in _WORDS


@functools.cache
def _table(dtype: torch.dtype) -> Tensor:
    """Pairs of values for index 256 * scale byte + code byte."""
    byte = torch.arange(256, dtype=torch.uint8)
    blocks = byte.view(16, 1, 16).expand(16, 256, 16).reshape(-1, BLOCK // 2)  # all code bytes, for each scale byte in turn
    pairs = reference.dequantize(blocks, byte.repeat(16).view(-1, 1), dtype).view(16, 256, 16, 2)
    return pairs.transpose(0, 1).contiguous().view(_WORDS[dtype]).flatten()


def dequantize_into(
    out: Float[Tensor, "n k"], packed: UInt8[Tensor, "n half_k"], scales: UInt8[Tensor, "n blocks"]
) -> Float[Tensor, "n k"]:
    """Write the values into `out`, contiguous, of a dtype that is `supported`; the bits are those of the reference."""
    table = _table(out.dtype)
    pairs = out.view(table.dtype)
    rows = max(1, CHUNK_BYTES // max(1, packed.shape[1]))
    for part, codes, scale in zip(pairs.split(rows), packed.split(rows), scales.split(rows), strict=True):
        index = codes.int().view(-1, BLOCK // 2).add_(scale.int().view(-1, 1), alpha=256)
        torch.index_select(table, 0, index.view(-1), out=part.view(-1))
    return out


def workspace(n: int, k: int, dtype: torch.dtype) -> Float[Tensor, "n k"]:
    """Memory for a decoded weight, valid until this thread asks again. It is as large as the largest weight so far.

    New memory for each product would cost as much again: the system clears it page by page.

    """
    held = _workspaces.__dict__
    name = str(dtype)
    if name not in held or held[name].numel() < n * k:
        held[name] = torch.empty(n * k, dtype=dtype)
    return held[name][: n * k].view(n, k)


def release_workspaces() -> None:
    """Give this thread's workspaces back to the allocator."""
    _workspaces.__dict__.clear()
