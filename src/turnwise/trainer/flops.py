"""Floating-point operations of a training step, by the formula that model FLOP utilisation (MFU) is stated with.

    parameters   2 N forward, 2 N for the gradients of activations, 2 N for those of weights; frozen weights have no third term
    attention    forward 4 * heads * head_dim * pairs a layer (query x key, then weights x value); backward twice that

`pairs` counts what causality lets a token see: L^2 / 2 in a segment of L tokens, and own * parent + own^2 / 2 in one that goes on
from a shared prompt. Recomputation is not counted, nor is what is no matrix product. The convention is that of PaLM
(arXiv 2204.02311, appendix B) with the causal half, and a term for frozen weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = 2, 2, 2  # operations for each parameter and token
PER_PARAMETER = {False: FORWARD + INPUT_GRADIENT, True: FORWARD + INPUT_GRADIENT + WEIGHT_GRADIENT}  # by whether it is trained
ATTENTION_FORWARD = 4  # operations for each pair, head and dimension of the head: two products of 2
ATTENTION_PASSES = 3  # the backward pass has four products for the forward's two

# dense bf16 of the SXM boards, by the vendor's data sheets; other boards of the same names clock differently
PEAK_BF16_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


@dataclass(frozen=True)
class ModelSize:
    """What the attention term needs of a decoder-only model."""

    layers: int
    heads: int  # of queries
    head_dim: int


def model_size(config: Any) -> ModelSize:
    """The sizes in a configuration of transformers."""
    text: Any = config.get_text_config()
    heads = int(text.num_attention_heads)
    return ModelSize(
        layers=int(text.num_hidden_layers),
        heads=heads,
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
    )


def step_flops(
    size: ModelSize,
    trainable_params: int,
    frozen_params: int,
    segment_lengths: Sequence[int],
    parent_lengths: Sequence[int] | None = None,
) -> float:
    """Operations of one forward and backward pass over packed segments, without recomputation.

    Args:
        size: layers, query heads and dimension of a head.
        trainable_params: parameters that get a gradient.
        frozen_params: those that do not. An embedding that only looks rows up belongs to neither; one tied to the output layer
            counts once.
        segment_lengths: tokens of each segment.
        parent_lengths: tokens of the shared prompt before each segment, 0 where there is none; None when no segment has one.
    """
    parents = [0] * len(segment_lengths) if parent_lengths is None else parent_lengths
    per_token = PER_PARAMETER[False] * frozen_params + PER_PARAMETER[True] * trainable_params
    pairs = sum(own * parent + own * own / 2 for own, parent in zip(segment_lengths, parents, strict=True))
    attention = ATTENTION_PASSES * ATTENTION_FORWARD * size.layers * size.heads * size.head_dim * pairs
    return float(per_token * sum(segment_lengths) + attention)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 operations a second of a device, by the name that CUDA gives it; None when it is not known."""
    return PEAK_BF16_FLOPS.get(device_name)
