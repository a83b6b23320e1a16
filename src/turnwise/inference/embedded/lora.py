"""LoRA adapters beside the base weights: loaded from PEFT folders, never merged, several versions in one batch.

Unmerged products keep the adapter's float32 precision over a bfloat16 base (merging would round small updates away), cost
no repacking when a version arrives, and let sequences of different versions share one pass over the base weights: the A
matrices of all versions in use stand side by side, and a row's products with other versions' A are multiplied by zero.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

Kind = Literal["qkv", "o", "gate_up", "down"]
PARTS: Mapping[Kind, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
PREFIX = "base_model.model.model.layers"


class AdapterError(ValueError):
    """An adapter that cannot be served; the engine is as it was before."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """One loaded version: its tensors under their PEFT names, as in the file."""

    tensors: Mapping[str, Tensor]
    rank: int
    scaling: float  # factor of B(A(x))


@dataclass(frozen=True)
class Projections:
    """Sizes of the linear layers that may carry an adapter: `sizes[module] = (outputs, inputs)`."""

    layers: int
    sizes: Mapping[str, tuple[int, int]]


def read_config(folder: Path) -> dict[str, Any]:
    """`adapter_config.json` of a PEFT folder.

    Raises:
        AdapterError: no such file, or not JSON, or a kind of adapter that is not served.
    """
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise AdapterError(f"No adapter found: {path} does not exist.") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type = {config.get('peft_type')!r}; only LORA is served.")
    for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias"):
        if config.get(key):
            raise AdapterError(f"{path}: {key} = {config[key]!r} is not supported; train without it.")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{path}: bias = {config['bias']!r} is not supported; use 'none'.")
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """`adapter_model.safetensors` of a PEFT folder, types as stored.

    Raises:
        AdapterError: no such file, or a damaged one, or one with a value that is not finite. That would be in the logits of every
            sequence of a step, those under other adapters too: 0 times NaN is NaN.
    """
    path = folder / "adapter_model.safetensors"
    if not path.exists():
        raise AdapterError(f"No adapter found: {path} does not exist.")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise AdapterError(
            f"{path}: {len(broken)} of {len(tensors)} tensors hold NaN or infinity, the first is {broken[0]}: the policy has "
            "diverged; see actor/grad_norm and actor/loss in metrics.jsonl, and start again with a lower trainer.optim.lr."
        )
    return tensors


def load_adapter(folder: Path, projections: Projections) -> Adapter:
    """Read and check a PEFT folder.

    Raises:
        AdapterError: missing or damaged file, unknown tensor names, wrong shapes, an A without its B.
    """
    config = read_config(folder)
    tensors = read_tensors(folder)
    rank = int(config["r"])
    expected = _expected(projections, rank)
    unknown = sorted(set(tensors) - set(expected))
    if unknown:
        raise AdapterError(f"{folder}: {len(unknown)} tensors belong to no layer of this model, the first is {unknown[0]}.")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise AdapterError(f"{folder}: {name} has shape {tuple(tensor.shape)}, expected {expected[name]}.")
        partner = name.replace("lora_A", "lora_B") if "lora_A" in name else name.replace("lora_B", "lora_A")
        if partner not in tensors:
            raise AdapterError(f"{folder}: {name} is there without {partner}.")
    if not tensors:
        raise AdapterError(f"{folder}: adapter_model.safetensors holds no tensors.")
    scaling = float(config["lora_alpha"]) / (rank**0.5 if config.get("use_rslora") else rank)
    return Adapter(tensors, rank, scaling)


class LoraMix:
    """The adapters of one batch: for each token the one that its sequence uses, or none."""

    def __init__(self, stacks: "LoraStacks", choice: Tensor) -> None:
        self._layers = stacks.layers
        self._masks = {kind: table[choice] for kind, table in stacks.masks.items()}

    def add(self, layer: int, kind: Kind, x: Tensor, out: Tensor) -> Tensor:
        """`out` [T, outputs] plus the update for input `x` [T, inputs], in the type of `out`, which is overwritten."""
        pair = self._layers[layer].get(kind)
        if pair is None:
            return out
        a, b = pair
        update = torch.mm(x.float(), a).mul_(self._masks[kind])
        if out.dtype == torch.float32:
            return out.addmm_(update, b)
        return out.float().addmm_(update, b).to(out.dtype)


class LoraStacks:
    """Matrices of several adapters side by side.

    `layers[i][kind] = (A [inputs, R], B [R, outputs])` with R the ranks of all parts of all adapters;
    `masks[kind][adapter]` is that adapter's scaling in its own columns and 0 in the others; its last row is all 0.
    """

    def __init__(self, adapters: Sequence[Adapter], projections: Projections) -> None:
        self.layers: list[dict[Kind, tuple[Tensor, Tensor]]] = [{} for _ in range(projections.layers)]
        self.masks: dict[Kind, Tensor] = {}
        for kind, parts in PARTS.items():
            self.masks[kind] = _mask(adapters, len(parts))
            for index, layer in enumerate(self.layers):
                pair = _stack(adapters, index, parts, projections)
                if pair is not None:
                    layer[kind] = pair

    def tensors(self, adapter: Adapter, projections: Projections) -> dict[str, Tensor]:
        """The adapter's tensors, cut out of the stacks of it alone under their PEFT names, in the types of the file."""
        found: dict[str, Tensor] = {}
        for name, loaded in adapter.tensors.items():
            layer, module = name.removeprefix(f"{PREFIX}.").split(".lora_")[0].split(".", 1)
            kind: Kind = next(kind for kind, parts in PARTS.items() if module in parts)
            part = PARTS[kind].index(module)
            a, b = self.layers[int(layer)][kind]
            rows = slice(part * adapter.rank, (part + 1) * adapter.rank)
            start = sum(projections.sizes[other][0] for other in PARTS[kind][:part])
            tensor = a[:, rows].T if "lora_A" in name else b[rows, start : start + projections.sizes[module][0]].T
            found[name] = tensor.to(loaded.dtype)
        return found


