"""A linear layer with a frozen MXFP4 weight."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Self

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from turnwise.kernels import onednn
from turnwise.kernels.mxfp4.backends import aligned
from turnwise.kernels.mxfp4.format import BLOCK, ScaleMode, check_operand, check_packed
from turnwise.kernels.mxfp4.ops import dequantize, mxfp4_product, quantize

LARGEST_SMALL_SCALE = 128  # scale byte of 2, the bound of `small_scales`


class MXFP4Linear(nn.Module):
    """y = x W^T + bias, with W [out, in] as codes `weight_packed` and scales `weight_scale`, the names of compressed-tensors.

    W has no gradient, and backward decodes it again: between the passes autograd holds the packed bytes, which the layer holds
    anyway. They are buffers, so FSDP2 leaves them whole on every rank (its version in torch 2.11 refuses uint8 parameters), and
    `module.to(dtype)` leaves them as they are. The bias is a frozen parameter. The output has the dtype of the input.
    """

    weight_packed: UInt8[Tensor, "out half_in"]
    weight_scale: UInt8[Tensor, "out blocks"]
    bias: nn.Parameter | None

    def __init__(
        self, packed: UInt8[Tensor, "out _"], scales: UInt8[Tensor, "out blocks"], bias: Float[Tensor, " out"] | None = None
    ) -> None:
        """A layer of codes and scales, which it takes without a copy where they are contiguous and aligned.

        Args:
            packed: [out, in / 2], or [out, in / 32, 16] as in gpt-oss.

        Raises:
            ValueError: the tensors do not fit together.
        """
        super().__init__()
        packed = packed.flatten(1)
        check_packed(packed, scales)
        self.register_buffer("weight_packed", aligned(packed))
        self.register_buffer("weight_scale", aligned(scales))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._decoded: dict[torch.dtype, Tensor] | None = None
        self.inspect_scales()

    @classmethod
    def from_linear(cls, linear: nn.Linear, scale_mode: ScaleMode = "even") -> Self:
        """Quantise a linear layer, on the device where its weight is.

        Raises:
            ValueError: its input dimension is no multiple of 32, or its weight is not finite.
        """
        packed, scales = quantize(linear.weight.detach(), scale_mode=scale_mode)
        return cls(packed, scales, linear.bias)

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Self:
        """A layer whose weights are not set, for `load_state_dict`; on the meta device with `assign=True`.

        Args:
            dtype: that of the bias.

        Raises:
            ValueError: `in_features` is not a multiple of 32.
        """
        if in_features % BLOCK:
            raise ValueError(f"in_features = {in_features} is not a multiple of {BLOCK}; leave this layer in bfloat16")
        packed = torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=device)
        scales = torch.empty(out_features, in_features // BLOCK, dtype=torch.uint8, device=device)
        return cls(packed, scales, torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    @property
    def in_features(self) -> int:
        return self.weight_packed.shape[1] * 2

    @property
    def out_features(self) -> int:
        return self.weight_packed.shape[0]

    def inspect_scales(self) -> None:
        """Look whether all scales are at most 2, for which the kernel for few tokens is faster. Waits for the device.

        Done by the constructor and by `load_state_dict`; needed only after writing `weight_scale` in place.
        """
        known = self.weight_scale.device.type != "meta"
        self._small_scales = known and not bool((self.weight_scale > LARGEST_SMALL_SCALE).any())

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if self._decoded is None:
            y = mxfp4_product(x, self.weight_packed, self.weight_scale, small_scales=self._small_scales)
        else:
            check_operand(x, self.in_features, "x", "the weight's K")
            y = _FrozenProduct.apply(x, self._held(x.dtype, self._decoded))
        return y if self.bias is None else y + self.bias

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Float[Tensor, "out in"]:
        """The weight's values."""
        return dequantize(self.weight_packed, self.weight_scale, dtype)

    def hold_decoded(self, hold: bool) -> None:
        """Whether to decode once and keep the values until told otherwise; see `decoded_once`."""
        self._decoded = {} if hold else None

    def _held(self, dtype: torch.dtype, held: dict[torch.dtype, Tensor]) -> Tensor:
        if dtype not in held:
            held[dtype] = self.dequantize(dtype)
        return held[dtype]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("weight_packed", "weight_scale"):
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.dtype != torch.uint8:
                raise ValueError(f"{prefix}{name} is {value.dtype} in this state dict; MXFP4 codes and scales are uint8")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.inspect_scales()
        self.hold_decoded(self._decoded is not None)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


@contextmanager
def decoded_once(module: nn.Module) -> Generator[None]:
    """Inside, every MXFP4 layer decodes its weight at its first use and keeps the values: 2 to 4 bytes a weight until the end.

    For CPUs, where decoding takes as long as the product of a few dozen tokens: around a training step, or an engine's life.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, MXFP4Linear)]
    for layer in layers:
        layer.hold_decoded(True)
    try:
        yield
    finally:
        for layer in layers:
            layer.hold_decoded(False)


class _FrozenProduct(torch.autograd.Function):
    """x W^T for a W without gradient; saves W, which its layer holds anyway, and not x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return onednn.product(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        grad = grads[0]
        grad_x = onednn.product(grad.reshape(-1, grad.shape[-1]), weight.T)
        return grad_x.view(*grad.shape[:-1], weight.shape[1]), None
