"""Keys and values: one row for each running sequence, and copies of finished or shared prefixes."""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK = 16  # tokens between the prefix lengths that are indexed; matches are then extended token by token
FIRST_LENGTH = 256
FIRST_ROWS = 8


class KVRows:
    """`data[layer, row, position]` holds the keys of all key-value heads, then the values, `width` numbers in all.

    Grows by doubling. It begins as zeros, since a masked position counts with weight 0 and 0 times whatever memory held may be
    NaN; numpy takes them from the system untouched, so that what no sequence has reached is never resident.
    """

    def __init__(self, layers: int, width: int, dtype: torch.dtype) -> None:
        self.width = width
        self.data = _zeros((layers, FIRST_ROWS, FIRST_LENGTH, width), dtype)

    def reserve(self, rows: int, length: int, used: Sequence[int]) -> None:
        """Make room for `rows` sequences of `length` tokens; `used[row]` tokens of each row are kept."""
        _, have_rows, have_length, _ = self.data.shape
        if rows <= have_rows and length <= have_length:
            return
        new_rows = max(have_rows, 1 << (rows - 1).bit_length())
        new_length = max(have_length, 1 << (length - 1).bit_length())
        data = _zeros((self.data.shape[0], new_rows, new_length, self.width), self.data.dtype)
        for row, count in enumerate(used):
            data[:, row, :count] = self.data[:, row, :count]
        self.data = data

    def clear_row(self, row: int, length: int) -> None:
        """Forget the first `length` tokens of a row that holds NaN, for whoever gets the row next."""
        self.data[:, row, :length] = 0

    def copy_row(self, source: int, target: int, length: int) -> None:
        self.data[:, target, :length] = self.data[:, source, :length]

    def read(self, row: int, length: int) -> Tensor:
        """A copy of one sequence: [layers, length, width]."""
        return self.data[:, row, :length].clone()

    def write(self, row: int, kv: Tensor) -> None:
        self.data[:, row, : kv.shape[1]] = kv


@dataclass(eq=False, slots=True)
class Prefix:
    """Keys and values of a token sequence under one adapter."""

    adapter: str | None
    tokens: np.ndarray
    kv: Tensor  # [layers, len(tokens), width]
    logits: Tensor | None  # float32 [vocabulary] after the last token; None where they were not kept

    @property
    def nbytes(self) -> int:
        return self.kv.nbytes + (self.logits.nbytes if self.logits is not None else 0)


class PrefixCache:
    """Remembers prefixes up to a memory limit; the one not used for longest goes first."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.nbytes = 0
        self.hits = 0  # tokens that needed no computation
        self._entries: OrderedDict[tuple[str | None, bytes], Prefix] = OrderedDict()
        self._index: dict[int, Prefix] = {}

    def insert(self, prefix: Prefix) -> None:
        key = (prefix.adapter, prefix.tokens.tobytes())
        if prefix.nbytes > self.limit_bytes:
            return
        if key in self._entries:
            self._drop(key)
        self._entries[key] = prefix
        self.nbytes += prefix.nbytes
        for code in _codes(prefix.adapter, prefix.tokens):
            self._index[code] = prefix
        while self.nbytes > self.limit_bytes:
            self._drop(next(iter(self._entries)))

    def longest(self, adapter: str | None, tokens: Sequence[int]) -> tuple[Prefix, int] | None:
        """The entry that shares the longest beginning with `tokens`, and how many tokens of it are equal."""
        wanted = np.asarray(tokens, dtype=np.int64)
        found: Prefix | None = None
        for code in _codes(adapter, wanted):
            entry = self._index.get(code)
            if entry is None:
                break
            found = entry
        if found is None or found.adapter != adapter:
            return None
        count = min(len(wanted), len(found.tokens))
        differs = np.flatnonzero(wanted[:count] != found.tokens[:count])
        self._entries.move_to_end((adapter, found.tokens.tobytes()))
        return found, int(differs[0]) if len(differs) else count

    def exact(self, adapter: str | None, tokens: Sequence[int]) -> Prefix | None:
        """The entry of exactly these tokens with its logits, or None."""
        key = (adapter, np.asarray(tokens, dtype=np.int64).tobytes())
        entry = self._entries.get(key)
        if entry is None or entry.logits is None:
            return None
        self._entries.move_to_end(key)
        return entry

    def forget(self, adapter: str | None) -> None:
        """Drop all entries of an adapter."""
        for key in [key for key in self._entries if key[0] == adapter]:
            self._drop(key)

    def clear(self) -> None:
        self._entries.clear()
        self._index.clear()
        self.nbytes = 0

    def _drop(self, key: tuple[str | None, bytes]) -> None:
        entry = self._entries.pop(key)
        self.nbytes -= entry.nbytes
        for code in _codes(entry.adapter, entry.tokens):
            if self._index.get(code) is entry:
                del self._index[code]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(count, dtype=np.uint8)).view(dtype).view(shape)


def _codes(adapter: str | None, tokens: np.ndarray) -> list[int]:
    """A hash of the tokens up to each multiple of `BLOCK`; equal codes are compared token by token afterwards."""
    codes: list[int] = []
    code = hash(adapter)
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        code = hash((code, tokens[start : start + BLOCK].tobytes()))
        codes.append(code)
    return codes
