"""The operators: values, gradients, errors, and that torch.compile keeps a graph whole."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turnwise.kernels.mxfp4 import dequantize, mxfp4_product, mxfp4_product_dx, ops, quantize

Packed = tuple[Tensor, Tensor]


@pytest.fixture
def packed() -> Packed:
    return quantize(torch.randn(24, 64, generator=torch.Generator().manual_seed(0)))


@settings(deadline=None, max_examples=40)
@given(
    m=st.integers(0, 40),
    n=st.integers(1, 40),
    blocks=st.integers(1, 4),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_products_agree_with_float64(m: int, n: int, blocks: int, seed: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(seed)
    codes, scales = quantize(torch.randn(n, 32 * blocks, generator=generator))
    x = torch.randn(m, 32 * blocks, generator=generator).to(dtype)
    grad = torch.randn(m, n, generator=generator).to(dtype)
    weight = dequantize(codes, scales, torch.float64)
    tolerance = 32 * torch.finfo(dtype).eps
    for result, expected in (
        (mxfp4_product(x, codes, scales), x.double() @ weight.T),
        (mxfp4_product_dx(grad, codes, scales), grad.double() @ weight),
    ):
        assert result.dtype == dtype
        assert result.shape == expected.shape
        assert (result.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("product", [mxfp4_product, mxfp4_product_dx])
def test_a_product_is_written_or_added_in_place(product: Callable[..., Tensor], dtype: torch.dtype, packed: Packed):
    x = torch.randn(2, 5, 64 if product is mxfp4_product else 24).to(dtype)
    plain = product(x, *packed)
    out = torch.randn_like(plain)
    expected = out.double() + plain.double()
    assert product(x, *packed, out=out, beta=1) is out
    assert (out.double() - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()
    product(x, *packed, out=out.fill_(torch.nan), beta=0)
    assert torch.equal(out, plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out": torch.empty(5, 23), "beta": 1}, r"out is torch.float32 of shape \[5, 23\]; the product is .*\[5, 24\]"),
        ({"out": torch.empty(5, 24, dtype=torch.bfloat16)}, "bfloat16"),
        ({"out": torch.empty(24, 5).T}, "not contiguous"),
        ({"out": torch.empty(5, 24), "beta": 2}, "beta = 2"),
    ],
)
def test_an_output_that_does_not_fit_is_refused(arguments: dict[str, object], message: str, packed: Packed):
    with pytest.raises(ValueError, match=message):
        mxfp4_product(torch.zeros(5, 64), *packed, **arguments)  # type: ignore[arg-type]


def test_operands_that_do_not_fit_are_refused(packed: Packed):
    with pytest.raises(ValueError, match=r"shape \[5, 24\]; it must be of floats and end in 64, the weight's K"):
        mxfp4_product(torch.zeros(5, 24), *packed)
    with pytest.raises(ValueError, match="end in 24, the weight's N"):
        mxfp4_product_dx(torch.zeros(5, 64), *packed)
    with pytest.raises(ValueError, match="do not fit"):
        mxfp4_product(torch.zeros(5, 64), packed[0], packed[1][:, :1])


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_refused_with_its_place(bad: float, dtype: torch.dtype):
    weight = torch.randn(4, 96).to(dtype)
    weight[2, 70] = bad
    with pytest.raises(ValueError, match="not finite in 1 blocks of 32, the first in row 2, columns 64 to 95"):
        quantize(weight)
    assert (ops.quantize_unchecked(weight)[1] == 255).sum() == 1


def test_gradients_of_the_product_are_those_of_its_values(packed: Packed):
    x = torch.randn(2, 3, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mxfp4_product(x, *packed), (x,))
    assert torch.autograd.gradgradcheck(lambda x: mxfp4_product(x, *packed), (x,))


def test_autograd_keeps_the_packed_bytes_alone(packed: Packed):
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = mxfp4_product(x, *packed)
    assert [tensor.data_ptr() for tensor in kept] == [tensor.data_ptr() for tensor in packed]
    y.sum().backward()


def test_torch_finds_the_operators_well_formed(packed: Packed):
    x = torch.randn(3, 64, requires_grad=True)
    library = torch.ops.turnwise
    torch.library.opcheck(library.mxfp4_quantize.default, (torch.randn(4, 64), "even"))
    torch.library.opcheck(library.mxfp4_dequantize.default, (*packed, torch.bfloat16))
    torch.library.opcheck(library.mxfp4_product.default, (x, *packed, False, False))
    torch.library.opcheck(library.mxfp4_product.default, (torch.randn(3, 24, requires_grad=True), *packed, True, False))
    torch.library.opcheck(library.mxfp4_product_into.default, (torch.randn(3, 24), x.detach(), *packed, True, False, False))


def test_a_compiled_graph_stays_whole_and_counts_tokens_at_run_time(packed: Packed):
    def step(x: Tensor, low: Tensor) -> Tensor:
        out = mxfp4_product(low @ low.new_ones(4, 64), *packed) * 0.5
        with torch.no_grad():
            mxfp4_product(x, *packed, out=out.detach(), beta=1)
        return (mxfp4_product(x, *packed) + out + mxfp4_product_dx(out, *packed)[:, :24]).square()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (3, 7):
        x, low = torch.randn(tokens, 64, requires_grad=True), torch.randn(tokens, 4, requires_grad=True)
        eager, graph = step(x, low), compiled(x, low)
        torch.testing.assert_close(graph, eager)
        wanted = torch.autograd.grad(eager.sum(), (x, low))
        for result, expected in zip(torch.autograd.grad(graph.sum(), (x, low)), wanted, strict=True):
            torch.testing.assert_close(result, expected)


def test_quantisation_inside_a_compiled_graph_gives_the_same_bytes():
    weight = torch.randn(8, 64)
    compiled = torch.compile(ops.quantize_unchecked, backend="aot_eager", fullgraph=True)
    for result, expected in zip(compiled(weight), quantize(weight), strict=True):
        assert torch.equal(result, expected)
