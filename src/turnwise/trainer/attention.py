"""Causal attention inside each segment of a packed sequence, as an attention function of transformers.

Every segment is a call of its own, so nothing of one segment can reach another, not even as a rounding error.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

SEGMENT_ATTENTION = "turnwise_segments"  # what `attn_implementation` calls it
NO_PARENT = -1
CHANGES_OF_SCORES = ("s_aux", "softcap", "position_bias")  # what some models pass to have attention scores altered


@dataclass(frozen=True)
class Layout:
    """How a packed sequence divides into segments, in order, without gaps.

    A segment with a parent goes on where the parent ends, and sees it; parents come first and have no parents themselves.
    So a prompt that several samples share is computed once.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]  # index of a segment, or NO_PARENT

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.parents):
            raise ValueError(f"{len(self.lengths)} lengths for {len(self.parents)} parents")
        for index, parent in enumerate(self.parents):
            if parent != NO_PARENT and not (0 <= parent < index and self.parents[parent] == NO_PARENT):
                raise ValueError(f"segment {index} has parent {parent}; parents come first and have no parents themselves")


def register_attention() -> str:
    """Make the function known to transformers, and return its name for `attn_implementation`."""
    AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
    return SEGMENT_ATTENTION


@torch.compiler.disable  # compiled layers would be compiled anew for every packed layout
def segment_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, tokens, head_dim]
    key: Tensor,  # [1, kv_heads, tokens, head_dim]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention output `[1, tokens, heads, head_dim]`, in the calling convention of transformers.

    Raises:
        ValueError: a segment is longer than the model's sliding window, which this function does not mask; or the model alters
            attention scores, by sinks for example.
    """
    if altered := [name for name in CHANGES_OF_SCORES if more.get(name) is not None]:
        raise ValueError(
            f"{type(module).__name__} passes {', '.join(altered)} to attention, which packed training does not support"
        )
    if sliding_window is not None and max(layout.lengths) > sliding_window:
        raise ValueError(
            f"a segment of {max(layout.lengths)} tokens exceeds the sliding window of {sliding_window}; lower seq_len"
        )
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
            outputs.append(scaled_dot_product_attention(*own, dropout_p=dropout, is_causal=True, scale=scaling))
        else:
            outputs.append(_continued(own, (keys[parent], values[parent]), scaling, dropout))
    return torch.cat(outputs, dim=2).to(dtype).transpose(1, 2).contiguous(), None


def _continued(
    own: tuple[Tensor, Tensor, Tensor], parent: tuple[Tensor, Tensor], scaling: float | None, dropout: float
) -> Tensor:
    """Attention of a segment over its parent and, causally, over itself."""
    query = own[0]
    keys = torch.cat([parent[0], own[1]], dim=2)
    values = torch.cat([parent[1], own[2]], dim=2)
    visible = torch.ones(query.shape[2], keys.shape[2], dtype=torch.bool, device=query.device).tril(parent[0].shape[2])
    return scaled_dot_product_attention(query, keys, values, attn_mask=visible, dropout_p=dropout, scale=scaling)
