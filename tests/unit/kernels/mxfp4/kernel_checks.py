"""The Triton kernels against the reference, interpreted on a CPU and compiled where there is a GPU. Run by test_triton.py.

Whether a kernel is interpreted is decided when it is defined, so these tests have a process of their own. The interpreter cuts
float32 off to bfloat16 instead of rounding; outputs are float32 here, which the kernels allow.
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support import mxfp4_oracle as oracle
from turnwise.kernels.mxfp4 import backends, plan, reference, triton_dequantize, triton_few, triton_product, triton_quantize
from turnwise.kernels.mxfp4.format import SCALE_MODES, ScaleMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-4 if DEVICE == "cuda" else 1e-6  # of float32 sums of exact products
FEW_TOKENS = [(1, 64, 128), (1, 200, 384), (7, 70, 640), (8, 8, 256), (9, 75, 384), (16, 64, 512)]
SMALL_TILE = plan.Tile(block_n=64, warps=4, ahead=1, unroll=1, resident=6)

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, where a scale overflows or is NaN


def bits(values: Tensor) -> Tensor:
    return values.cpu().nan_to_num(7.5, torch.inf, -torch.inf).view(torch.int16)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_codes(n: int, k: int, seed: int, lowest: int = 100, highest: int = 128) -> tuple[Tensor, Tensor]:
    generator = seeded(seed)
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=generator)
    return packed, torch.randint(lowest, highest + 1, (n, k // 32), dtype=torch.uint8, generator=generator)


def fused(
    x: Tensor, packed: Tensor, scales: Tensor, cut: plan.Launch, *, out: Tensor | None = None, small: bool = False
) -> Tensor:
    """The fused product in float32, added to `out` where there is one."""
    result = torch.full((len(x), len(packed)), torch.nan) if out is None else out.clone()
    result = result.to(DEVICE)
    operands = (x.to(DEVICE), packed.to(DEVICE), scales.to(DEVICE))
    triton_product.product(*operands, result, cut, add=out is not None, small_scales=small)
    return result.cpu()


def assert_near(result: Tensor, expected: Tensor) -> None:
    assert (result.double() - expected).norm() <= TOLERANCE * expected.norm()


def test_dequantise_gives_all_codes_under_all_scale_bytes_by_the_table():
    packed, scales = oracle.every_byte()
    out = triton_dequantize.dequantize(packed.to(DEVICE), scales.to(DEVICE))
    assert out.isnan().sum() == 512
    assert torch.equal(bits(out), bits(reference.dequantize(packed, scales)))


@settings(deadline=None, max_examples=10)
@given(n=st.integers(0, 70), blocks=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_dequantise_takes_any_shape(n: int, blocks: int, seed: int):
    packed, scales = random_codes(n, 32 * blocks, seed, 0, 255)
    out = triton_dequantize.dequantize(packed.to(DEVICE), scales.to(DEVICE))
    assert torch.equal(bits(out), bits(reference.dequantize(packed, scales)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", SCALE_MODES)
def test_quantise_gives_the_bytes_of_the_reference(mode: ScaleMode, dtype: torch.dtype):
    for seed in range(3):
        weight = oracle.wide_range(37, 160, seed, dtype)
        result, expected = triton_quantize.quantize(weight.to(DEVICE), mode), reference.quantize(weight, scale_mode=mode)
        assert torch.equal(result[1].cpu(), expected[1])
        assert torch.equal(result[0].cpu(), expected[0])


def test_quantise_marks_blocks_that_are_not_finite():
    weight = torch.randn(8, 64, generator=seeded(0))
    weight[1, 3], weight[2, 40], weight[3, 63] = torch.nan, torch.inf, -torch.inf
    result, expected = triton_quantize.quantize(weight.to(DEVICE), "even"), reference.quantize(weight)
    assert (expected[1] == 255).sum() == 3
    assert torch.equal(result[1].cpu(), expected[1])
    assert torch.equal(result[0].cpu(), expected[0])


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [*FEW_TOKENS, (17, 130, 384), (32, 256, 256), (40, 100, 640), (64, 128, 256)],
)
@pytest.mark.parametrize("small", [True, False])
def test_the_fused_product_agrees_with_float64(m: int, n: int, k: int, small: bool):
    packed, scales = random_codes(n, k, seed=m + n + k)
    x = torch.randn(m, k, generator=seeded(m)).bfloat16()
    cut = plan.launch(m, n, k, multiprocessors=4)
    expected = x.double() @ reference.dequantize(packed, scales, torch.float64).T
    assert_near(fused(x, packed, scales, cut, small=small), expected)
    before = 10 * torch.randn(m, n, generator=seeded(n))
    assert_near(fused(x, packed, scales, cut, out=before, small=small), expected + before)


def test_more_tokens_than_a_tile_are_multiplied_in_several():
    packed, scales = random_codes(64, 128, seed=1)
    x = torch.randn(150, 128, generator=seeded(2)).bfloat16()
    cut = plan.launch(150, 64, 128, multiprocessors=4)
    assert_near(fused(x, packed, scales, cut), x.double() @ reference.dequantize(packed, scales, torch.float64).T)


def test_parts_along_k_of_unequal_length_are_added_up():
    packed, scales = random_codes(64, 128 * 7, seed=3)
    x = torch.randn(3, 128 * 7, generator=seeded(4)).bfloat16()
    expected = x.double() @ reference.dequantize(packed, scales, torch.float64).T
    ahead = [(replace(plan.TILES[tokens], ahead=steps, resident=1), tokens) for tokens, steps in ((8, 3), (16, 2))]
    for tile, tokens in ((plan.TILES[8], 8), (plan.TILES[16], 16), *ahead, (plan.TILES[32], 32), (SMALL_TILE, 32)):
        for splits, steps in ((1, 7), (2, 4), (3, 3), (4, 2), (7, 1)):
            assert_near(fused(x, packed, scales, plan.Launch(tile, tokens, splits, steps)), expected)


def test_a_part_too_long_for_shared_memory_is_refused():
    packed, scales = random_codes(64, 128 * 9, seed=18)
    with pytest.raises(ValueError, match="55296 bytes of shared memory, of 49152"):
        fused(torch.zeros(9, 128 * 9, dtype=torch.bfloat16), packed, scales, plan.Launch(plan.TILES[16], 16, 1, 9))


@pytest.mark.parametrize("m", [3, 11])
def test_a_token_that_is_not_finite_spoils_no_other_and_no_part_but_its_own(m: int):
    packed, scales = random_codes(64, 128 * 5, seed=19)
    x = torch.randn(m, 128 * 5, generator=seeded(20)).bfloat16()
    x[1, :], x[2, -128:] = torch.inf, torch.nan
    tokens = 8 if m < 9 else 16
    cut = plan.Launch(plan.TILES[tokens], tokens, 2, 3)  # of the second part, a step is not there
    parts = torch.full((2, m, 64), 7.0, device=DEVICE)
    operands = (x.to(DEVICE), packed.to(DEVICE), scales.to(DEVICE))
    triton_few.sums(*operands, parts, cut, small_scales=True)
    spoilt = ~parts.isfinite().all(dim=2).cpu()
    assert spoilt.nonzero().tolist() == [[0, 1], [1, 1], [1, 2]]


@pytest.mark.parametrize("tokens", [16, 32])
def test_a_tile_of_more_outputs_than_its_warps_hold_at_a_time_is_computed_whole(tokens: int):
    packed, scales = random_codes(200, 256, seed=16)
    x = torch.randn(5, 256, generator=seeded(17)).bfloat16()
    cut = plan.Launch(plan.Tile(block_n=128, warps=4, ahead=1, unroll=1, resident=3), tokens, 1, 2)
    assert_near(fused(x, packed, scales, cut), x.double() @ reference.dequantize(packed, scales, torch.float64).T)


@pytest.mark.parametrize("tokens", [8, 16, 64])
def test_each_code_meets_its_own_token_value(tokens: int):
    """Rows of W with one code each, and tokens that are unit vectors: a permutation gone wrong moves a value."""
    packed = torch.zeros(64, 128, dtype=torch.uint8)
    k = torch.arange(64) * 4 + torch.arange(64) % 4
    packed[torch.arange(64), k // 2] = torch.where(k % 2 == 0, 2, 32).to(torch.uint8)  # code 2 is 1.0
    scales = torch.full((64, 8), 127, dtype=torch.uint8)
    cut = plan.Launch(SMALL_TILE, tokens, 1, 2)
    results = [fused(x.bfloat16(), packed, scales, cut) for x in torch.eye(256)[k].split(tokens)]
    assert torch.equal(torch.cat(results), torch.eye(64))


@pytest.mark.parametrize("m", [3, 16, 20])
def test_scales_of_any_size_are_exact_without_a_promise(m: int):
    packed, scales = random_codes(64, 128, seed=5, lowest=0, highest=200)
    x = torch.zeros(m, 128).index_fill_(1, torch.tensor([70]), 1.0).bfloat16()
    expected = reference.dequantize(packed, scales, torch.float32)[:, 70].expand(m, 64)
    cut = plan.launch(m, 64, 128, multiprocessors=4)
    assert torch.equal(fused(x, packed, scales, cut), expected)


@pytest.mark.parametrize("m", [4, 20])
@pytest.mark.parametrize("byte", [129, 150, 254])
def test_a_broken_promise_of_small_scales_shows_as_nan(byte: int, m: int):
    packed, scales = random_codes(64, 128, seed=6)
    packed[9, 32:48] = 0x22  # ones: no code is 0, which an infinite scale would make NaN
    scales[9, 2] = byte
    x = 0.01 * torch.randn(m, 128, generator=seeded(7)).bfloat16()  # no sum of 32 of them reaches 2, times 2^127
    cut = plan.launch(m, 64, 128, multiprocessors=4)
    assert fused(x, packed, scales, cut, small=True).isnan().all(0).nonzero().flatten().tolist() == [9]
    assert not fused(x, packed, scales, cut, small=False).isnan().any()


@pytest.mark.parametrize("m", [4, 12, 20])
def test_a_nan_scale_reaches_its_own_output_alone(m: int):
    packed, scales = random_codes(64, 256, seed=8)
    scales[33, 5] = 255
    x = torch.randn(m, 256, generator=seeded(9)).bfloat16()
    result = fused(x, packed, scales, plan.launch(m, 64, 256, multiprocessors=4))
    assert result.isnan().all(0).nonzero().flatten().tolist() == [33]


@pytest.mark.parametrize("m", [5, 20])
def test_equal_inputs_give_equal_bits(m: int):
    packed, scales = random_codes(128, 1024, seed=10)
    x = torch.randn(m, 1024, generator=seeded(11)).bfloat16()
    cut = plan.launch(m, 128, 1024, multiprocessors=4)
    assert cut.splits > 1
    assert torch.equal(fused(x, packed, scales, cut), fused(x, packed, scales, cut))


def test_the_kernel_refuses_what_its_loads_cannot_read():
    packed, scales = random_codes(8, 256, seed=12)
    x = torch.zeros(2, 256, dtype=torch.bfloat16)
    assert triton_product.fits(x, packed, scales)
    assert not triton_product.fits(x.float(), packed, scales)
    assert not triton_product.fits(torch.zeros(1025, dtype=torch.bfloat16)[1:].view(4, 256), packed, scales)
    assert not triton_product.fits(torch.zeros(2, 64, dtype=torch.bfloat16), *random_codes(8, 64, seed=13))


def test_few_tokens_are_fused_and_many_multiply_a_decoded_weight(monkeypatch: pytest.MonkeyPatch):
    fused_tokens: list[int] = []
    product = triton_product.product

    def counted(x: Tensor, *arguments: object, **options: bool) -> None:
        fused_tokens.append(len(x))
        product(x, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(triton_product, "product", counted)
    monkeypatch.setattr(plan, "CROSSOVERS", {(40, 256): 6})
    if DEVICE == "cpu":
        monkeypatch.setattr(backends, "uses_triton", lambda _: True)
        monkeypatch.setattr(backends, "_multiprocessors", lambda _: 4)
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    packed, scales = (tensor.to(DEVICE) for tensor in random_codes(40, 256, seed=14))
    weight = reference.dequantize(packed, scales, torch.float64)
    for m in (0, 1, 6, 7, 20):
        x = torch.randn(m, 256, generator=seeded(m)).bfloat16().to(DEVICE)
        before = torch.randn(m, 40, generator=seeded(m)).bfloat16().to(DEVICE)
        expected = x.double() @ weight.T
        out = before.clone()
        assert backends.product(x, packed, scales, out=out, add=True) is out
        for result, wanted in ((backends.product(x, packed, scales), expected), (out, expected + before)):
            assert (result.double() - wanted).norm() <= 0.02 * wanted.norm()
        grad_x = backends.product_dx(expected.bfloat16(), packed, scales)
        assert (grad_x.double() - expected.bfloat16().double() @ weight).norm() <= 0.02 * grad_x.double().norm()
    assert fused_tokens == [1, 1, 6, 6]


def test_codes_at_an_odd_address_are_decoded(monkeypatch: pytest.MonkeyPatch):
    packed, scales = random_codes(6, 64, seed=15)
    if DEVICE == "cpu":
        monkeypatch.setattr(backends, "uses_triton", lambda _: True)
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    file = torch.zeros(1 + packed.numel(), dtype=torch.uint8, device=DEVICE)
    file[1:] = packed.flatten()
    out = backends.dequantize(file[1:].view(6, 32), scales.to(DEVICE), torch.float32)
    assert torch.equal(out.cpu(), reference.dequantize(packed, scales, torch.float32))
