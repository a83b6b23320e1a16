"""Continuous batching: joining, leaving, prefixes, and what the deterministic mode promises."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.adapters import reference_logprobs
from support.engine_support import FAMILIES, advance, build, random_prompts, run, sequence
from turnwise.inference.embedded import invariance
from turnwise.inference.embedded.lean import LeanModel
from turnwise.inference.embedded.lean_decoder import LeanDecoder
from turnwise.inference.embedded.sequence import Sequence

MODEL = build(FAMILIES["llama"])
LEAN = LeanModel(MODEL, 256)


def decoder(*, deterministic: bool = False, cache_bytes: int = 2**24) -> LeanDecoder:
    return LeanDecoder(LEAN, cache_bytes=cache_bytes, deterministic=deterministic)


def error(item: Sequence) -> float:
    expected = reference_logprobs(MODEL, item.tokens)[len(item.prompt) - 1 :]
    return max(abs(a - b) for a, b in zip(expected, item.logprobs, strict=True))


@settings(deadline=None, max_examples=15)
@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 12), st.integers(1, 60), st.integers(1, 14), st.integers(0, 3)), min_size=1, max_size=14
    ),
    deterministic=st.booleans(),
)
def test_sequences_join_and_leave_at_any_step(arrivals: list[tuple[int, int, int, int]], deterministic: bool) -> None:
    """(step of arrival, prompt length, tokens, which of four prompts): logprobs agree with a fresh forward pass."""
    engine = decoder(deterministic=deterministic)
    prompts = [torch.randint(2, 300, (60,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(4)]
    waiting = [(step, sequence(prompts[p][:length], max_tokens=n, seed=n)) for step, length, n, p in arrivals]
    for step in range(13):
        for _, item in [pair for pair in waiting if pair[0] == step]:
            engine.admit(item)
        if engine.rows:
            advance(engine)
    while engine.rows:
        advance(engine)
    assert all(item.finish_reason == "length" for _, item in waiting)
    assert max(error(item) for _, item in waiting) < 2e-5


def test_equal_prompts_are_computed_once_and_answered_differently() -> None:
    engine = decoder()
    prompt = random_prompts(1, longest=60)[0] * 3
    sequences = [sequence(prompt, seed=seed, max_tokens=12) for seed in range(6)]
    run(engine, sequences)
    assert max(error(item) for item in sequences) < 2e-5
    assert len({tuple(item.sampled) for item in sequences}) == 6


def test_the_next_turn_computes_only_what_is_new() -> None:
    engine = decoder()
    first = sequence(random_prompts(1, longest=60)[0] * 3, max_tokens=20)
    run(engine, [first])
    second = sequence([*first.tokens, 7, 8, 9], max_tokens=20)
    assert engine.admit(second) == 4  # the last sampled token and the three new ones
    while engine.rows:
        advance(engine)
    assert error(second) < 2e-5


def test_a_shared_beginning_is_reused_for_another_prompt() -> None:
    engine = decoder()
    system = random_prompts(1, seed=5)[0] * 4
    run(engine, [sequence([*system, 3, 4, 5])])
    other = sequence([*system, 6, 7, 8, 9])
    assert engine.admit(other) == 4
    advance(engine)
    while engine.rows:
        advance(engine)
    assert error(other) < 2e-5


def test_without_a_cache_the_replies_are_the_same() -> None:
    prompts = [prompt * 3 for prompt in random_prompts(4, seed=9)]
    replies: list[list[int]] = []
    for cache_bytes in (2**24, 0):
        engine = decoder(cache_bytes=cache_bytes)
        for _ in range(2):
            sequences = [sequence(prompt, seed=i) for i, prompt in enumerate(prompts)]
            run(engine, sequences)
        replies.append([token for item in sequences for token in item.sampled])
    assert replies[0] == replies[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_in_deterministic_mode_companions_change_no_bit(family: str, dtype: torch.dtype) -> None:
    model = LeanModel(build(FAMILIES[family], dtype=dtype), 256)
    prompt = random_prompts(1, longest=60, seed=1)[0] * 2
    expected: tuple[list[int], list[float]] | None = None
    for companions in (0, 1, 5, 30, 70):
        engine = LeanDecoder(model, cache_bytes=2**24, deterministic=True)
        others = [sequence(p, seed=i, max_tokens=1 + i % 9) for i, p in enumerate(random_prompts(companions, seed=companions))]
        wanted = sequence(prompt, seed=77, max_tokens=24)
        for item in others[: companions // 2]:
            engine.admit(item)
        if engine.rows:
            advance(engine)
        engine.admit(wanted)
        for item in others[companions // 2 :]:
            engine.admit(item)
        while engine.rows:
            advance(engine)
        result = (wanted.sampled, wanted.logprobs)
        expected = expected or result
        assert result == expected  # to the bit


def test_in_deterministic_mode_an_equal_prompt_seen_before_changes_no_bit() -> None:
    engine = decoder(deterministic=True)
    prompt = random_prompts(1, longest=60, seed=1)[0] * 2
    results: list[tuple[list[int], list[float]]] = []
    for _ in range(3):
        item = sequence(prompt, seed=5, max_tokens=16)
        run(engine, [item, sequence([*prompt, 4, 5], seed=6)])
        results.append((item.sampled, item.logprobs))
    assert results[0] == results[1] == results[2]
    assert engine.prefixes.hits > 0


def test_rows_that_are_not_invariant_are_computed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted kernel whose result depends on the place of a row."""
    sound = LEAN.head

    def placed(x: torch.Tensor) -> torch.Tensor:
        return sound(x) * (1 + 1e-6 * torch.arange(len(x))[:, None])

    assert invariance.invariant_row_counts(LEAN, lambda _: None) == invariance.COUNTS
    monkeypatch.setattr(LEAN, "head", placed)
    assert invariance.invariant_row_counts(LEAN, lambda _: None) == (1,)


def test_a_kernel_that_changes_with_the_number_of_rows_leaves_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = LEAN.head

    def counted(x: torch.Tensor) -> torch.Tensor:
        return sound(x) * (1 + 1e-6 * len(x))

    monkeypatch.setattr(LEAN, "head", counted)
    assert invariance.invariant_row_counts(LEAN, lambda _: None) == (invariance.FALLBACK_COUNT,)


def test_reloading_replaces_every_weight_and_a_wrong_shape_changes_nothing(tmp_path: Any) -> None:
    other = build(FAMILIES["llama"], seed=1)
    other.save_pretrained(tmp_path / "other")
    build(FAMILIES["qwen3"]).save_pretrained(tmp_path / "wrong")
    engine = LeanDecoder(LeanModel(MODEL, 256), cache_bytes=2**24, deterministic=False)
    before = engine.digest(None)
    with pytest.raises(ValueError, match="expected"):
        engine.reload(tmp_path / "wrong")
    with pytest.raises(OSError, match="is not a folder"):
        engine.reload(tmp_path / "missing")
    assert engine.digest(None) == before
    engine.reload(tmp_path / "other")
    item = sequence([5, 6, 7])
    run(engine, [item])
    assert item.logprobs == pytest.approx(reference_logprobs(other, item.tokens)[2:], abs=2e-5)
