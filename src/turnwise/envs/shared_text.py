"""Observations of `FreeText` in the shared memory of gymnasium's asynchronous vector environments.

Gymnasium's own way with text knows the letters of the space's alphabet only, and reads the memory once and never again.
"""

import multiprocessing
from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
from gymnasium.vector.utils import create_shared_memory, read_from_shared_memory, write_to_shared_memory
from numpy.typing import NDArray

from turnwise.envs.base import FreeText

HEADER = 8  # bytes of the length, before each text
ROOM = 1 << 20  # bytes of UTF-8 for each environment


class SharedTexts(Sequence[str]):
    """The texts as they are in the memory now; a copy of it is a tuple of strings, which stay as they are."""

    def __init__(self, rows: NDArray[np.uint8]) -> None:
        self._rows = rows  # [environments, HEADER + ROOM]

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...

    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self[k] for k in range(len(self))[index])
        row = self._rows[index]
        size = int(row[:HEADER].view(np.uint64)[0])
        return row[HEADER : HEADER + size].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self[k] for k in range(len(self)))

    def __deepcopy__(self, memo: dict[int, Any]) -> tuple[str, ...]:
        return tuple(self)


def share_texts() -> None:
    """Let `gymnasium.make_vec(..., vectorization_mode="async")` share the observations of text environments."""
    create_shared_memory.register(FreeText)(_create)
    read_from_shared_memory.register(FreeText)(_read)
    write_to_shared_memory.register(FreeText)(_write)


def _create(space: FreeText, n: int = 1, ctx: Any = multiprocessing) -> Any:
    return ctx.Array("B", n * (HEADER + ROOM))


def _read(space: FreeText, shared_memory: Any, n: int = 1) -> Any:
    return SharedTexts(_rows(shared_memory))


def _write(space: FreeText, index: int, value: str, shared_memory: Any) -> None:
    data = np.frombuffer(value.encode("utf-8", "surrogatepass"), dtype=np.uint8)
    if len(data) > ROOM:
        raise ValueError(
            f"an observation has {len(data)} bytes, more than the {ROOM} that shared memory has for each environment; give "
            "gymnasium.make_vec vector_kwargs={'shared_memory': False}"
        )
    row = _rows(shared_memory)[index]
    row[:HEADER].view(np.uint64)[0] = len(data)
    row[HEADER : HEADER + len(data)] = data


def _rows(shared_memory: Any) -> NDArray[np.uint8]:
    return np.frombuffer(shared_memory.get_obj(), dtype=np.uint8).reshape(-1, HEADER + ROOM)
