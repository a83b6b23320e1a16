"""Fake quantisation: the function of the quantised weight in both passes, its gradient on the master."""

import pytest
import torch
from torch import Tensor

from turnwise.kernels.mxfp4 import ScaleMode, dequantize, fake_quantize, fake_quantize_linear, quantize


def pair(dtype: torch.dtype, master_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 64).to(dtype).requires_grad_()
    return x, torch.randn(24, 64).to(master_dtype or dtype).requires_grad_()


@pytest.mark.parametrize("mode", ["even", "floor"])
def test_gradients_are_those_of_the_quantised_weight_in_float64(mode: ScaleMode):
    x, master = pair(torch.float64)
    y = fake_quantize_linear(x, master, scale_mode=mode)
    grad_y = torch.randn_like(y)
    grad_x, grad_master = torch.autograd.grad(y, (x, master), grad_y)
    quantised = dequantize(*quantize(master.detach(), scale_mode=mode), torch.float64)
    rows, inputs = grad_y.flatten(0, 1), x.detach().flatten(0, 1)
    torch.testing.assert_close(y.detach(), x.detach() @ quantised.T)
    torch.testing.assert_close(grad_x, grad_y @ quantised)
    torch.testing.assert_close(grad_master, rows.T @ inputs)
    wrong = grad_y @ master.detach()
    assert (grad_x - wrong).norm() > 0.05 * wrong.norm()  # the gradient through the master weight is another one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_near_float64(dtype: torch.dtype):
    x, master = pair(dtype)
    y = fake_quantize_linear(x, master)
    y.square().sum().backward()
    assert x.grad is not None
    assert master.grad is not None
    weight = dequantize(*quantize(master.detach()), torch.float64)
    expected = x.detach().double() @ weight.T
    expected_x, expected_w = 2 * expected @ weight, 2 * expected.flatten(0, 1).T @ x.detach().double().flatten(0, 1)
    for result, reference in ((y, expected), (x.grad, expected_x), (master.grad, expected_w)):
        assert result.dtype == dtype
        assert (result.double() - reference).norm() < 16 * torch.finfo(dtype).eps * reference.norm()


def test_a_float32_master_gets_a_float32_gradient_under_bfloat16_activations():
    x, master = pair(torch.bfloat16, torch.float32)
    y = fake_quantize_linear(x, master)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert master.grad is not None
    assert master.grad.dtype == torch.float32


def test_it_is_the_same_as_a_product_with_fake_quantised_values():
    x, master = pair(torch.float64)
    bias = torch.randn(24, dtype=torch.float64, requires_grad=True)
    fused = fake_quantize_linear(x, master, bias)
    plain = torch.nn.functional.linear(x, fake_quantize(master), bias)
    torch.testing.assert_close(fused, plain)
    wanted = torch.autograd.grad(plain.square().sum(), (x, master, bias))
    for result, expected in zip(torch.autograd.grad(fused.square().sum(), (x, master, bias)), wanted, strict=True):
        torch.testing.assert_close(result, expected)


def test_values_are_those_of_the_published_bytes():
    master = torch.randn(8, 64, requires_grad=True)
    assert torch.equal(fake_quantize(master).detach(), dequantize(*quantize(master.detach()), torch.float32))


@pytest.mark.parametrize(("needs_x", "needs_master"), [(True, False), (False, True)])
def test_only_wanted_gradients_are_computed(needs_x: bool, needs_master: bool):
    x, master = pair(torch.float32)
    x.requires_grad_(needs_x)
    master.requires_grad_(needs_master)
    fake_quantize_linear(x, master).sum().backward()
    assert (x.grad is not None, master.grad is not None) == (needs_x, needs_master)


def test_it_trains_a_weight_through_its_rounding():
    torch.manual_seed(0)
    target, x = torch.randn(8, 64), torch.randn(256, 64)
    master = torch.zeros(8, 64, requires_grad=True)
    optimiser = torch.optim.SGD([master], lr=0.2)
    losses: list[float] = []
    for _ in range(60):
        loss = (fake_quantize_linear(x, master) - x @ target.T).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.03 * losses[0]


def test_a_master_that_is_not_finite_shows():
    x, master = pair(torch.float32)
    with torch.no_grad():
        master[3, 40] = torch.inf
    y = fake_quantize_linear(x, master)
    assert y.isnan().any(0).any(0).nonzero().flatten().tolist() == [3]


def test_unknown_modes_and_odd_shapes_are_refused():
    x, master = pair(torch.float32)
    with pytest.raises(ValueError, match="scale_mode = 'nearest'"):
        fake_quantize_linear(x, master, scale_mode="nearest")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multiple of 32"):
        fake_quantize(torch.zeros(4, 40))


def test_a_compiled_graph_stays_whole():
    def step(x: Tensor, master: Tensor) -> Tensor:
        return fake_quantize_linear(x, master).square() + torch.nn.functional.linear(x, fake_quantize(master))

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    x, master = pair(torch.float32)
    wanted = torch.autograd.grad(step(x, master).sum(), (x, master))
    for result, expected in zip(torch.autograd.grad(compiled(x, master).sum(), (x, master)), wanted, strict=True):
        torch.testing.assert_close(result, expected)
