"""Write a model folder anew with its linear layers in MXFP4, as compressed-tensors lays it out. Run in a process of its own:

python -m turnwise.kernels.quantized.export SOURCE FOLDER --scale-mode even --modules q_proj k_proj ...

Layers that are MXFP4 already, in the layout of gpt-oss, keep their bytes. One file of weights is in memory at a time.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from turnwise.kernels.mxfp4.errors import ErrorReport, error_report
from turnwise.kernels.mxfp4.format import BLOCK, ScaleMode, check_scale_mode
from turnwise.kernels.mxfp4.ops import quantize
from turnwise.kernels.quantized.layout import (
    CONFIG,
    INDEX,
    OUTPUT_LAYER,
    PACKED,
    REPORT,
    SCALE,
    LayoutError,
    quantization_config,
    read_config,
    write_index,
)
from turnwise.kernels.quantized.report import Report, no_layers, write_report
from turnwise.kernels.quantized.tensors import FolderTensors, open_tensors

NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
EMBEDDINGS = ("embed", "wte", "wpe")  # in the last part of a name: tables, which are matrices, too


@dataclass
class _Export:
    """What was found so far."""

    scale_mode: ScaleMode
    targets: frozenset[str]
    device: torch.device
    errors: dict[str, ErrorReport] = field(default_factory=dict[str, ErrorReport])
    reused: list[str] = field(default_factory=list[str])
    plain: list[str] = field(default_factory=list[str])  # linear layers that keep their type
    places: dict[str, str] = field(default_factory=dict[str, str])  # tensor -> file
    total: int = 0  # bytes written


def export(
    source: Path,
    folder: Path,
    *,
    scale_mode: ScaleMode,
    target_modules: Sequence[str],
    device: torch.device | None = None,
    progress: Callable[[str], None] = print,
) -> Report:
    """Fill `folder` with the model in `source`, its layers named in `target_modules` in MXFP4; other tensors stay as they are.

    A layer whose input dimension is no multiple of 32 keeps its type, too. The bytes depend on the weights and the scale mode
    alone, not on the device.

    Raises:
        LayoutError: the weights cannot be read or quantised, or a name matches no linear layer.
        OSError: the file system refused.
    """
    state = _Export(scale_mode, frozenset(target_modules), device or torch.device("cpu"))
    with open_tensors(source) as tensors:
        for number, (file, names) in enumerate(tensors.files.items(), start=1):
            converted = _convert_file(names, tensors, state)
            save_file(converted, folder / file, metadata={"format": "pt"})
            state.places |= dict.fromkeys(converted, file)
            state.total += sum(tensor.nbytes for tensor in converted.values())
            progress(f"quantised {len(state.errors)} layers, file {number} of {len(tensors.files)}")
    _check_found(source, state)
    _write_rest(source, folder, state, several=len(set(state.places.values())) > 1)
    report = Report(scale_mode, state.errors, state.reused, state.plain)
    write_report(report, folder / REPORT)
    return report


def export_shape(source: Path, folder: Path) -> None:
    """Configuration and tokenizer alone, for an engine that draws its weights at random."""
    _copy_others(source, folder)
    _write_config(source, folder, ignore=[OUTPUT_LAYER])


def _convert_file(names: Sequence[str], tensors: FolderTensors, state: _Export) -> dict[str, Tensor]:
    """What becomes of the tensors of one file; bytes that are there already stay where their codes are."""
    written: dict[str, Tensor] = {}
    inside = set(names)
    for layer, (codes, _) in tensors.layers.items():
        if codes in inside:
            packed, scales = tensors.packed(layer)
            written |= {f"{layer}{PACKED}": packed.contiguous(), f"{layer}{SCALE}": scales}
            state.reused.append(layer)
    for name in tensors.others:
        if name in inside:
            written |= _convert(name, tensors.get(name), state)
    return written


def _convert(name: str, tensor: Tensor, state: _Export) -> dict[str, Tensor]:
    layer, _, kind = name.rpartition(".")
    last = layer.rpartition(".")[2]
    is_linear = kind == "weight" and tensor.ndim == 2 and not any(word in last for word in EMBEDDINGS)
    if not is_linear:
        return {name: tensor}
    if last not in state.targets or tensor.shape[1] % BLOCK:
        state.plain.append(layer)
        return {name: tensor}
    weight = tensor.to(state.device)
    try:
        packed, scales = quantize(weight, scale_mode=state.scale_mode)
    except ValueError as error:
        raise LayoutError(f"{name}: {error}") from error
    state.errors[layer] = error_report(weight, packed, scales)
    return {f"{layer}{PACKED}": packed.cpu(), f"{layer}{SCALE}": scales.cpu()}


def _check_found(source: Path, state: _Export) -> None:
    known = {layer.rpartition(".")[2] for layer in (*state.errors, *state.reused, *state.plain)}
    missing = sorted(state.targets - known)
    if (missing or not state.errors) and not state.reused:
        raise LayoutError(no_layers(missing or sorted(state.targets), str(source), sorted(known)))


def _write_rest(source: Path, folder: Path, state: _Export, *, several: bool) -> None:
    _copy_others(source, folder)
    _write_config(source, folder, ignore=[OUTPUT_LAYER, *(layer for layer in state.plain if layer != OUTPUT_LAYER)])
    if several:
        write_index(folder, state.places, state.total)


def _write_config(source: Path, folder: Path, *, ignore: Sequence[str]) -> None:
    config: Mapping[str, Any] = {**read_config(source), "quantization_config": quantization_config(ignore)}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _copy_others(source: Path, folder: Path) -> None:
    """Tokenizer, templates, generation settings, code: all small files but those of weights."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix not in NOT_COPIED and path.name not in (CONFIG, INDEX):
            shutil.copyfile(path, folder / path.name)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m turnwise.kernels.quantized.export", description=__doc__)
    parser.add_argument("source", type=Path, help="model folder in Hugging Face form")
    parser.add_argument("folder", type=Path, help="where to write; it exists and is empty")
    parser.add_argument("--scale-mode", type=check_scale_mode, default="even")
    parser.add_argument("--modules", nargs="+", default=[], help="names of the linear layers")
    parser.add_argument("--shape-only", action="store_true", help="configuration and tokenizer, without weights")
    arguments = parser.parse_args()
    try:
        if arguments.shape_only:
            export_shape(arguments.source, arguments.folder)
            return 0
        export(
            arguments.source,
            arguments.folder,
            scale_mode=arguments.scale_mode,
            target_modules=arguments.modules,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
            progress=lambda line: print(line, flush=True),
        )
    except (LayoutError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
