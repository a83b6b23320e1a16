"""The LoRA adapters that a vLLM worker holds: which request stands for which name, and the tensors that kernels read.

vLLM keeps adapters in a cache in host memory and copies those in use into slots of stacked device buffers,
`[max_loras, 1, max_rank, in]` for A and `[max_loras, 1, out, max_rank]` for B, with alpha / rank multiplied into B. Only the
slots say what requests compute with, so these are read here; the cache tells which modules and ranks to look for.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from turnwise.inference.vllm_layers import CannotRead, Group, check_names, kinds, whole

PEFT_PREFIX = "base_model.model."
KNOWN = "turnwise_adapters"  # attribute of vLLM's worker LoRA manager: the newest request by adapter name


def remember_requests(manager_class: Any) -> None:
    """Make vLLM's worker LoRA managers note the `LoRARequest` of every adapter they load: workers know adapters by number alone.

    `add_adapter` is called once for each load, and for the adapters of every step, with the request that names them.
    """
    original = manager_class.add_adapter

    @functools.wraps(original)
    def add_adapter(self: Any, request: Any) -> Any:
        added = original(self, request)
        known: dict[str, Any] = self.__dict__.setdefault(KNOWN, {})
        newest = known.get(request.lora_name)
        # numbers only grow: an old request of a name that was loaded anew must not hide its successor
        if newest is None or newest.lora_int_id < request.lora_int_id:
            known[request.lora_name] = request
        return added

    manager_class.add_adapter = add_adapter


def activate(worker_manager: Any, name: str) -> Any:
    """Bring an adapter into a slot as a request for it would, and return its `LoRARequest`.

    Raises:
        CannotRead: no adapter of that name was loaded into this worker.
    """
    known: dict[str, Any] = worker_manager.__dict__.get(KNOWN, {})
    if name not in known:
        newest = ", ".join(list(known)[-8:]) or "none"
        raise CannotRead(f"no adapter {name} was loaded into this engine; the newest loaded ones: {newest}")
    worker_manager.add_adapter(known[name])
    return known[name]


def resident_adapter(manager: Any, adapter_id: int, group: Group) -> Iterator[tuple[str, Tensor]]:
    """Tensors of an adapter in its slot, whole and under PEFT's names, in the engine's type; a collective of the group.

    Args:
        manager: vLLM's `LoRAModelManager`.
        adapter_id: the adapter's number; it is in a slot.

    Raises:
        CannotRead: the model's layers are of a kind that is not known here, before any tensor is given; or, after all were given,
            the slot holds values where the adapter has none.
    """
    slot = manager.lora_index_to_id.index(adapter_id)
    adapter = manager.list_adapters()[adapter_id]
    plans = [_Module(name, module, adapter, manager, group) for name, module in manager.modules.items()]
    empty: list[tuple[str, Tensor]] = []
    for plan in plans:
        yield from plan.read(slot, group, empty)
    _check_zero(empty)


class _Module:
    """One wrapped layer of the model: its slices (q, k and v of `qkv_proj`), and which of them the adapter fills."""

    def __init__(self, name: str, module: Any, adapter: Any, manager: Any, group: Group) -> None:
        self.name = name
        self.stacked_a, self.stacked_b = _tuple(module.lora_a_stacked), _tuple(module.lora_b_stacked)
        weights = adapter.get_lora(name)
        self.names: list[str] = manager.packed_modules.get(name, [name])
        self.loaded_a = [None] * len(self.stacked_a) if weights is None else _list(weights.lora_a)
        self.loaded_b = [None] * len(self.stacked_b) if weights is None else _list(weights.lora_b)
        self.kinds = kinds(module)
        self.parallel = getattr(module, "tp_size", 1) > 1
        self.replicas: int = getattr(getattr(module, "base_layer", None), "num_kv_head_replicas", 1)
        if weights is not None:
            self._check(module, manager, group)

    def read(self, slot: int, group: Group, empty: list[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Tensors of the slices that the adapter fills. What must be zero is appended to `empty`."""
        for index, (stacked_a, stacked_b) in enumerate(zip(self.stacked_a, self.stacked_b, strict=True)):
            loaded_a, loaded_b = self.loaded_a[index], self.loaded_b[index]
            if loaded_a is None or loaded_b is None:
                empty += [(self.name, stacked_a[slot]), (self.name, stacked_b[slot])]
                continue
            rank = len(loaded_a)
            a, b = stacked_a[slot, 0], stacked_b[slot, 0]
            empty += [(self.name, a[rank:]), (self.name, b[:, rank:])]
            name = PEFT_PREFIX + self.names[index]
            yield f"{name}.lora_A.weight", self._whole_a(a[:rank], group)
            yield f"{name}.lora_B.weight", self._whole_b(b[:, :rank], group, index)

    def _whole_a(self, part: Tensor, group: Group) -> Tensor:
        """A of a row-parallel layer is cut along its input; of any other, every rank holds all of it."""
        return whole(part, group, dim=1) if self.parallel and "RowParallelLinearWithLoRA" in self.kinds else part

    def _whole_b(self, part: Tensor, group: Group, index: int) -> Tensor:
        """B of a column-parallel layer is cut along its output."""
        if not (self.parallel and "ColumnParallelLinearWithLoRA" in self.kinds):
            return part
        is_key_or_value = "MergedQKVParallelLinearWithLoRA" in self.kinds and index > 0
        return whole(part, group, dim=0, replicas=self.replicas if is_key_or_value else 1)

    def _check(self, module: Any, manager: Any, group: Group) -> None:
        """The same on every rank, so that no rank waits in a collective for one that gave up."""
        counts = {len(self.names), len(self.stacked_a), len(self.loaded_a), len(self.loaded_b)}
        if "BaseLinearLayerWithLoRA" not in self.kinds or len(counts) != 1:
            raise CannotRead(f"{self.name}: adapters of {type(module).__name__} cannot be read back from the engine")
        check_names(manager.model, self.name, self.names)
        if not self.parallel:
            return
        if manager.lora_config.fully_sharded_loras:
            raise CannotRead("adapters cannot be read back under fully_sharded_loras; leave it out of [inference.vllm]")
        fused = kinds(module.base_layer) & {"MergedColumnParallelLinear", "QKVParallelLinear"}
        if (len(self.names) == 1 and fused) or module.tp_size != group.world_size:
            raise CannotRead(f"{self.name}: its tensors cannot be put together from tensor-parallel parts; use inference.tp = 1")


def _check_zero(tensors: list[tuple[str, Tensor]]) -> None:
    filled = [(name, tensor) for name, tensor in tensors if tensor.numel()]
    if filled and int(torch.stack([tensor.count_nonzero() for _, tensor in filled]).sum()):  # one transfer from a GPU
        wrong = next(name for name, tensor in filled if int(tensor.count_nonzero()))
        raise CannotRead(f"{wrong}: the adapter's slot holds values where the adapter has none")


def _tuple(stacked: Any) -> tuple[Tensor, ...]:
    """Embeddings have one tensor where linear layers have a tuple."""
    return (stacked,) if isinstance(stacked, Tensor) else tuple(stacked)


def _list(loaded: Any) -> list[Tensor | None]:
    return list(loaded) if isinstance(loaded, (list, tuple)) else [loaded]
