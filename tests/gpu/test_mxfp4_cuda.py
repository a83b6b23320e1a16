"""MXFP4 on a GPU through the public functions: few tokens and many, gradients, torch.compile, CUDA graphs, memory.

The kernels by themselves: tests/unit/kernels/mxfp4/test_triton.py, which compiles them where there is a GPU.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from support import mxfp4_oracle as oracle
from turnwise.kernels.mxfp4 import (
    MXFP4Linear,
    dequantize,
    fake_quantize_linear,
    mxfp4_product,
    mxfp4_product_dx,
    plan,
    quantize,
    quantize_unchecked,
    reference,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
N, K = 384, 640


@pytest.fixture
def packed() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    codes, scales = quantize(0.02 * torch.randn(N, K))
    return codes.cuda(), scales.cuda()


def relative_error(result: Tensor, expected: Tensor) -> float:
    return ((result.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_quantises_as_a_cpu_does(seed: int, dtype: torch.dtype):
    weight = oracle.wide_range(64, 256, seed, dtype)
    for result, expected in zip(quantize(weight.cuda()), quantize(weight), strict=True):
        assert torch.equal(result.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gpu_dequantises_as_the_reference_does(packed: tuple[Tensor, Tensor], dtype: torch.dtype):
    expected = reference.dequantize(packed[0].cpu(), packed[1].cpu(), dtype)
    assert torch.equal(dequantize(*packed, dtype).cpu(), expected)


def test_a_weight_that_is_not_finite_is_refused():
    weight = torch.zeros(4, 64, device="cuda")
    weight[3, 40] = torch.nan
    with pytest.raises(ValueError, match="the first in row 3, columns 32 to 63"):
        quantize(weight)


@pytest.mark.parametrize("m", [1, 3, 16, 17, 33, 64, 65, 200, plan.CROSSOVER + 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("small_scales", [True, False])
def test_products_agree_with_float64(packed: tuple[Tensor, Tensor], m: int, dtype: torch.dtype, small_scales: bool):
    weight = dequantize(*packed, torch.float64)
    x, grad = torch.randn(m, K, device="cuda").to(dtype), torch.randn(m, N, device="cuda").to(dtype)
    before = torch.randn(m, N, device="cuda").to(dtype)
    expected = x.double() @ weight.T
    tolerance = 4 * torch.finfo(torch.bfloat16).eps if dtype == torch.bfloat16 else 2e-3  # float32 products may be TF32
    assert relative_error(mxfp4_product(x, *packed, small_scales=small_scales), expected) < tolerance
    added = mxfp4_product(x, *packed, out=before.clone(), beta=1, small_scales=small_scales)
    assert relative_error(added, expected + before.double()) < tolerance
    assert relative_error(mxfp4_product_dx(grad, *packed), grad.double() @ weight) < tolerance


@pytest.mark.parametrize("k", [32, 96, 160])
def test_few_tokens_meet_weights_of_any_width(k: int):
    packed = tuple(tensor.cuda() for tensor in quantize(torch.randn(48, k)))
    x = torch.randn(5, k, device="cuda", dtype=torch.bfloat16)
    assert relative_error(mxfp4_product(x, *packed), x.double() @ dequantize(*packed, torch.float64).T) < 0.02


@pytest.mark.parametrize("m", [4, 300])
def test_a_compiled_layer_computes_what_the_layer_does(m: int):
    model = nn.Sequential(MXFP4Linear.from_linear(nn.Linear(K, N)), nn.GELU()).cuda()
    compiled = torch.compile(model, fullgraph=True)
    results: list[Tensor] = []
    x = torch.randn(m, K, device="cuda")
    for module in (model, compiled):
        leaf = x.clone().requires_grad_()
        module(leaf).square().sum().backward()
        assert leaf.grad is not None
        results.append(leaf.grad)
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("m", [8, 300])
def test_a_cuda_graph_replays_the_product(packed: tuple[Tensor, Tensor], m: int):
    x = torch.randn(m, K, device="cuda", dtype=torch.bfloat16)
    mxfp4_product(x, *packed)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = mxfp4_product(x, *packed)
    x.normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, mxfp4_product(x, *packed))


@pytest.mark.parametrize("m", [1, 9, 16])
def test_products_that_begin_early_read_what_the_kernels_before_them_wrote(m: int):
    weights = 0.02 * torch.randn(6, 4096, 4096, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(m, 4096, dtype=torch.bfloat16, device="cuda")

    def chain(wait: Callable[[], None]) -> list[Tensor]:
        results = [x]
        for weight in weights:
            pair = quantize_unchecked(weight)  # where the pair before was
            for _ in range(3):
                wait()
                results.append(mxfp4_product(results[-1], *pair))
            wait()
            results.append(2 * results[-1])
        return results[1:]

    expected = chain(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = chain(lambda: None)
    for _ in range(30):
        for result in results:
            result.zero_()
        graph.replay()
        assert all(map(torch.equal, results, expected))


def test_equal_inputs_give_equal_bits(packed: tuple[Tensor, Tensor]):
    x = torch.randn(16, K, device="cuda", dtype=torch.bfloat16)
    first = mxfp4_product(x, *packed)
    assert all(torch.equal(mxfp4_product(x, *packed), first) for _ in range(20))


def test_between_the_passes_no_decoded_weight_is_held():
    layer = MXFP4Linear.from_linear(nn.Linear(4096, 4096, bias=False)).cuda()
    x = torch.randn(128, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = layer(x)
    held = torch.cuda.memory_allocated() - before
    assert held < 2 * y.numel() * y.element_size()
    y.sum().backward()


def test_fake_quantisation_trains_on_the_bytes_of_the_master():
    master = torch.randn(N, K, device="cuda", requires_grad=True)
    x = torch.randn(70, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = fake_quantize_linear(x, master)
    y.sum().backward()
    weight = dequantize(*quantize_unchecked(master.detach()), torch.float64)
    assert x.grad is not None
    assert master.grad is not None
    ones = torch.ones_like(y).double()
    assert relative_error(y, x.detach().double() @ weight.T) < 0.02
    assert relative_error(x.grad, ones @ weight) < 0.02
    assert relative_error(master.grad, ones.T @ x.detach().double()) < 0.02
