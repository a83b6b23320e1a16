"""How MXFP4 weights lie in a model folder. Reads no tensors, and loads neither torch nor transformers.

compressed-tensors, `mxfp4-pack-quantized`: for each quantised linear layer NAME.weight_packed uint8 [N, K/2] and
NAME.weight_scale uint8 [N, K/32], and a `quantization_config` in config.json, by which vLLM loads them. gpt-oss: NAME_blocks
[N, K/32, 16], which are the same bytes, and NAME_scales [N, K/32], where NAME may end in ".weight".
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
REPORT = "mxfp4.json"  # beside the weights: what was quantised, how, and with what error
FORMAT = "mxfp4-pack-quantized"
PACKED, SCALE = ".weight_packed", ".weight_scale"
BLOCKS, SCALES = "_blocks", "_scales"
OUTPUT_LAYER = "lm_head"


class LayoutError(ValueError):
    """A model folder that cannot be used. The message is complete."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder; {} without one."""
    path = folder / CONFIG
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def is_packed(folder: Path) -> bool:
    """Whether config.json of a folder says that its weights are compressed-tensors' MXFP4.

    Raises:
        LayoutError: they are quantised by compressed-tensors in another way.
    """
    found: dict[str, Any] = read_config(folder).get("quantization_config") or {}
    if found.get("quant_method") != "compressed-tensors":
        return False
    groups: dict[str, dict[str, Any]] = found.get("config_groups") or {}
    formats = {str(table["format"]) for table in (found, *groups.values()) if table.get("format")}
    if formats != {FORMAT}:
        raise LayoutError(f"{folder} holds weights in the compressed-tensors format {sorted(formats)}; only {FORMAT} is known")
    return True


def quantization_config(ignore: Sequence[str]) -> dict[str, Any]:
    """The table for config.json by which vLLM loads the weights; `ignore` names the linear layers that keep their type."""
    weights = {
        "num_bits": 4,
        "type": "float",
        "strategy": "group",
        "symmetric": True,
        "dynamic": False,
        "group_size": 32,
        "scale_dtype": "torch.uint8",
        "zp_dtype": "torch.uint8",
    }
    group = {"targets": ["Linear"], "format": FORMAT, "input_activations": None, "output_activations": None, "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "ignore": list(ignore),
        "config_groups": {"group_0": group},
    }


def write_index(folder: Path, places: Mapping[str, str], total: int) -> None:
    """The index of weights in several files.

    Args:
        places: tensor -> file.
        total: bytes of all tensors.
    """
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, in order.

    Raises:
        LayoutError: there are none, or one that the index names is missing.
    """
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise LayoutError(f"{folder} lacks {', '.join(missing[:3])}, which its index names; the download may be incomplete")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise LayoutError(
            f"{folder} has no *.safetensors, the form in which weights are quantised; save the model with transformers"
        )
    return files


def packed_layers(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Quantised linear layers among the tensor names of a folder: layer -> names of its codes and of its scales.

    Raises:
        LayoutError: codes without scales.
    """
    known = set(names)
    found: dict[str, tuple[str, str]] = {}
    for name in sorted(known):
        if name.endswith(PACKED):
            layer, scale = name.removesuffix(PACKED), name.removesuffix(PACKED) + SCALE
        elif name.endswith(BLOCKS):
            stem = name.removesuffix(BLOCKS)
            layer, scale = stem.removesuffix(".weight"), stem + SCALES
        else:
            continue
        if scale not in known:
            raise LayoutError(f"{name} is there without {scale}: the weights are incomplete")
        found[layer] = (name, scale)
    return found
