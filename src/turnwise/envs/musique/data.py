"""Rows of MuSiQue, from the hub, from files in its own schema, or from a list; and what an episode needs of a row."""

import logging
import re
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from turnwise.envs.musique.retrieval import Paragraph
from turnwise.envs.tasks import Row, TableSpec, check_rows, data_folder, read_hub, read_jsonl

logger = logging.getLogger(__name__)

REQUIRED = ("question", "answer", "paragraphs")
LOCAL_NAMES = {"bdsaglam/musique": ("musique",), "bdsaglam/musique-mini": ("musique-mini", "musique_mini")}
LOCAL_CONFIGURATIONS = {"answerable": ("ans", "answerable"), "full": ("full",)}
LOCAL_SPLITS = {"validation": ("dev", "validation")}
HOPS = re.compile(r"([2-9])hop")

TaskSource = str | Path | Sequence[str] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Question:
    """A row as an episode uses it."""

    text: str
    truths: tuple[str, ...]  # the answer and its aliases
    answerable: bool
    paragraphs: tuple[Paragraph, ...]
    supporting: frozenset[int]  # positions in `paragraphs`

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Question":
        """Read a row.

        Raises:
            ValueError: naming the field that is missing or of the wrong kind.
        """
        where = f"MuSiQue task {row.get('id')!r}"
        missing = [name for name in REQUIRED if name not in row]
        if missing:
            raise ValueError(f"{where} lacks the field {missing[0]!r}")
        entries = paragraph_rows(row["paragraphs"])
        return cls(
            text=str(row["question"]),
            truths=(str(row["answer"]), *map(str, row.get("answer_aliases") or ())),
            answerable=is_answerable(row),
            paragraphs=read_paragraphs(entries, where),
            supporting=frozenset(i for i, entry in enumerate(entries) if entry.get("is_supporting")),
        )


def read_rows(source: TaskSource, *, key: str) -> tuple[Row, ...]:
    """All rows of a source; the same objects for the same source, so that environments of one process share them.

    Args:
        source: `"bdsaglam/musique,answerable,train[:256]"`, `"file.jsonl[:50]"`, several joined by " + ", a list of such
            texts, or a list of rows.
        key: for messages, `"args.train"`.

    Returns:
        Rows with a stable "id" of their own. Rows that several parts have in common come once.

    Raises:
        ValueError: for a malformed source, a broken row, or data that is neither at hand nor on the hub.
    """
    specs = table_specs(source, key=key)
    if specs is not None:
        return _read_tables(stamped(specs), key)
    rows = check_rows(typing.cast(Sequence[Any], source), required=REQUIRED, source=key)
    return _joined([_identified(row, f"musique/{key}/{index}") for index, row in enumerate(rows)], key)


def keep(rows: Sequence[Row], *, hops: Collection[int] | None, answerable: bool | None) -> tuple[Row, ...]:
    """Those of so many hops and of that answerability; None keeps all."""
    return tuple(
        row
        for row in rows
        if (hops is None or hop_count(row) in hops) and (answerable is None or is_answerable(row) == answerable)
    )


def hop_count(row: Mapping[str, Any]) -> int:
    """Facts that the answer needs: as the id says ("3hop1__..."), else the questions that the row is decomposed into."""
    match = HOPS.match(str(row.get("id", "")))
    if match:
        return int(match[1])
    steps = row.get("question_decomposition") or [e for e in paragraph_rows(row["paragraphs"]) if e.get("is_supporting")]
    return len(steps)


def is_answerable(row: Mapping[str, Any]) -> bool:
    return bool(row.get("answerable", True))


def read_paragraphs(entries: Sequence[Mapping[str, Any]], where: str) -> tuple[Paragraph, ...]:
    """Title and text of each.

    Raises:
        ValueError: beginning with `where`, when one lacks them.
    """
    try:
        return tuple(Paragraph(str(entry["title"]), str(entry["paragraph_text"])) for entry in entries)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where}: every paragraph needs 'title' and 'paragraph_text' ({error!r})") from error


def paragraph_rows(paragraphs: Any) -> list[Mapping[str, Any]]:
    """Paragraphs as a list of rows; older versions of `datasets` give a table of columns."""
    if isinstance(paragraphs, Mapping):
        return [dict(zip(paragraphs, values, strict=True)) for values in zip(*paragraphs.values(), strict=True)]
    return list(paragraphs)


def only_answerable(source: TaskSource) -> bool:
    """Whether a source promises answerable questions only: the configuration `answerable` has no others."""
    specs = table_specs(source, key="source")
    return specs is not None and all(spec.configuration == "answerable" for spec in specs)


