"""Continuous batching over the lean forward pass: ragged prompts and single tokens side by side in one step."""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from turnwise.inference.embedded.adapters import LeanAdapters
from turnwise.inference.embedded.attention import AloneAttention, MixedAttention, RowByRowAttention
from turnwise.inference.embedded.invariance import invariant_row_counts
from turnwise.inference.embedded.kv import KVRows, Prefix, PrefixCache
from turnwise.inference.embedded.lean import LeanModel
from turnwise.inference.embedded.loading import lean_with, load_lean
from turnwise.inference.embedded.sequence import Sequence
from turnwise.inference.norms import Norm
from turnwise.transport import tensor_digest

HEAD_CHUNK = 256  # positions whose logits are held at once for prompt_logprobs: 50 MB at 49k vocabulary


class LeanDecoder:
    """See `Decoder`. In deterministic mode a row's result depends on its own tokens and adapter alone: prompts are computed
    one by one from their first token, single tokens under one adapter at a time and in numbers of rows that are proven to
    give a row the same bits whatever stands beside it."""

    def __init__(self, model: LeanModel, *, cache_bytes: int, deterministic: bool) -> None:
        self.model = model
        self.max_length = model.max_length
        self.deterministic = deterministic
        self.prefixes = PrefixCache(cache_bytes)
        self._rows: list[Sequence] = []
        self._prefilled = 0  # the first so many rows have only single tokens to compute
        self._adapters = LeanAdapters(model)
        self._kv = self._new_kv()
        self._row_counts: dict[int | None, tuple[int, ...]] = {}  # by adapter rank, deterministic mode only

    @property
    def rows(self) -> Seq[Sequence]:
        return self._rows

    @property
    def adapters(self) -> Seq[str]:
        return self._adapters.names

    def admit(self, sequence: Sequence) -> int:
        row = len(self._rows)
        used = [s.computed for s in self._rows]
        self._kv.reserve(row + 1, min(len(sequence.prompt) + sequence.max_tokens, self.max_length), used)
        sequence.computed = 0
        if not self.deterministic:
            found = self.prefixes.longest(sequence.adapter, sequence.tokens)
            if found is not None:
                entry, count = found
                count = min(count, len(sequence.tokens) - 1)  # the last token is computed for its logits
                self._kv.write(row, entry.kv[:, :count])
                sequence.computed = count
                self.prefixes.hits += count
        self._rows.append(sequence)
        return len(sequence.tokens) - sequence.computed

    def step(self) -> tuple[list[Sequence], Tensor]:
        logits = self._step_fixed() if self.deterministic else self._step_mixed()
        for sequence in self._rows:
            sequence.computed = len(sequence.tokens)
        self._prefilled = len(self._rows)
        return list(self._rows), logits

    def release(self, sequence: Sequence) -> None:
        """Between steps, where every row is prefilled, or for all rows after a step that failed."""
        row = self._rows.index(sequence)
        if sequence.finish_reason == "error":  # may hold NaN, which is not worth remembering either
            self._kv.clear_row(row, sequence.computed)
        elif not self.deterministic and sequence.computed > 0:
            self._remember(sequence, row, sequence.computed, None)
        last = len(self._rows) - 1
        if row != last:
            self._move(last, row)
        self._rows.pop()
        self._prefilled = min(self._prefilled, last)

    def load_adapter(self, name: str, folder: Path) -> None:
        self._adapters.load(name, folder)
        self.prefixes.forget(name)  # of an adapter that had the name before

    def unload_adapter(self, name: str) -> None:
        self._adapters.unload(name)
        self.prefixes.forget(name)

    def digest(self, name: str | None) -> str:
        return tensor_digest(dict(self.model.tensors())) if name is None else self._adapters.digest(name)

    def reload(self, folder: Path) -> None:
        self._use(load_lean(folder, self.model))

    def replace(self, pairs: Iterable[tuple[str, Tensor]]) -> None:
        self._use(lean_with(dict(pairs), self.model))

    def norms(self) -> Seq[Norm]:
        return self.model.norms()

    def _use(self, model: LeanModel) -> None:
        self.model = model
        self._kv = self._new_kv()
        self.prefixes.clear()
        self._adapters.rebase(self.model)

    def reset_prefix_cache(self) -> None:
        self.prefixes.clear()

    def prompt_logprobs(self, ids: Seq[int], adapter: str | None) -> list[float]:
        tokens = torch.tensor(ids)
        lora = self._adapters.mix([adapter] * len(ids))
        hidden = self.model.hidden(tokens, torch.arange(len(ids)), AloneAttention(self.model), lora)
        values: list[float] = []
        for start in range(0, len(ids) - 1, HEAD_CHUNK):
            targets = tokens[start + 1 : start + 1 + HEAD_CHUNK]
            logits = self.model.logits(hidden[start : start + len(targets)])
            values += torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0].tolist()
        return values

    def _new_kv(self) -> KVRows:
        return KVRows(len(self.model.layers), 2 * self.model.kv_heads * self.model.head_dim, self.model.dtype)

    def _move(self, source: int, target: int) -> None:
        self._rows[target] = self._rows[source]
        self._kv.copy_row(source, target, self._rows[target].computed)

    def _remember(self, sequence: Sequence, row: int, length: int, logits: Tensor | None) -> None:
        tokens = np.asarray(sequence.tokens[:length], dtype=np.int64)
        self.prefixes.insert(Prefix(sequence.adapter, tokens, self._kv.read(row, length), logits))

    def _step_mixed(self) -> Tensor:
        """One forward pass over single tokens and new prompts alike; equal prompts are computed once."""
        leaders, followers = self._leaders()
        decoding = self._prefilled
        flat: list[int] = []
        rows: list[int] = []
        positions: list[int] = []
        names: list[str | None] = []
        ends: list[int] = []
        for row in [*range(decoding), *leaders]:
            sequence = self._rows[row]
            new = sequence.tokens[sequence.computed :]
            flat += new
            rows += [row] * len(new)
            positions += range(sequence.computed, len(sequence.tokens))
            names += [sequence.adapter] * len(new)
            ends.append(len(flat) - 1)
        where = torch.tensor(positions)
        attend = MixedAttention(self.model, self._kv.data, torch.tensor(rows), where, decoding)
        hidden = self.model.hidden(torch.tensor(flat), where, attend, self._adapters.mix(names))
        logits = self.model.logits(hidden if len(ends) == len(flat) else hidden[ends])
        return self._spread(leaders, followers, logits)

    def _leaders(self) -> tuple[list[int], dict[int, int]]:
        """Rows of new prompts to compute, and for each equal prompt the row that it copies."""
        seen: dict[tuple[str | None, tuple[int, ...]], int] = {}
        followers: dict[int, int] = {}
        for row in range(self._prefilled, len(self._rows)):
            sequence = self._rows[row]
            first = seen.setdefault((sequence.adapter, tuple(sequence.tokens)), row)
            if first != row:
                followers[row] = first
        return list(seen.values()), followers

    def _spread(self, leaders: list[int], followers: dict[int, int], logits: Tensor) -> Tensor:
        """Remember the new prompts, copy rows to those with equal prompts, and put logits [computed rows] in row order."""
        for row in leaders:
            sequence = self._rows[row]
            if len(sequence.tokens) - sequence.computed > 1:
                self._remember(sequence, row, len(sequence.tokens), None)
        if not followers:
            return logits
        place = {row: i for i, row in enumerate([*range(self._prefilled), *leaders])}
        for row, source in followers.items():
            self._kv.copy_row(source, row, len(self._rows[source].tokens))
        return logits[[place[followers.get(row, row)] for row in range(len(self._rows))]]

    def _step_fixed(self) -> Tensor:
        logits = torch.empty(len(self._rows), self.model.vocabulary)
        for row in range(self._prefilled, len(self._rows)):
            logits[row] = self._prompt_fixed(row)
        by_adapter: dict[str | None, list[int]] = {}
        for row in range(self._prefilled):
            by_adapter.setdefault(self._rows[row].adapter, []).append(row)
        for adapter, rows in by_adapter.items():
            counts = self._invariant(adapter)
            for start in range(0, len(rows), counts[-1]):
                chunk = rows[start : start + counts[-1]]
                padded = next(count for count in counts if count >= len(chunk))
                logits[chunk] = self._tokens_fixed(chunk, adapter, padded)
        return logits

    def _prompt_fixed(self, row: int) -> Tensor:
        """Logits [vocabulary] after the whole prompt of one row, computed by itself or copied from an equal one."""
        sequence = self._rows[row]
        length = len(sequence.tokens)
        known = self.prefixes.exact(sequence.adapter, sequence.tokens)
        if known is not None and known.logits is not None:
            self._kv.write(row, known.kv)
            self.prefixes.hits += length
            return known.logits
        positions = torch.arange(length)
        attend = MixedAttention(self.model, self._kv.data, torch.full((length,), row), positions, 0)
        lora = self._adapters.mix([sequence.adapter] * length)
        hidden = self.model.hidden(torch.tensor(sequence.tokens), positions, attend, lora)
        logits = self.model.logits(hidden[-1:])[0]
        self._remember(sequence, row, length, logits)
        return logits

    def _invariant(self, adapter: str | None) -> tuple[int, ...]:
        """Row counts, ascending, at which decoding under this adapter gives a row the same bits; see `invariance`."""
        rank = self._adapters.rank(adapter)
        if rank not in self._row_counts:
            self._row_counts[rank] = invariant_row_counts(self.model, lambda count: self._adapters.mix([adapter] * count))
        return self._row_counts[rank]

    def _tokens_fixed(self, rows: list[int], adapter: str | None, count: int) -> Tensor:
        """Logits [rows, vocabulary] of one new token each, in a computation of `count` rows."""
        padding = count - len(rows)
        sequences = [self._rows[row] for row in rows]
        ids = torch.tensor([s.tokens[-1] for s in sequences] + [0] * padding)
        positions = torch.tensor([len(s.tokens) - 1 for s in sequences] + [0] * padding)
        attend = RowByRowAttention(self.model, self._kv.data, rows, positions)
        hidden = self.model.hidden(ids, positions, attend, self._adapters.mix([adapter] * count))
        return self.model.logits(hidden)[: len(rows)]
