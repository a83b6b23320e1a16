"""Task rows: from a list, a JSONL file, the folder that `TURNWISE_DATA` names, or a data set on the hub.

A split is written as the hub writes it: `train`, `train[:256]`, `test[10:20]`, `train[-50:]`, `train[:10%]`; a table as
`id,configuration,split`, `id,split` or `file.jsonl[:50]`.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

DATA_VARIABLE = "TURNWISE_DATA"
Row = dict[str, Any]

_SPLIT = re.compile(r"(?P<name>[^\[\]]+?)\s*(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


@dataclass(frozen=True)
class SplitSpec:
    """A split's name and the part of it that is wanted."""

    name: str
    start: str | None = None  # a count or a percentage, as written
    stop: str | None = None

    @classmethod
    def parse(cls, text: str) -> "SplitSpec":
        """Read `train[:256]`.

        Raises:
            ValueError: when it is not of that form.
        """
        match = _SPLIT.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"split {text!r} is not of the form 'train', 'train[:256]', 'train[100:]' or 'train[:10%]'")
        return cls(**match.groupdict())

    def indices(self, size: int) -> range:
        """The rows wanted of `size`."""
        return range(size)[slice(_position(self.start, size), _position(self.stop, size))]


@dataclass(frozen=True)
class TableSpec:
    """Where rows come from: a split of a data set on the hub, or a JSONL file, and the part of it that is wanted."""

    dataset: str  # hub id, or path of a file
    configuration: str | None
    split: SplitSpec

    @classmethod
    def parse(cls, text: str) -> "TableSpec":
        """Read `bdsaglam/musique,answerable,train[:256]`, `openai/gsm8k,train` or `data/rows.jsonl[:50]`.

        Raises:
            ValueError: when it is of none of these forms.
        """
        path, is_file, part = text.strip().rpartition(".jsonl")
        if is_file:
            return cls(f"{path}.jsonl", None, SplitSpec.parse(f"rows{part}"))
        fields = [field.strip() for field in text.split(",")]
        if len(fields) not in (2, 3) or not all(fields):
            raise ValueError(f"data {text!r} is not of the form 'id,configuration,split', 'id,split' or 'file.jsonl[:50]'")
        return cls(fields[0], fields[1] if len(fields) == 3 else None, SplitSpec.parse(fields[-1]))

    @classmethod
    def parse_all(cls, texts: str | Sequence[str]) -> "tuple[TableSpec, ...]":
        """Read several, from a list or joined by " + ".

        Raises:
            ValueError: when one is malformed.
        """
        parts = re.split(r"\s\+\s", texts) if isinstance(texts, str) else texts
        return tuple(cls.parse(part) for part in parts)

    @property
    def is_file(self) -> bool:
        return self.dataset.endswith(".jsonl")

    def file(self) -> Path:
        """The file: as its path says or, where a relative path leads nowhere, in the folder that `TURNWISE_DATA` names."""
        path = Path(self.dataset).expanduser()
        folder = None if path.is_absolute() or path.exists() else data_folder()
        return folder / path if folder is not None and (folder / path).exists() else path

    def __str__(self) -> str:
        split = self.split
        part = "" if split.start is split.stop is None else f"[{split.start or ''}:{split.stop or ''}]"
        if self.is_file:
            return f"{self.dataset}{part}"
        return ",".join(filter(None, (self.dataset, self.configuration, f"{split.name}{part}")))


def data_folder() -> Path | None:
    """The folder that `TURNWISE_DATA` names, or None where it is not set.

    Raises:
        ValueError: when it names no folder.
    """
    value = os.environ.get(DATA_VARIABLE)
    if not value:
        return None
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{DATA_VARIABLE} = {value!r} is not a folder; correct it or unset it")
    return folder


