"""The operations of a step against numbers worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, Qwen3Config

from turnwise.trainer.flops import ModelSize, model_size, peak_flops, step_flops

QWEN3_4B = ModelSize(layers=36, heads=32, head_dim=128)
LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=6)


def test_parameters_cost_six_operations_a_token_and_frozen_ones_four() -> None:
    no_attention = ModelSize(layers=0, heads=1, head_dim=1)
    assert step_flops(no_attention, 10, 0, [7]) == 6 * 10 * 7
    assert step_flops(no_attention, 0, 10, [7]) == 4 * 10 * 7
    assert step_flops(no_attention, 3, 10, [2, 5]) == (4 * 10 + 6 * 3) * 7


def test_attention_of_one_segment_by_hand() -> None:
    # one layer, 2 heads of 8: forward 4 x 2 x 8 x (10 x 10 / 2) = 3,200, and twice that backward
    assert step_flops(ModelSize(layers=1, heads=2, head_dim=8), 0, 0, [10]) == 9_600


def test_a_segment_after_a_shared_prompt_sees_the_prompt_and_its_own_past() -> None:
    # pairs: the prompt 4 x 4 / 2 = 8, its child 3 x 4 + 3 x 3 / 2 = 16.5
    assert step_flops(ModelSize(layers=1, heads=1, head_dim=1), 0, 0, [4, 3], [0, 4]) == 12 * 24.5


def test_qwen3_4b_with_a_rank_16_adapter_on_16384_tokens() -> None:
    """Frozen 4,022,468,096 parameters with the tied output layer, adapter 33,030,144: 4 N + 6 n = 16.288 GFLOP a token."""
    frozen, trained = 4_022_468_096, 33_030_144
    dense = (4 * frozen + 6 * trained) * 16_384
    # attention: 3 x 4 x 36 layers x 32 heads x 128 = 1,769,472 operations a pair, 16384^2 / 2 = 134,217,728 pairs
    whole = step_flops(QWEN3_4B, trained, frozen, [16_384])
    assert whole == dense + 1_769_472 * 134_217_728
    assert whole == pytest.approx(5.044e14, rel=1e-3)
    eighths = step_flops(QWEN3_4B, trained, frozen, [2_048] * 8)
    assert eighths == dense + 1_769_472 * 16_777_216
    assert whole - eighths == pytest.approx(2.078e14, rel=1e-3)


@given(first=LENGTHS, second=LENGTHS)
def test_packing_adds_up(first: list[int], second: list[int]) -> None:
    together = step_flops(QWEN3_4B, 7, 11, first + second)
    assert together == step_flops(QWEN3_4B, 7, 11, first) + step_flops(QWEN3_4B, 7, 11, second)


@given(prompt=st.integers(1, 500), own=st.integers(1, 500))
def test_a_prompt_and_its_child_cost_what_they_cost_as_one_segment(prompt: int, own: int) -> None:
    """(p + o)^2 / 2 = p^2 / 2 + o p + o^2 / 2: sharing saves the prompt's second copy, and nothing else changes."""
    apart = step_flops(QWEN3_4B, 7, 11, [prompt, own], [0, prompt])
    assert apart == step_flops(QWEN3_4B, 7, 11, [prompt + own])


def test_lengths_and_parents_of_different_number_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        step_flops(QWEN3_4B, 1, 1, [4, 3], [0])


def test_sizes_are_read_from_a_configuration_of_transformers(tiny_model) -> None:
    assert model_size(AutoConfig.from_pretrained(tiny_model)) == ModelSize(layers=2, heads=4, head_dim=16)
    wide = Qwen3Config(num_hidden_layers=36, hidden_size=2560, num_attention_heads=32, head_dim=128)
    assert model_size(wide) == QWEN3_4B


def test_the_peak_is_known_for_the_boards_named_and_for_no_other() -> None:
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") is None
