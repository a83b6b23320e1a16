"""Causal attention inside each segment of a packed sequence, as an attention function of transformers.

On a GPU one call of the variable-length flash kernel does all segments, but for long ones, for which cuDNN's is faster by far; on
a CPU every segment is a call of its own. Nothing of one segment can reach another, not even as a rounding error.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from turnwise.trainer.attention_kernels import KERNEL_TYPES, NO_PARENT, Kernels, plan_kernels, run_kernels

SEGMENT_ATTENTION = "turnwise_segments"  # what `attn_implementation` calls it
CHANGES_OF_SCORES = ("s_aux", "softcap", "position_bias")  # what some models pass to have attention scores altered


@dataclass(frozen=True)
class Layout:
    """How a packed sequence divides into segments, in order, without gaps.

    A segment with a parent goes on where the parent ends, and sees it; parents come first and have no parents themselves.
    So a prompt that several samples share is computed once.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]  # index of a segment, or NO_PARENT
    kernels: Kernels | None = field(default=None, compare=False)  # set by `on`

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.parents):
            raise ValueError(f"{len(self.lengths)} lengths for {len(self.parents)} parents")
        for index, parent in enumerate(self.parents):
            if parent != NO_PARENT and not (0 <= parent < index and self.parents[parent] == NO_PARENT):
                raise ValueError(f"segment {index} has parent {parent}; parents come first and have no parents themselves")

    def on(self, device: torch.device) -> "Layout":
        """The layout with what the kernels of this device need."""
        if device.type != "cuda":
            return self
        return replace(self, kernels=plan_kernels(self.lengths, self.parents, device))


def register_attention() -> str:
    """Make the function known to transformers, and return its name for `attn_implementation`."""
    AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
    return SEGMENT_ATTENTION


@torch.compiler.disable  # compiled layers would be compiled anew for every packed layout
def segment_attention(
    module: nn.Module,
    query: Float[Tensor, "1 heads tokens head_dim"],
    key: Float[Tensor, "1 kv_heads tokens head_dim"],
    value: Float[Tensor, "1 kv_heads tokens head_dim"],
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Float[Tensor, "1 tokens heads head_dim"], None]:
    """Attention output, in the calling convention of transformers.

    Raises:
        ValueError: a segment is longer than the model's sliding window, which this function does not mask; or the model alters
            attention scores, by sinks for example, or drops some of them.
    """
    if altered := [name for name in CHANGES_OF_SCORES if more.get(name) is not None]:
        raise ValueError(
            f"{type(module).__name__} passes {', '.join(altered)} to attention, which packed training does not support"
        )
    if dropout:
        raise ValueError(f"{type(module).__name__} has an attention dropout of {dropout}, which packed training does not support")
    longest = max(layout.lengths)
    if sliding_window is not None and longest > sliding_window:
        raise ValueError(f"a segment of {longest} tokens exceeds the sliding window of {sliding_window}; lower seq_len")
    if layout.kernels is not None and query.dtype in KERNEL_TYPES:
        return run_kernels(query, key, value, layout.kernels, scaling), None
    return _by_segment(query, key, value, layout, scaling), None


def _by_segment(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scaling: float | None) -> Tensor:
    """One call a segment."""
    dtype = query.dtype
    if dtype == torch.bfloat16 and query.device.type == "cpu":
        query, key, value = query.float(), key.float(), value.float()  # the CPU kernel takes three times as long in bfloat16
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    queries, keys, values = (tensor.split(layout.lengths, dim=2) for tensor in (query, key, value))
    outputs: list[Tensor] = []
    for index, parent in enumerate(layout.parents):
        own = (queries[index], keys[index], values[index])
        if parent == NO_PARENT:
            outputs.append(scaled_dot_product_attention(*own, is_causal=True, scale=scaling))
        else:
            outputs.append(_continued(own, (keys[parent], values[parent]), scaling))
    return torch.cat(outputs, dim=2).to(dtype).transpose(1, 2).contiguous()


def _continued(own: tuple[Tensor, Tensor, Tensor], parent: tuple[Tensor, Tensor], scaling: float | None) -> Tensor:
    """Attention of a segment over its parent and, causally, over itself."""
    query = own[0]
    keys = torch.cat([parent[0], own[1]], dim=2)
    values = torch.cat([parent[1], own[2]], dim=2)
    visible = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool, device=query.device).tril(parent[0].shape[2])
    return scaled_dot_product_attention(query, keys, values, attn_mask=visible, scale=scaling)
