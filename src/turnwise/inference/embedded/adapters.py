"""The adapters resident beside a lean model, by name, and their stacked matrices for the mixtures in use."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch

from turnwise.inference.embedded.lean import LeanModel
from turnwise.inference.embedded.lora import Adapter, LoraMix, LoraStacks, Projections, load_adapter
from turnwise.transport import tensor_digest

KEPT_STACKS = 4  # mixtures of versions whose stacks are kept; each costs as much memory as its adapters


class LeanAdapters:
    """Loads, unloads and mixes adapters."""

    def __init__(self, model: LeanModel) -> None:
        self._projections = _projections(model)
        self._loaded: dict[str, Adapter] = {}
        self._stacks: OrderedDict[tuple[str, ...], LoraStacks] = OrderedDict()

    @property
    def names(self) -> list[str]:
        return list(self._loaded)

    def load(self, name: str, folder: Path) -> None:
        """Raises AdapterError when the folder cannot be served."""
        self._loaded[name] = load_adapter(folder, self._projections)
        self._forget_stacks(name)

    def unload(self, name: str) -> None:
        del self._loaded[name]
        self._forget_stacks(name)

    def digest(self, name: str) -> str:
        """Of the numbers that take part in the computation, not of what was read from the file."""
        return tensor_digest(self._stacked((name,)).tensors(self._loaded[name], self._projections))

    def rank(self, name: str | None) -> int | None:
        """Rank of an adapter; None for the base model."""
        return None if name is None else self._loaded[name].rank

    def rebase(self, model: LeanModel) -> None:
        """Go on over other base weights of the same shapes."""
        self._projections = _projections(model)

    def mix(self, names: Sequence[str | None]) -> LoraMix | None:
        """The updates for tokens whose sequences use these adapters; None when none uses any."""
        used = tuple(sorted({name for name in names if name is not None}))
        if not used:
            return None
        place: dict[str | None, int] = {name: i for i, name in enumerate(used)}
        place[None] = len(used)
        return LoraMix(self._stacked(used), torch.tensor([place[name] for name in names]))

    def _stacked(self, names: tuple[str, ...]) -> LoraStacks:
        if names not in self._stacks:
            self._stacks[names] = LoraStacks([self._loaded[name] for name in names], self._projections)
            if len(self._stacks) > KEPT_STACKS:
                self._stacks.popitem(last=False)
        self._stacks.move_to_end(names)
        return self._stacks[names]

    def _forget_stacks(self, name: str) -> None:
        for used in [used for used in self._stacks if name in used]:
            del self._stacks[used]


def _projections(model: LeanModel) -> Projections:
    layer, d = model.layers[0], model.head_dim
    hidden, intermediate = layer.qkv.inputs, layer.down.inputs
    q, kv = model.heads * d, model.kv_heads * d
    return Projections(
        layers=len(model.layers),
        sizes={
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
        },
    )
