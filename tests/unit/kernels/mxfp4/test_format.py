"""What can be quantised, and which tensors belong together."""

import pytest
import torch

from turnwise.kernels.mxfp4 import format as mx


@pytest.mark.parametrize("shape", [(4, 33), (4, 16), (4, 0), (4,), (1, 2, 32)])
def test_only_matrices_with_whole_blocks_are_quantised(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="MXFP4"):
        mx.check_weight(torch.zeros(shape))


def test_integers_are_no_weights():
    with pytest.raises(ValueError, match="floats"):
        mx.check_weight(torch.zeros(2, 32, dtype=torch.int32))


def test_an_unknown_scale_mode_is_refused_with_the_known_ones():
    assert [mx.check_scale_mode(mode) for mode in mx.SCALE_MODES] == ["even", "floor", "rceil", "ceil"]
    with pytest.raises(ValueError, match=r"scale_mode = 'round' .* even, floor, rceil, ceil"):
        mx.check_scale_mode("round")


@pytest.mark.parametrize(
    ("packed", "scales"),
    [((4, 16), (4, 2)), ((4, 16), (3, 1)), ((4, 2, 16), (4, 2)), ((4, 16), (4,))],
)
def test_codes_and_scales_of_different_weights_do_not_fit(packed: tuple[int, ...], scales: tuple[int, ...]):
    with pytest.raises(ValueError, match="do not fit"):
        mx.check_packed(torch.zeros(packed, dtype=torch.uint8), torch.zeros(scales, dtype=torch.uint8))


def test_codes_are_bytes():
    with pytest.raises(ValueError, match="uint8"):
        mx.check_packed(torch.zeros(4, 16), torch.zeros(4, 1, dtype=torch.uint8))


def test_the_largest_scale_keeps_every_value_finite():
    assert 6 * 2.0 ** (mx.LARGEST_SCALE - mx.SCALE_BIAS) < 2.0**128 <= 6 * 2.0 ** (mx.LARGEST_SCALE + 1 - mx.SCALE_BIAS)
