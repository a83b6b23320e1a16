"""The frozen layer: what it computes, what it keeps, what it loads."""

import copy

import pytest
import torch
from torch import Tensor, nn

from turnwise.kernels.mxfp4 import MXFP4Linear, decoded_once, dequantize, quantize


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 40)


def gradient(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    return y.detach(), grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradient_are_those_of_the_decoded_weight(linear: nn.Linear, dtype: torch.dtype):
    layer = MXFP4Linear.from_linear(linear.to(dtype))
    x = torch.randn(2, 7, 96).to(dtype)
    y, grad = gradient(layer, x)
    weight = layer.dequantize(torch.float64)
    expected = x.double() @ weight.T + linear.bias.double()
    assert y.dtype == dtype
    assert (y.double() - expected).norm() < 8 * torch.finfo(dtype).eps * expected.norm()
    expected_grad = 2 * expected @ weight
    assert (grad.double() - expected_grad).norm() < 16 * torch.finfo(dtype).eps * expected_grad.norm()


def test_nothing_of_it_is_trained(linear: nn.Linear):
    layer = MXFP4Linear.from_linear(linear)
    assert [name for name, parameter in layer.named_parameters() if parameter.requires_grad] == []
    assert {name: buffer.dtype for name, buffer in layer.named_buffers()} == {
        "weight_packed": torch.uint8,
        "weight_scale": torch.uint8,
    }


def test_a_change_of_dtype_leaves_the_bytes(linear: nn.Linear):
    layer = MXFP4Linear.from_linear(linear)
    before = layer.weight_packed.clone()
    layer.to(torch.bfloat16)
    assert layer.weight_scale.dtype == torch.uint8
    assert torch.equal(layer.weight_packed, before)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_state_dict_comes_back_as_it_was(linear: nn.Linear, device: str):
    layer = MXFP4Linear.from_linear(linear)
    state = layer.state_dict()
    assert sorted(state) == ["bias", "weight_packed", "weight_scale"]
    loaded = MXFP4Linear.empty(96, 40, bias=True, device=device, dtype=torch.float32)
    loaded.load_state_dict(copy.deepcopy(state), assign=device == "meta")
    x = torch.randn(3, 96)
    assert torch.equal(loaded(x), layer(x))


def test_weights_that_are_not_packed_are_not_loaded(linear: nn.Linear):
    layer = MXFP4Linear.from_linear(linear)
    state = layer.state_dict() | {"weight_packed": torch.zeros(40, 48)}
    with pytest.raises(ValueError, match=r"mlp.weight_packed is torch.float32 in this state dict"):
        nn.ModuleDict({"mlp": layer}).load_state_dict({f"mlp.{name}": value for name, value in state.items()})


def test_codes_in_the_layout_of_gpt_oss_are_taken_as_they_are(linear: nn.Linear):
    packed, scales = quantize(linear.weight.detach())
    layer = MXFP4Linear(packed.view(40, 3, 16), scales)
    assert layer.weight_packed.data_ptr() == packed.data_ptr()
    assert (layer.in_features, layer.out_features) == (96, 40)
    assert torch.equal(layer.dequantize(), dequantize(packed, scales))
    assert repr(layer) == "MXFP4Linear(in_features=96, out_features=40, bias=False)"


def test_codes_at_an_odd_address_are_moved(linear: nn.Linear):
    packed, scales = quantize(linear.weight.detach())
    file = torch.zeros(3 + packed.numel(), dtype=torch.uint8)
    file[3:] = packed.flatten()
    layer = MXFP4Linear(file[3:].view(packed.shape), scales)
    assert layer.weight_packed.data_ptr() % 16 == 0
    assert torch.equal(layer.weight_packed, packed)


def test_tensors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        MXFP4Linear(torch.zeros(4, 32, dtype=torch.uint8), torch.zeros(4, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="in_features = 48 is not a multiple of 32"):
        MXFP4Linear.empty(48, 4)
    with pytest.raises(ValueError, match="multiple of 32"):
        MXFP4Linear.from_linear(nn.Linear(48, 4))


def test_large_scales_are_noticed_wherever_they_come_from(linear: nn.Linear):
    small = MXFP4Linear.from_linear(linear)
    with torch.no_grad():
        linear.weight[3, 5] = 100.0  # a scale of 16
    large = MXFP4Linear.from_linear(linear)
    assert (small._small_scales, large._small_scales) == (True, False)
    small.load_state_dict(large.state_dict())
    assert small._small_scales is False
    assert MXFP4Linear.empty(96, 40, device="meta")._small_scales is False


def test_decoded_once_computes_the_same_and_decodes_once(linear: nn.Linear, monkeypatch: pytest.MonkeyPatch):
    model = nn.Sequential(MXFP4Linear.from_linear(linear))
    x = torch.randn(5, 96)
    plain = gradient(model, x)
    calls: list[torch.dtype] = []
    decode = MXFP4Linear.dequantize

    def counted(self: MXFP4Linear, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        calls.append(dtype)
        return decode(self, dtype)

    monkeypatch.setattr(MXFP4Linear, "dequantize", counted)
    with decoded_once(model):
        results = [gradient(model, x) for _ in range(3)]
        assert calls == [torch.float32]
    for y, grad in results:
        torch.testing.assert_close(y, plain[0])
        torch.testing.assert_close(grad, plain[1])
    model(x)
    assert calls == [torch.float32]
    assert model[0]._decoded is None


def test_new_weights_are_decoded_anew(linear: nn.Linear):
    layer = MXFP4Linear.from_linear(linear)
    other = MXFP4Linear.from_linear(nn.Linear(96, 40))
    x = torch.randn(5, 96)
    with decoded_once(layer):
        layer(x)
        layer.load_state_dict(other.state_dict())
        torch.testing.assert_close(layer(x), other(x))


def test_a_failure_inside_decoded_once_lets_go_of_the_values(linear: nn.Linear):
    layer = MXFP4Linear.from_linear(linear)
    with pytest.raises(ValueError, match="end in 96"), decoded_once(layer):
        layer(torch.randn(5, 64))
    assert layer._decoded is None


def test_the_held_values_are_all_that_backward_needs(linear: nn.Linear):
    layer = MXFP4Linear.from_linear(linear)
    x = torch.randn(5, 96, dtype=torch.float64, requires_grad=True)
    with decoded_once(layer):
        assert torch.autograd.gradcheck(lambda x: layer(x), (x,))


def test_a_compiled_model_stays_one_graph(linear: nn.Linear):
    model = nn.Sequential(MXFP4Linear.from_linear(linear), nn.GELU())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 96)
    for result, expected in zip(gradient(compiled, x), gradient(model, x), strict=True):
        torch.testing.assert_close(result, expected)