def table_specs(source: TaskSource, *, key: str) -> tuple[TableSpec, ...] | None:
    """The tables that a source names; None when it is a list of rows.

    Raises:
        ValueError: for a malformed text, or texts and rows in one list.
    """
    if isinstance(source, str | Path):
        return TableSpec.parse_all(str(source))
    texts = [item for item in source if isinstance(item, str)]
    if texts and len(texts) < len(source):
        raise ValueError(f"{key} mixes texts and rows; give either")
    return TableSpec.parse_all(texts) if texts else None


def stamped(specs: Sequence[TableSpec]) -> tuple[tuple[TableSpec, object], ...]:
    """Tables, each with what changes when its rows do: path, time and size of its file."""
    return tuple((spec, _stamp(spec)) for spec in specs)


def local_file(spec: TableSpec) -> Path | None:
    """The file that holds a split of a known hub id in `musique/` of the folder that TURNWISE_DATA names, or None."""
    folder = _local_folder()
    if folder is None:
        return None
    return next((folder / name for name in _local_names(spec) if (folder / name).is_file()), None)


@lru_cache(maxsize=16)
def _read_tables(specs: tuple[tuple[TableSpec, object], ...], key: str) -> tuple[Row, ...]:
    return _joined([row for spec, _ in specs for row in _read_table(spec, key)], key)


def _stamp(spec: TableSpec) -> object:
    path = spec.file() if spec.is_file else local_file(spec)
    if path is None or not path.is_file():
        return None
    stat = path.stat()
    return path, stat.st_mtime_ns, stat.st_size


def _read_table(spec: TableSpec, key: str) -> list[Row]:
    path = spec.file() if spec.is_file else local_file(spec)
    if path is None:
        rows = _read_hub(spec, key)
        places: Sequence[int] = range(len(rows))
    else:
        whole = read_jsonl(path, required=REQUIRED)
        places = spec.split.indices(len(whole))
        rows = [whole[place] for place in places]
        _warn_of_short_table(spec, len(whole), key)
    prefix = f"{Path(spec.dataset).stem if spec.is_file else spec.dataset}/{spec.split.name}"
    return [_identified(row, f"{prefix}/{place}") for place, row in zip(places, rows, strict=True)]


def _read_hub(spec: TableSpec, key: str) -> list[Row]:
    hub = spec.dataset if spec.configuration is None else f"{spec.dataset},{spec.configuration}"
    try:
        return read_hub(hub, spec.split, required=REQUIRED)
    except ValueError as error:
        folder = _local_folder()
        if folder is None or spec.dataset not in LOCAL_NAMES:
            raise ValueError(f"{key} = {str(spec)!r}: {error}") from error
        there = ", ".join(sorted(path.name for path in folder.glob("*.jsonl"))) or "no JSONL file"
        raise ValueError(
            f"{key} = {str(spec)!r}: {folder} has no split {spec.split.name!r} (it would be {_local_names(spec)[0]}; there is "
            f"{there}), and {error}. A split of one's own is made of parts of a file, "
            'such as train = "musique/FILE.jsonl[:80]" and validation = "musique/FILE.jsonl[80:]"'
        ) from error


def _warn_of_short_table(spec: TableSpec, size: int, key: str) -> None:
    stop = spec.split.stop
    if stop is not None and not stop.endswith("%") and int(stop) > size:
        logger.warning("%s = %r: there are only %d rows", key, str(spec), size)


def _local_folder() -> Path | None:
    data = data_folder()
    return data / "musique" if data is not None and (data / "musique").is_dir() else None


def _local_names(spec: TableSpec) -> list[str]:
    """Names under which a split may lie, the official ones first."""
    return [
        f"{name}_{configuration}_{split}.jsonl"
        for name in LOCAL_NAMES.get(spec.dataset, ())
        for configuration in LOCAL_CONFIGURATIONS.get(spec.configuration or "answerable", ())
        for base in LOCAL_SPLITS.get(spec.split.name, (spec.split.name,))
        for split in (f"v1.0_{base}", base, f"{base}_with_paragraphs")
    ]


def _identified(row: Row, place: str) -> Row:
    """With an id: its own or its place. The data set gives an unanswerable variant the id of the answerable question."""
    identifier = str(row.get("id") or place)
    return {**row, "id": identifier if is_answerable(row) else f"{identifier}/unanswerable"}


def _joined(rows: Sequence[Row], key: str) -> tuple[Row, ...]:
    by_id = {row["id"]: row for row in reversed(rows)}
    if len(by_id) < len(rows):
        logger.warning("%s: %d rows come more than once and are taken once", key, len(rows) - len(by_id))
    chosen = tuple(row for row in rows if by_id[row["id"]] is row)
    for row in chosen:
        Question.of(row)  # a broken row is told now, not in the middle of a run; 20,000 take a third of a second
    return chosen
