"""What of a decoder layer is compiled, and what of it is computed again in the backward pass instead of kept."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Scope = Literal["layer", "mlp"]


def prepare_layers(layers: Iterable[nn.Module], *, recompute: Scope | None, compiled: bool, dropout: bool) -> None:
    """Wrap the forward pass of each decoder layer, in place; parameters and their names stay.

    Recomputation is wrapped around compiled code, and inside the module's call, so that hooks such as FSDP's run once.

    Args:
        layers: the decoder layers.
        recompute: whole layers, the feed-forward blocks alone (which hold more than half of what a layer keeps and take, without
            their last product, about a third of its operations), or nothing.
        compiled: whether `torch.compile` is applied to each layer.
        dropout: whether the layers draw random numbers, which the second pass must repeat.
    """
    for layer in layers:
        if recompute == "mlp":
            block = _feed_forward(layer)
            block.forward = _recomputed(block.forward, dropout)
        forward: Callable[..., Any] = layer.forward
        if compiled:
            forward = torch.compile(forward, dynamic=True)
        layer.forward = _recomputed(forward, dropout) if recompute == "layer" else forward


def _recomputed(forward: Callable[..., Any], dropout: bool) -> Callable[..., Any]:
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=dropout)


def _feed_forward(layer: nn.Module) -> nn.Module:
    for name in ("mlp", "feed_forward", "block_sparse_moe"):
        block = getattr(layer, name, None)
        if isinstance(block, nn.Module):
            return block
    raise ValueError(
        f'trainer.model.checkpoint_scope = "mlp" needs layers with a feed-forward block called mlp, which '
        f'{type(layer).__name__} has not; use "layer"'
    )
