"""Every part of a product is computed once, whatever its shape."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.kernels.mxfp4 import plan


@given(m=st.integers(1, 400), n=st.integers(1, 30_000), steps=st.integers(1, 300), multiprocessors=st.integers(1, 200))
def test_programs_cover_the_product_and_none_is_idle(m: int, n: int, steps: int, multiprocessors: int):
    cut = plan.launch(m, n, steps * plan.STEP, multiprocessors=multiprocessors)
    assert (cut.splits - 1) * cut.steps < steps <= cut.splits * cut.steps
    assert cut.tokens in plan.TILES
    assert cut.tokens >= m or cut.tokens == max(plan.TILES)


@pytest.mark.parametrize(("m", "tokens"), [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (32, 32), (33, 64), (64, 64), (200, 64)])
def test_tokens_are_padded_to_the_next_tile(m: int, tokens: int):
    assert plan.launch(m, 4096, 4096, multiprocessors=132).tokens == tokens


@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (4096, 11008), (8192, 8192)])
@pytest.mark.parametrize("m", [32, 64])
def test_an_h200_is_filled_by_programs_that_run_at_once(m: int, n: int, k: int):
    cut = plan.launch(m, n, k, multiprocessors=132)
    programs = -(-n // cut.tile.block_n) * cut.splits
    assert 0.9 * 132 * cut.tile.resident <= programs <= 132 * cut.tile.resident


@pytest.mark.parametrize(
    ("n", "k", "splits", "steps"),
    [
        (4096, 4096, 8, 4),
        (8192, 8192, 8, 8),
        (4096, 11008, 15, 6),
        (11008, 4096, 6, 6),
        (8192, 28672, 28, 8),
        (28672, 8192, 8, 8),
    ],
)
def test_few_tokens_are_cut_up_as_was_fastest_on_an_h200(n: int, k: int, splits: int, steps: int):
    cut = plan.launch(16, n, k, multiprocessors=132)
    assert (cut.splits, cut.steps) == (splits, steps)


@given(m=st.integers(1, 16), n=st.integers(1, 30_000), steps=st.integers(1, 300), multiprocessors=st.integers(1, 200))
def test_a_multiprocessor_has_one_program_with_more_registers_where_they_are_so_few(
    m: int, n: int, steps: int, multiprocessors: int
):
    cut = plan.launch(m, n, steps * plan.STEP, multiprocessors=multiprocessors)
    alone = -(-n // cut.tile.block_n) * cut.splits <= multiprocessors
    assert cut.tile.resident == (1 if alone else 2)
    assert 1 <= cut.tile.ahead <= max(1, cut.steps - 1) if alone else cut.tile.ahead == 1


@given(m=st.integers(1, 16), n=st.integers(1, 30_000), steps=st.integers(1, 300), multiprocessors=st.integers(1, 200))
def test_few_tokens_and_their_scales_fit_into_shared_memory(m: int, n: int, steps: int, multiprocessors: int):
    cut = plan.launch(m, n, steps * plan.STEP, multiprocessors=multiprocessors)
    tokens, scales = 2 * cut.tokens * plan.STEP, 2 * cut.tile.block_n * plan.STEP // 32
    assert cut.steps * (tokens + scales) <= 48 * 1024


@given(n=st.integers(1, 30_000), steps=st.integers(1, 300))
def test_a_program_has_at_least_two_steps_where_there_are_two(n: int, steps: int):
    assert plan.launch(1, n, steps * plan.STEP, multiprocessors=132).steps >= min(2, steps)


def test_a_given_tile_is_taken():
    tile = plan.Tile(block_n=64, warps=4, ahead=1, unroll=1, resident=6)
    assert plan.launch(16, 8192, 8192, multiprocessors=132, tile=tile).tile is tile


def test_tiles_are_multiples_of_what_their_warps_multiply():
    assert [tile.block_n % (16 * tile.warps) for tile in plan.TILES.values()] == [0] * len(plan.TILES)


def test_the_crossover_is_the_measured_one_where_there_is_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plan, "CROSSOVERS", {(8192, 4096): 192})
    assert plan.crossover(8192, 4096) == 192
    assert plan.crossover(4096, 8192) == plan.CROSSOVER