def read_jsonl(path: Path, *, required: Sequence[str] = ()) -> list[Row]:
    """The rows of a JSONL file, one JSON object a line; empty lines are passed over.

    Raises:
        ValueError: for a file that cannot be read or holds no row, and for a broken line: file, line number, what is wrong.
    """
    try:
        stat = path.stat()
        rows = _parse_jsonl(path, stat.st_mtime_ns, stat.st_size, tuple(required))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"task file {path} cannot be read: {error}") from error
    return [dict(row) for row in rows]


def check_rows(rows: Sequence[Any], *, required: Sequence[str], source: str) -> list[Row]:
    """Copies of rows that came from a list.

    Raises:
        ValueError: naming the first row that is no mapping or lacks a field.
    """
    for index, row in enumerate(rows):
        wrong = _what_is_wrong(row, required)
        if wrong:
            raise ValueError(f"{source}[{index}]: {wrong}")
    return [dict(row) for row in rows]


def read_hub(spec: str, split: SplitSpec, *, required: Sequence[str] = ()) -> list[Row]:
    """Rows of a data set on the hub, with their place in the split as their id unless they have one.

    Args:
        spec: `"id"` or `"id,configuration"`, for example `"openai/gsm8k,main"`.
        split: which rows.
        required: fields that every row must have.

    Raises:
        ValueError: when it cannot be loaded, with the reason and what to do without a network.
    """
    name, _, configuration = (part.strip() for part in spec.partition(","))
    table = _load_hub(name, configuration or None, split.name)
    indices = split.indices(len(table))
    rows = check_rows(list(table.select(indices)), required=required, source=f"{spec}/{split.name}")
    return [{"id": f"{name}/{split.name}/{index}", **row} for index, row in zip(indices, rows, strict=True)]


def select(rows: Sequence[Row], split: SplitSpec, *, prefix: str) -> tuple[Row, ...]:
    """The part of `rows` that a split asks for, each with a stable id: its own, or `prefix/split/index in the whole`.

    Raises:
        ValueError: when two rows have the same id.
    """
    indices = split.indices(len(rows))
    chosen = tuple({**rows[i], "id": str(rows[i].get("id", f"{prefix}/{split.name}/{i}"))} for i in indices)
    seen: set[str] = set()
    for row in chosen:
        if row["id"] in seen:
            raise ValueError(f"two tasks of {prefix}/{split.name} have the id {row['id']!r}; ids must differ")
        seen.add(row["id"])
    return chosen


@lru_cache(maxsize=16)
def _load_hub(name: str, configuration: str | None, split: str) -> "Dataset":
    from datasets import load_dataset  # late: it takes seconds and most environments do without

    try:
        return load_dataset(name, configuration, split=split)
    except Exception as error:
        # the hub client raises a dozen unrelated types for "not there" and "not reachable"; all mean the same to a user
        raise ValueError(
            f"data set {name!r}, split {split!r}, cannot be loaded from the hub ({type(error).__name__}: {error}); "
            f"without a network give a JSONL file instead, or name a folder that holds it in {DATA_VARIABLE}"
        ) from error


def _position(text: str | None, size: int) -> int | None:
    if text is None:
        return None
    return round(size * int(text[:-1]) / 100) if text.endswith("%") else int(text)


@lru_cache(maxsize=16)
def _parse_jsonl(path: Path, _mtime_ns: int, _size: int, required: tuple[str, ...]) -> tuple[Row, ...]:
    rows: list[Row] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from error
        wrong = _what_is_wrong(row, required)
        if wrong:
            raise ValueError(f"{path}:{number}: {wrong}")
        rows.append(row)
    if not rows:
        raise ValueError(f"task file {path} holds no row")
    return tuple(rows)


def _what_is_wrong(row: Any, required: Sequence[str]) -> str | None:
    if not isinstance(row, Mapping):
        return f"a task must be a JSON object, not {type(row).__name__}"
    missing = [name for name in required if name not in row]
    return f"the field {missing[0]!r} is missing; there are {', '.join(map(str, row)) or 'none'}" if missing else None
