"""Digests of tensors wherever they are: on the GPU of a trainer, or resident in an engine's worker."""

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 1 << 20  # elements that share a row of multipliers, which is kept: 8 MiB a device
ROWS = 16  # blocks at a time: temporaries of 128 MiB are enough for the largest tensor
GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2^64 / golden ratio, as a signed number: consecutive multiples are spread over all residues
MIX = 0xBF58476D1CE4E5B9 - 2**64  # of splitmix64


class Digest:
    """`tensor_digest` of tensors that are never all there at once: a sum a tensor is kept, on its device, and nothing else."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[str, Tensor]] = {}

    def add(self, name: str, tensor: "Tensor") -> None:
        """Raises ValueError when the name was added before."""
        if name in self._sums:
            raise ValueError(f"the digest holds a tensor {name} already")
        tensor = tensor.detach()
        self._sums[name] = (f"{name}|{tensor.dtype}|{tuple(tensor.shape)}", _word_sum(tensor))

    def hexdigest(self) -> str:
        """The digest of what was added so far, whatever the order."""
        import torch  # late: `rl` reads this package without loading torch

        parts = [self._sums[name] for name in sorted(self._sums)]
        sums = [value for _, value in parts]
        if len({value.device for value in sums}) > 1:
            sums = [value.cpu() for value in sums]
        values = torch.stack(sums).tolist() if sums else []  # one transfer from a GPU
        digest = hashlib.sha256()
        for (description, _), value in zip(parts, values, strict=True):
            digest.update(f"{description}|{value}|".encode())
        return digest.hexdigest()


def tensor_digest(tensors: "Mapping[str, Tensor]") -> str:
    """Hex digest of names, types, shapes and values, in the order of the names; the same on every device.

    Values enter by a sum over words (the bits of an element) times odd multipliers that depend on the place, modulo 2^64, which a
    GPU forms at the speed of its memory, where SHA-256 of 8 GB would take seconds. A change of a single element always shows, any
    other accidental one with a probability of 1 - 2^-48 or more. It proves which tensors an engine holds; it does not protect
    against somebody who forges them.
    """
    digest = Digest()
    for name, tensor in tensors.items():
        digest.add(name, tensor)
    return digest.hexdigest()


def served_adapter(tensors: "Mapping[str, Tensor]", *, dtype: "torch.dtype", scale: float) -> "dict[str, Tensor]":
    """Tensors of a PEFT adapter as an engine holds them: in its type, with `scale` (alpha / rank) inside B."""
    return {name: tensor.to(dtype) * scale if ".lora_B." in name else tensor.to(dtype) for name, tensor in tensors.items()}


def _word_sum(tensor: "Tensor") -> "Tensor":
    """Sum of words times multipliers, modulo 2^64; int64, on the tensor's device."""
    import torch

    words = tensor.contiguous().flatten().view(_word_type(tensor.element_size()))
    multipliers = _multipliers(tensor.device)
    if len(words) <= BLOCK:  # as below, in a third of the kernels: adapters have hundreds of such tensors
        return (words.to(torch.int64) * multipliers[: len(words)]).sum()
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for block, start in enumerate(range(0, len(words), BLOCK * ROWS)):
        part = words[start : start + BLOCK * ROWS]
        whole = len(part) // BLOCK
        rows = [part[: whole * BLOCK].view(whole, BLOCK), part[whole * BLOCK :][None]]
        sums = torch.cat([(row.to(torch.int64) * multipliers[: row.shape[1]]).sum(1) for row in rows])
        numbers = torch.arange(block * ROWS, block * ROWS + whole + 1, device=tensor.device)
        total += (sums * (numbers * GOLDEN | 1)).sum()
    return total


def _word_type(size: int) -> "torch.dtype":
    import torch

    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]


@lru_cache(maxsize=8)
def _multipliers(device: "torch.device") -> "Tensor":
    """Odd numbers that look random, one for each place of a block."""
    import torch

    mixed = (torch.arange(1, BLOCK + 1, dtype=torch.int64) * GOLDEN).bitwise_xor_(torch.tensor(MIX))
    mixed ^= mixed >> 31
    mixed *= MIX
    mixed ^= mixed >> 29
    return (mixed | 1).to(device)
