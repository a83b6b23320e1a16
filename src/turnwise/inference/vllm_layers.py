"""What the layers of vLLM have in common: their kinds, their names, and whole tensors from what the ranks of a group hold.

Runs inside vLLM's workers, and imports nothing of vLLM.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class CannotRead(Exception):
    """Resident tensors cannot be brought into the form in which the trainer published them. The text says why."""


class Group(Protocol):
    """The part of vLLM's `GroupCoordinator` that is used here."""

    world_size: int
    rank_in_group: int

    def all_gather(self, input_: Tensor, dim: int = -1) -> Tensor:
        """The `input_` of all ranks, concatenated along `dim`; a collective."""
        ...


def whole(part: Tensor, group: Group, *, dim: int, replicas: int = 1) -> Tensor:
    """The tensor of which each rank holds a part along `dim`; a collective of all ranks.

    Args:
        replicas: neighbouring ranks that hold the same part (key and value heads, where there are fewer of them than ranks). Each
            rank then puts in its own copy, so that a copy that differs shows in that rank's result.
    """
    if group.world_size == 1:
        return part
    parts = group.all_gather(part.contiguous(), dim=0).unflatten(0, (group.world_size, part.shape[0]))
    places = [place * replicas for place in range(group.world_size // replicas)]
    places[group.rank_in_group // replicas] = group.rank_in_group
    return torch.cat([parts[place] for place in places], dim)


def kinds(layer: object) -> frozenset[str]:
    """Names of the layer's class and of those it derives from: how layers of vLLM are told apart without importing it."""
    return frozenset(kind.__name__ for kind in type(layer).__mro__)


def check_names(model: Any, path: str, names: Sequence[str]) -> None:
    """Check that a layer of vLLM, fused from `names` or called so itself, has these names in the Hugging Face model, too.

    Raises:
        CannotRead: it has not; vision models and a few others are renamed as a whole.
    """
    mapper: Any = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return
    for name in names:
        if mapper.apply_list([f"{name}.weight"]) not in ([f"{path}.weight"], [f"{name}.weight"]):
            raise CannotRead(f"{path}: this model's layers have other names in vLLM than in its files, which is not supported")
