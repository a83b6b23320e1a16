"""MXFP4 in the trainer: a packed base under adapters, or fake quantisation of weights that train.

Trainer and engines must compute with the same values. Under LoRA both load the bytes of one folder. When all parameters train,
the forward pass quantises each weight in the type in which the policy computes, and so does publication: quantised from float32
masters instead, weights near a threshold would come out differently.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from turnwise.config import QuantConfig
from turnwise.kernels.mxfp4.errors import ErrorReport, error_report
from turnwise.kernels.mxfp4.fake import fake_quantize_linear
from turnwise.kernels.mxfp4.format import BLOCK, ScaleMode
from turnwise.kernels.mxfp4.layer import MXFP4Linear
from turnwise.kernels.mxfp4.ops import dequantize, quantize, quantize_unchecked
from turnwise.kernels.quantized.report import Report, no_layers


class FakeQuantLinear(nn.Linear):
    """A linear layer that computes with the MXFP4 values of its weight, and trains the weight behind them."""

    scale_mode: ScaleMode

    @classmethod
    def of(cls, linear: nn.Linear, scale_mode: ScaleMode) -> "FakeQuantLinear":
        """A layer with the parameters of `linear`."""
        layer = cls(linear.in_features, linear.out_features, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.scale_mode = scale_mode
        return layer

    def forward(self, input: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return fake_quantize_linear(input, self.weight, self.bias, scale_mode=self.scale_mode)


@dataclass(frozen=True)
class FakeQuant:
    """Which of a model's parameters are quantised whenever they are used."""

    scale_mode: ScaleMode
    names: frozenset[str]  # of weights, as in the model
    report: Report

    def served(self, name: str, tensor: Tensor) -> Tensor:
        """What the policy computes with, for a whole parameter in its type; the same tensor where it is not quantised.

        Where a weight is not finite, its block is NaN.
        """
        if name not in self.names:
            return tensor
        return dequantize(*quantize_unchecked(tensor, self.scale_mode), tensor.dtype)


def pack_linears(model: nn.Module, quant: QuantConfig) -> Report:
    """Replace the linear layers named in `quant` by packed ones, in place, where their weights are.

    Raises:
        ValueError: a name matches no layer that can be quantised, or a weight is not finite.
    """

    def pack(linear: nn.Linear) -> tuple[nn.Module, ErrorReport]:
        layer = MXFP4Linear.from_linear(linear, quant.scale_mode)
        return layer, error_report(linear.weight.detach(), layer.weight_packed, layer.weight_scale)

    return Report(quant.scale_mode, *_replace(model, quant, pack))


def train_quantised(model: nn.Module, quant: QuantConfig, dtype: torch.dtype) -> FakeQuant:
    """Have the linear layers named in `quant` compute with quantised weights, in place; parameters and their names stay.

    Args:
        dtype: in which the policy computes.

    Raises:
        ValueError: as `pack_linears`.
    """

    def replace(linear: nn.Linear) -> tuple[nn.Module, ErrorReport]:
        weight = linear.weight.detach().to(dtype)
        error = error_report(weight, *quantize(weight, scale_mode=quant.scale_mode))
        return FakeQuantLinear.of(linear, quant.scale_mode), error

    report = Report(quant.scale_mode, *_replace(model, quant, replace))
    return FakeQuant(quant.scale_mode, frozenset(f"{name}.weight" for name in report.errors), report)


def round_weights(model: nn.Module, quant: QuantConfig) -> None:
    """Give the linear layers named in `quant` the values of their quantised weights, in place: for a frozen policy.

    Raises:
        ValueError: as `pack_linears`.
    """

    def round_one(linear: nn.Linear) -> tuple[nn.Module, ErrorReport]:
        weight = linear.weight.detach()
        packed, scales = quantize(weight, scale_mode=quant.scale_mode)
        error = error_report(weight, packed, scales)
        weight.copy_(dequantize(packed, scales, weight.dtype))
        return linear, error

    _replace(model, quant, round_one)


def _replace(
    model: nn.Module, quant: QuantConfig, make: Callable[[nn.Linear], tuple[nn.Module, ErrorReport]]
) -> tuple[dict[str, ErrorReport], list[str], list[str]]:
    """Put what `make` gives into the places of the layers named in `quant`; the fields of a report."""
    errors: dict[str, ErrorReport] = {}
    plain: list[str] = []
    for name, linear in [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]:
        parent, _, attribute = name.rpartition(".")
        if attribute not in quant.target_modules or linear.in_features % BLOCK:
            plain.append(name)
            continue
        layer, errors[name] = make(linear)
        setattr(model.get_submodule(parent), attribute, layer)
    known = {name.rpartition(".")[2] for name in (*errors, *plain)}
    missing = sorted(set(quant.target_modules) - known)
    if missing or not errors:
        raise ValueError(no_layers(missing or quant.target_modules, "this model", sorted(known)))
    return errors, [], plain