def _expected(projections: Projections, rank: int) -> dict[str, tuple[int, int]]:
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(projections.layers):
        for module, (outputs, inputs) in projections.sizes.items():
            shapes[f"{PREFIX}.{layer}.{module}.lora_A.weight"] = (rank, inputs)
            shapes[f"{PREFIX}.{layer}.{module}.lora_B.weight"] = (outputs, rank)
    return shapes


def _mask(adapters: Sequence[Adapter], parts: int) -> Tensor:
    widths = [parts * adapter.rank for adapter in adapters]
    mask = torch.zeros(len(adapters) + 1, sum(widths))
    for row, (adapter, width) in enumerate(zip(adapters, widths, strict=True)):
        start = sum(widths[:row])
        mask[row, start : start + width] = adapter.scaling
    return mask


def _stack(
    adapters: Sequence[Adapter], layer: int, parts: Sequence[str], projections: Projections
) -> tuple[Tensor, Tensor] | None:
    names = [f"{PREFIX}.{layer}.{part}" for part in parts]
    if not any(f"{name}.lora_A.weight" in adapter.tensors for adapter in adapters for name in names):
        return None
    outputs = [projections.sizes[part][0] for part in parts]
    total = sum(len(parts) * adapter.rank for adapter in adapters)
    a = torch.zeros(projections.sizes[parts[0]][1], total)
    b = torch.zeros(total, sum(outputs))
    column = 0
    for adapter in adapters:
        for part, name in enumerate(names):
            if f"{name}.lora_A.weight" in adapter.tensors:
                start = sum(outputs[:part])
                a[:, column : column + adapter.rank] = adapter.tensors[f"{name}.lora_A.weight"].float().T
                update = adapter.tensors[f"{name}.lora_B.weight"].float()
                b[column : column + adapter.rank, start : start + outputs[part]] = update.T
            column += adapter.rank
    return a, b
