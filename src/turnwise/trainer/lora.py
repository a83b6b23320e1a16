"""LoRA under PEFT's names and file format."""

import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from turnwise.config import LoraConfig
from turnwise.trainer.lora_layer import LINEAR, LoraLinear, SharedInput

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PEFT_PREFIX = "base_model.model."
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that read the same input, as transformers names them."""


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
    for module in model.modules():
        _share_inputs(module)
    return model


def _share_inputs(module: nn.Module) -> None:
    for names in SIBLINGS:
        layers = [layer for name in names if isinstance(layer := getattr(module, name, None), LoraLinear)]
        if len(layers) > 1:
            SharedInput(layers)


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
