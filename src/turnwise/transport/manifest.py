"""What a broadcast of weights carries: tensors in flat buckets, in an order that both sides read from one file."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

MANIFEST = "manifest.json"
BUCKET_BYTES = 512 * 2**20  # a few milliseconds of NVLink: long enough to hide the start of a broadcast, small beside the weights
ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1}

Backend = Literal["nccl", "gloo"]


class TensorSpec(msgspec.Struct, frozen=True):
    """One tensor, without its values."""

    name: str
    dtype: str  # as torch names it: "bfloat16"
    shape: list[int]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Raises ValueError for a type that weights do not have."""
        if self.dtype not in ITEM_BYTES:
            raise ValueError(f"{self.name} is of type {self.dtype}; weights travel as {', '.join(ITEM_BYTES)}")
        return self.numel * ITEM_BYTES[self.dtype]


class Manifest(msgspec.Struct, frozen=True):
    """A version that travels by broadcast. A bucket is one flat tensor, in which tensors of one type lie one after the other."""

    version: int
    backend: Backend
    world_size: int  # the sender and every worker of every engine
    buckets: list[list[TensorSpec]]

    def write(self, folder: Path) -> None:
        (folder / MANIFEST).write_bytes(msgspec.json.encode(self))

    @staticmethod
    def read(folder: Path) -> "Manifest":
        """Raises FileNotFoundError when it is not there, ValueError when it is not a manifest."""
        path = folder / MANIFEST
        try:
            return msgspec.json.decode(path.read_bytes(), type=Manifest)
        except msgspec.DecodeError as error:
            raise ValueError(f"{path} is not a manifest of this version of turnwise: {error}") from error


def plan_buckets(tensors: Iterable[TensorSpec], *, limit_bytes: int = BUCKET_BYTES) -> list[list[TensorSpec]]:
    """Tensors in their order, cut into buckets of one type and at most `limit_bytes`; a larger tensor has a bucket to itself.

    Raises:
        ValueError: a tensor is of a type that weights do not have.
    """
    buckets: list[list[TensorSpec]] = []
    filled = 0
    for tensor in tensors:
        if not buckets or buckets[-1][0].dtype != tensor.dtype or filled + tensor.nbytes > limit_bytes:
            buckets.append([])
            filled = 0
        buckets[-1].append(tensor)
        filled += tensor.nbytes
    return buckets
