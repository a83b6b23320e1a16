"""Rows of keys and values, and the cache of prefixes."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.inference.embedded.kv import KVRows, Prefix, PrefixCache


def prefix(tokens: list[int], adapter: str | None = None, logits: bool = False) -> Prefix:
    kv = torch.tensor(tokens, dtype=torch.float32).view(1, -1, 1).repeat(2, 1, 4)
    return Prefix(adapter, np.asarray(tokens, dtype=np.int64), kv, torch.zeros(3) if logits else None)


def test_growing_keeps_what_sequences_hold() -> None:
    rows = KVRows(2, 4, torch.float32)
    written = [torch.randn(2, length, 4) for length in (3, 200)]
    for row, kv in enumerate(written):
        rows.write(row, kv)
    rows.reserve(20, 700, [3, 200])
    assert rows.data.shape[1] >= 20
    assert rows.data.shape[2] >= 700
    for row, kv in enumerate(written):
        assert torch.equal(rows.read(row, kv.shape[1]), kv)


def test_the_longest_common_beginning_is_found_token_by_token() -> None:
    cache = PrefixCache(10**6)
    cache.insert(prefix(list(range(40))))
    found = cache.longest(None, [*range(37), 99, 98])
    assert found is not None
    assert found[1] == 37


def test_entries_of_another_adapter_are_not_found() -> None:
    cache = PrefixCache(10**6)
    cache.insert(prefix(list(range(40)), "v1"))
    assert cache.longest("v2", list(range(40))) is None
    assert cache.longest(None, list(range(40))) is None
    cache.forget("v1")
    assert cache.longest("v1", list(range(40))) is None
    assert cache.nbytes == 0


def test_the_entry_not_used_for_longest_goes_first() -> None:
    one, two, three = (prefix([i] * 32) for i in range(3))
    cache = PrefixCache(one.nbytes * 2)
    cache.insert(one)
    cache.insert(two)
    assert cache.longest(None, [0] * 32) is not None
    cache.insert(three)
    assert cache.longest(None, [1] * 32) is None
    assert cache.longest(None, [0] * 32) is not None
    assert cache.nbytes == one.nbytes * 2


def test_an_entry_larger_than_the_limit_is_not_kept() -> None:
    cache = PrefixCache(10)
    cache.insert(prefix(list(range(40))))
    assert cache.nbytes == 0


def test_an_exact_entry_needs_its_logits() -> None:
    cache = PrefixCache(10**6)
    cache.insert(prefix([1, 2, 3]))
    assert cache.exact(None, [1, 2, 3]) is None
    cache.insert(prefix([1, 2, 3], logits=True))
    assert cache.exact(None, [1, 2, 3]) is not None
    assert cache.exact(None, [1, 2]) is None


@settings(deadline=None, max_examples=60)
@given(
    stored=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=70), min_size=1, max_size=12),
    wanted=st.lists(st.integers(0, 1), min_size=1, max_size=70),
    entries=st.integers(1, 12),
)
def test_what_is_found_always_begins_as_wanted(stored: list[list[int]], wanted: list[int], entries: int) -> None:
    cache = PrefixCache(entries * 70 * 2 * 4 * 4)
    for tokens in stored:
        cache.insert(prefix(tokens))
    found = cache.longest(None, wanted)
    if found is not None:
        entry, count = found
        assert entry.tokens[:count].tolist() == wanted[:count]
        assert entry.kv[0, :count, 0].tolist() == wanted[:count]
