"""A model folder with random weights in MXFP4, laid out as `rl` leaves quantised models: what engines load, of any shape.

vLLM's `dummy` weights would not do: its random numbers are floats, and scale bytes that nobody wrote are any power of two or NaN.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from _shapes import SHAPES, linear_sizes, write_model_folder
from turnwise.kernels.mxfp4.format import BLOCK
from turnwise.kernels.quantized.layout import CONFIG, OUTPUT_LAYER, PACKED, SCALE, quantization_config, write_index

STD = 0.02  # of embeddings
SCALE_BYTES = (120, 120, 119)  # 2^-7 and 2^-8: with codes of root mean square 2.93, weights of standard deviation 0.0198
LAYERS_A_FILE = 6  # 0.3 GB of Qwen3-4B, so that no more than that is in memory at a time


def write_packed_folder(folder: Path, shape: str, *, seed: int = 0) -> Path:
    """Configuration, tokenizer and weights: random codes, norms of 1, the rest bfloat16 from N(0, 0.02). 2.7 GB for Qwen3-4B.

    The numbers are drawn on the CPU, since a process that has touched a GPU holds memory there, which the engine would lack.
    """
    write_model_folder(folder, shape)
    config = {**SHAPES[shape], "quantization_config": quantization_config([OUTPUT_LAYER])}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    files = list(_files(config))
    random, places, total = np.random.default_rng(seed), dict[str, str](), 0
    for number, layers in enumerate(files, start=1):
        tensors = _outer(config, random) if layers is None else _layers(config, layers, random)
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    write_index(folder, places, total)
    return folder


def _files(config: dict[str, Any]) -> Iterator[range | None]:
    """The layers of each file; None for what is outside of layers."""
    yield None
    layers = config["num_hidden_layers"]
    yield from (range(first, min(first + LAYERS_A_FILE, layers)) for first in range(0, layers, LAYERS_A_FILE))


def _outer(config: dict[str, Any], random: np.random.Generator) -> dict[str, Tensor]:
    hidden, names = config["hidden_size"], ["model.embed_tokens.weight"]
    if not config["tie_word_embeddings"]:
        names.append(f"{OUTPUT_LAYER}.weight")
    generator = torch.Generator().manual_seed(int(random.integers(2**31)))
    tables = {name: torch.empty(config["vocab_size"], hidden, dtype=torch.bfloat16) for name in names}
    for table in tables.values():
        table.normal_(0, STD, generator=generator)
    return {**tables, "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}


def _layers(config: dict[str, Any], layers: range, random: np.random.Generator) -> dict[str, Tensor]:
    hidden, width = config["hidden_size"], config["head_dim"]
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden, "self_attn.q_norm": width, "self_attn.k_norm": width}
    tensors: dict[str, Tensor] = {}
    for layer in (f"model.layers.{number}" for number in layers):
        tensors |= {f"{layer}.{name}.weight": torch.ones(size, dtype=torch.bfloat16) for name, size in norms.items()}
        for module, (inputs, outputs) in linear_sizes(config).items():
            codes = random.integers(0, 256, (outputs, inputs // 2), dtype=np.uint8)
            scales = random.choice(np.array(SCALE_BYTES, dtype=np.uint8), (outputs, inputs // BLOCK))
            tensors[f"{layer}.{module}{PACKED}"] = torch.from_numpy(codes)
            tensors[f"{layer}.{module}{SCALE}"] = torch.from_numpy(scales)
    return tensors
