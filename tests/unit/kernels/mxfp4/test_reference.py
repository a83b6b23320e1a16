"""The specification against a second implementation, value by value."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import mxfp4_oracle as oracle
from turnwise.kernels.mxfp4 import reference
from turnwise.kernels.mxfp4.format import SCALE_MODES, VALUES, ScaleMode

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_all_codes_under_all_scale_bytes_decode_by_the_table(dtype: torch.dtype):
    values = reference.dequantize(*oracle.every_byte(), dtype)
    expected = oracle.every_value().to(dtype)
    assert expected.isnan().sum() == 512
    assert expected.isinf().sum() > 0
    assert torch.equal(values.isnan(), expected.isnan())
    assert torch.equal(
        values.nan_to_num(0.0, posinf=torch.inf, neginf=-torch.inf), expected.nan_to_num(0.0, torch.inf, -torch.inf)
    )


def test_every_finite_value_is_exact_in_bfloat16():
    exact, rounded = oracle.every_value(), reference.dequantize(*oracle.every_byte(), torch.bfloat16).double()
    finite = exact.isfinite()
    assert torch.equal(exact[finite], rounded[finite])


def test_the_even_k_is_in_the_lower_nibble():
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([6.0, -0.5, 1.5, 4.0])
    packed, scales = reference.quantize(weight, scale_mode="floor")
    assert scales.item() == 127
    assert packed[0, :3].tolist() == [0x97, 0x63, 0x00]


def test_blocks_of_gpt_oss_are_the_same_bytes():
    weight = torch.randn(3, 96)
    packed, scales = reference.quantize(weight)
    blocks = packed.view(3, 3, 16)
    lower, upper = blocks & 15, blocks >> 4
    values = torch.tensor(VALUES)[torch.stack((lower, upper), -1).flatten(2).long()] * torch.exp2(scales.float() - 127)[..., None]
    assert torch.equal(values.flatten(1), reference.dequantize(packed, scales, torch.float32))


@settings(deadline=None, max_examples=150)
@given(values=st.lists(FINITE, min_size=32, max_size=32), mode=st.sampled_from(SCALE_MODES))
def test_any_finite_block_is_quantised_as_by_the_second_implementation(values: list[float], mode: ScaleMode):
    weight = torch.tensor([values], dtype=torch.float32)
    packed, scales = reference.quantize(weight, scale_mode=mode)
    expected = oracle.quantize(weight, mode)
    assert torch.equal(scales, expected[1])
    assert torch.equal(packed, expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", SCALE_MODES)
@settings(deadline=None, max_examples=12)
@given(seed=st.integers(0, 2**31))
def test_weights_of_any_size_are_quantised_as_by_the_second_implementation(mode: ScaleMode, dtype: torch.dtype, seed: int):
    weight = oracle.wide_range(3, 96, seed, dtype)
    packed, scales = reference.quantize(weight, scale_mode=mode)
    expected = oracle.quantize(weight, mode)
    assert torch.equal(scales, expected[1])
    assert torch.equal(packed, expected[0])


@settings(deadline=None, max_examples=100)
@given(
    mantissa=st.sampled_from([1.0, 1.25, 1.4999, 1.5, 1.5001, 1.7499, 1.75, 1.7501, 1.9999]),
    exponent=st.integers(-149, 127),
    mode=st.sampled_from(SCALE_MODES),
)
def test_scales_change_where_the_rule_says(mantissa: float, exponent: int, mode: ScaleMode):
    weight = torch.full((1, 32), mantissa * 2.0**exponent, dtype=torch.float64).float()
    expected = oracle.quantize(weight, mode)
    assert torch.equal(reference.quantize(weight, scale_mode=mode)[1], expected[1])


def test_halves_go_to_the_even_code():
    weight = torch.zeros(1, 32)
    weight[0, :9] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -2.5])
    packed, scales = reference.quantize(weight, scale_mode="floor")
    values = reference.dequantize(packed, scales, torch.float32)
    assert values[0, :9].tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, -2.0]


def test_a_block_of_zeros_has_scale_one():
    packed, scales = reference.quantize(torch.zeros(2, 64))
    assert scales.tolist() == [[127, 127], [127, 127]]
    assert not packed.any()


@pytest.mark.parametrize("mode", SCALE_MODES)
def test_scales_stay_within_1_and_252_and_values_finite(mode: ScaleMode):
    largest = torch.finfo(torch.float32).max
    weight = torch.tensor([[2.0**-149] * 32, [2.0**-126] * 32, [largest] * 32, [-largest] * 32])
    packed, scales = reference.quantize(weight, scale_mode=mode)
    assert scales.min().item() == 1
    assert scales.max().item() == 252
    assert reference.dequantize(packed, scales, torch.float32).isfinite().all()


@pytest.mark.parametrize("mode", ["rceil", "ceil"])
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31))
def test_these_modes_never_saturate(mode: ScaleMode, seed: int):
    weight = oracle.wide_range(2, 64, seed)
    _, scales = reference.quantize(weight, scale_mode=mode)
    limit = 6 * torch.exp2(scales.double() - 127).repeat_interleave(32, 1)
    reachable = scales.repeat_interleave(32, 1) < 252
    assert (weight.double().abs() <= limit)[reachable].all()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_only_the_block_that_is_not_finite_gets_the_nan_scale(bad: float):
    weight = torch.randn(2, 96)
    weight[1, 40] = bad
    packed, scales = reference.quantize(weight)
    assert (scales == 255).tolist() == [[False] * 3, [False, True, False]]
    assert not packed[1, 16:32].any()
    assert reference.dequantize(packed, scales).isnan().sum().item() == 32


def test_quantised_values_are_quantised_to_themselves():
    weight = reference.dequantize(*reference.quantize(torch.randn(8, 128), scale_mode="floor"), torch.float32)
    packed, scales = reference.quantize(weight, scale_mode="floor")
    assert torch.equal(reference.dequantize(packed, scales, torch.float32), weight)


def test_a_weight_larger_than_a_chunk_is_quantised_like_its_parts(monkeypatch: pytest.MonkeyPatch):
    weight = torch.randn(37, 64)
    whole = reference.quantize(weight)
    monkeypatch.setattr(reference, "CHUNK_WEIGHTS", 256)
    parts = reference.quantize(weight)
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])


def test_a_transposed_weight_is_quantised_as_it_reads():
    weight = torch.randn(64, 5)
    assert torch.equal(reference.quantize(weight.T)[0], reference.quantize(weight.T.contiguous())[0])


def test_a_weight_without_rows_has_no_codes():
    packed, scales = reference.quantize(torch.empty(0, 64))
    assert (packed.shape, scales.shape) == ((0, 32), (0, 2))
    assert reference.dequantize(packed, scales).shape == (0, 64)
