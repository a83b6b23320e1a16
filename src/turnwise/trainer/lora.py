"""LoRA under PEFT's names and file format, with a linear layer of our own.

PEFT's layer computes the update in float32 and casts around it; over a bfloat16 base on a CPU that is a fifth of a step's time
(in float32 the two take the same). This one adds the update into the base's result in the base's type, as engines do, and keeps
float32 parameters. It holds fewer intermediate results, too. Tests compare it with PEFT, number by number.
"""

import json
import math
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from turnwise.config import LoraConfig
from turnwise.kernels.mxfp4.layer import MXFP4Linear
from turnwise.kernels.mxfp4.ops import mxfp4_product, mxfp4_product_dx
from turnwise.kernels.onednn import product

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."

LINEAR = (nn.Linear, MXFP4Linear)
Stored = tuple[Tensor, ...]  # a frozen W [out, in] as it lies in memory: itself, or its codes and its scale bytes


class LoraLinear(nn.Module):
    """y = x W^T + bias + scale * (x A^T) B^T, with W frozen, and plain or packed."""

    def __init__(self, base: nn.Linear | MXFP4Linear, config: LoraConfig) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = config.alpha / config.rank
        self.dropout = config.dropout
        self.enabled = True
        device = _stored(base)[0].device
        self.lora_A = nn.Parameter(torch.empty(config.rank, base.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, dtype=torch.float32, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # PEFT's default; B = 0 makes the first policy the base model

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if not self.enabled:
            return self.base(x)
        if self.dropout > 0 and self.training:
            low = linear(dropout(x, self.dropout), self.lora_A.to(x.dtype)) * self.scale
            return self.base(x) + linear(low, self.lora_B.to(x.dtype))
        y = _LoraUpdate.apply(x, self.lora_A, self.lora_B, self.scale, *_stored(self.base))
        return y if self.base.bias is None else y + self.base.bias  # pyright: ignore[reportUnnecessaryComparison, reportOptionalOperand]


class _LoraUpdate(torch.autograd.Function):
    """One node for base and update: nothing is saved but x and x A^T, and sums go into the matrix products.

    A packed W is decoded in the forward pass and again in the backward pass; in between, its bytes are all there is of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scale: float, *stored: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = product(rows, a.to(x.dtype)).mul_(scale)
        ctx.save_for_backward(rows, low, a, b, *stored)
        ctx.scale, ctx.shape = scale, x.shape
        return _with_base(rows, stored, low, b.to(x.dtype)).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, a, b, *stored = ctx.saved_tensors
        grad = grads[0].reshape(-1, grads[0].shape[-1])
        grad_low = product(grad, b.to(grad.dtype).T).mul_(ctx.scale)
        grad_b = (grad.T @ low).to(b.dtype)
        grad_a = (grad_low.T @ rows).to(a.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _with_base_dx(grad, tuple(stored), grad_low, a.to(grad.dtype)).view(ctx.shape)
        return grad_x, grad_a, grad_b, None, *(None for _ in stored)


def _stored(base: nn.Linear | MXFP4Linear) -> Stored:
    return (base.weight_packed, base.weight_scale) if isinstance(base, MXFP4Linear) else (base.weight,)


def _with_base(
    x: Float[Tensor, "rows in"], stored: Stored, low: Float[Tensor, "rows rank"], b: Float[Tensor, "out rank"]
) -> Float[Tensor, "rows out"]:
    """x W^T + low B^T."""
    if len(stored) == 2:
        return mxfp4_product(x, *stored, out=low @ b.T, beta=1)
    return _sum_of_products(x, stored[0], low, b)


def _with_base_dx(
    grad: Float[Tensor, "rows out"], stored: Stored, low: Float[Tensor, "rows rank"], a: Float[Tensor, "rank in"]
) -> Float[Tensor, "rows in"]:
    """grad W + low A."""
    if len(stored) == 2:
        return mxfp4_product_dx(grad, *stored, out=low @ a, beta=1)
    return _sum_of_products(grad, stored[0].T, low, a.T)


def _sum_of_products(
    wide: Float[Tensor, "rows in"], weight: Float[Tensor, "out in"], low: Float[Tensor, "rows rank"], b: Float[Tensor, "out rank"]
) -> Float[Tensor, "rows out"]:
    """wide W^T + low B^T. On a GPU the small product goes first: the large one adds onto it as it writes."""
    if wide.is_cuda:
        return (low @ b.T).addmm_(wide, weight.T)
    return product(wide, weight).addmm_(low, b.T)


def add_lora(model: nn.Module, config: LoraConfig, *, seed: int) -> nn.Module:
    """Freeze `model` and give each linear layer named in `target_modules` an adapter, in place; A is drawn from `seed`.

    Raises:
        ValueError: a name matches no linear layer of the model.
    """
    model.requires_grad_(False)
    targets = set(config.target_modules)
    found = [(name, module) for name, module in model.named_modules() if name.rpartition(".")[2] in targets]
    linears = [(name, module) for name, module in found if isinstance(module, LINEAR)]
    missing = targets - {name.rpartition(".")[2] for name, _ in linears}
    if missing:
        known = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LINEAR)})
        raise ValueError(
            f"trainer.model.lora.target_modules names {sorted(missing)}, which are no linear layers of this model; "
            f"it has {', '.join(known)}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in linears:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, LoraLinear(module, config))
    return model


@contextmanager
def adapters_off(model: nn.Module) -> Generator[None]:
    """Run the base model alone: the reference policy."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def peft_name(parameter: str) -> str:
    """`model.layers.0.mlp.up_proj.lora_A` as PEFT writes it."""
    return f"{PEFT_PREFIX}{parameter}.weight"


def lora_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Adapter parameters under PEFT's names."""
    for name, parameter in model.named_parameters():
        if name.endswith((".lora_A", ".lora_B")):
            yield peft_name(name), parameter


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], config: LoraConfig, base_model: str) -> None:
    """Write an adapter that `PeftModel.from_pretrained` and vLLM read."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / ADAPTER_FILE, metadata={"format": "pt"})
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": sorted(config.target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
