"""Models in MXFP4 for tests."""

import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file


def quantize_folder(source: Path, folder: Path, *modules: str) -> Path:
    """The model at `source` in MXFP4 at `folder`, by the command that `rl` uses; all its linear layers, or those named."""
    from turnwise.config.trainer import LINEAR_LAYERS

    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "turnwise.kernels.quantized.export", str(source), str(folder)]
    subprocess.run([*command, "--modules", *(modules or LINEAR_LAYERS)], check=True, capture_output=True, text=True)
    return folder


def swap_nibbles(folder: Path) -> None:
    """Plant the fault of a packing that puts the even input into the upper nibble."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("weight_packed"):
            tensors[name] = (tensor << 4) | (tensor >> 4)
    save_file(tensors, path, metadata={"format": "pt"})
