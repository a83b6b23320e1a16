"""Causal attention of a flat list of tokens over cached keys and values.

Legend: T tokens, N attention heads, G key-value heads, D head size. Each object serves all layers of one step and takes
`heads` [T, N + 2G, D]: rotated queries and keys, then values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from turnwise.inference.embedded.lean import LeanModel


class AloneAttention:
    """All tokens are one sequence, from its first token; nothing is cached."""

    def __init__(self, model: LeanModel) -> None:
        self.sizes = [model.heads, model.kv_heads, model.kv_heads]

    def __call__(self, layer: int, heads: Tensor) -> Tensor:
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in heads.split(self.sizes, dim=1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out[0].transpose(0, 1).reshape(len(heads), -1)


class MixedAttention:
    """Writes keys and values of all tokens; the first `decoding` tokens are rows 0.. with one token each."""

    def __init__(self, model: LeanModel, data: Tensor, rows: Tensor, positions: Tensor, decoding: int) -> None:
        self.n, self.g, self.d = model.heads, model.kv_heads, model.head_dim
        self.data = data
        self.decoding = decoding
        self.slots = rows * data.shape[2] + positions
        lengths = positions[:decoding] + 1
        self.longest = int(lengths.max()) if decoding else 0
        self.mask: Tensor | None = None
        if decoding and int(lengths.min()) != self.longest:
            beyond = torch.arange(self.longest)[None] >= lengths[:, None]
            self.mask = torch.zeros(beyond.shape, dtype=data.dtype).masked_fill_(beyond, float("-inf"))[:, None, None]
        self.prompts = _segments(rows[decoding:].tolist(), positions[decoding:].tolist(), decoding, data.dtype)

    def __call__(self, layer: int, heads: Tensor) -> Tensor:
        n, g, d, m = self.n, self.g, self.d, self.decoding
        cache = self.data[layer]
        cache.view(-1, cache.shape[-1]).index_copy_(0, self.slots, heads[:, n:].reshape(len(heads), -1))
        out = torch.empty(len(heads), n * d, dtype=heads.dtype)
        if m:
            # the n / g query heads that share a key head stand where query positions usually do: no copies of keys
            q = heads[:m, :n].reshape(m, g, n // g, d)
            kv = cache[:m, : self.longest].view(m, self.longest, 2 * g, d).transpose(1, 2)
            out[:m] = F.scaled_dot_product_attention(q, kv[:, :g], kv[:, g:], attn_mask=self.mask).reshape(m, n * d)
        for row, start, count, length, mask in self.prompts:
            q = heads[start : start + count, :n].transpose(0, 1).unsqueeze(0)
            kv = cache[row, :length].view(length, 2 * g, d).transpose(0, 1).unsqueeze(0)
            attended = F.scaled_dot_product_attention(
                q, kv[:, :g], kv[:, g:], attn_mask=mask, is_causal=mask is None and count > 1, enable_gqa=n != g
            )
            out[start : start + count] = attended[0].transpose(0, 1).reshape(count, n * d)
        return out


class RowByRowAttention:
    """One token for each row, attended over exactly its own length; rows beyond `rows` are padding."""

    def __init__(self, model: LeanModel, data: Tensor, rows: list[int], positions: Tensor) -> None:
        self.n, self.g, self.d = model.heads, model.kv_heads, model.head_dim
        self.data = data
        self.rows = rows
        self.lengths = [p + 1 for p in positions[: len(rows)].tolist()]
        self.slots = torch.tensor(rows) * data.shape[2] + positions[: len(rows)]

    def __call__(self, layer: int, heads: Tensor) -> Tensor:
        n, g, d, m = self.n, self.g, self.d, len(self.rows)
        cache = self.data[layer]
        cache.view(-1, cache.shape[-1]).index_copy_(0, self.slots, heads[:m, n:].reshape(m, -1))
        out = torch.zeros(len(heads), n * d, dtype=heads.dtype)
        queries = heads[:m, :n].reshape(m, 1, g, n // g, d)
        for i, (row, length) in enumerate(zip(self.rows, self.lengths, strict=True)):
            kv = cache[row, :length].view(length, 2 * g, d).transpose(0, 1).unsqueeze(0)
            out[i] = F.scaled_dot_product_attention(queries[i], kv[:, :g], kv[:, g:]).reshape(-1)
        return out


def _segments(
    rows: list[int], positions: list[int], offset: int, dtype: torch.dtype
) -> list[tuple[int, int, int, int, Tensor | None]]:
    """(row, first token, tokens, length with what is cached, mask unless plain causal) of each prompt."""
    segments: list[tuple[int, int, int, int, Tensor | None]] = []
    start = 0
    for i in range(1, len(rows) + 1):
        if i < len(rows) and rows[i] == rows[start]:
            continue
        past, count = positions[start], i - start
        mask = None
        if past and count > 1:
            later = torch.ones(count, past + count, dtype=torch.bool).triu_(past + 1)
            mask = torch.zeros(later.shape, dtype=dtype).masked_fill_(later, float("-inf"))
        segments.append((rows[start], offset + start, count, past + count, mask))
        start = i
    return segments
