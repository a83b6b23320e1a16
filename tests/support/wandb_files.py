"""Reads what W&B wrote for an offline run: its log of records (LevelDB's log format around protobuf messages)."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HEADER_BYTES = 7  # of the file: magic and version
BLOCK_BYTES = 32 * 1024
CHUNK_HEADER = struct.Struct("<IHB")  # CRC-32, length, type
FULL, LAST = 1, 4


@dataclass
class Recorded:
    """One start of a run, as its file holds it."""

    run_id: str = ""
    group: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, str] = field(default_factory=dict)  # metric or glob -> its step metric
    artifacts: list[tuple[str, list[str], list[str]]] = field(default_factory=list)  # name, aliases, files
    exit_code: int | None = None

    def names(self) -> set[str]:
        """Names of numbers in the history, without W&B's own."""
        numbers = (name for row in self.history for name, value in row.items() if isinstance(value, int | float))
        return {name for name in numbers if not name.startswith("_")}

    def aliases(self, kind: str) -> list[list[str]]:
        return [aliases for name, aliases, _ in self.artifacts if name.startswith(kind)]


def recorded_runs(root: Path) -> list[Recorded]:
    """The starts of the run in a run folder, oldest first."""
    return [read_run(path) for path in sorted(root.glob("wandb/offline-run-*/run-*.wandb"))]


def read_run(path: Path) -> Recorded:
    from wandb.proto import wandb_internal_pb2

    found = Recorded()
    for content in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            found.run_id, found.group, found.tags = run.run_id, run.run_group, list(run.tags)
            found.config |= {item.key: json.loads(item.value_json) for item in run.config.update}
        elif kind == "history":
            found.history.append(_items(record.history.item))
        elif kind == "summary":
            found.summary |= _items(record.summary.update)
        elif kind == "metric":
            found.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "artifact":
            files = [entry.path for entry in record.artifact.manifest.contents]
            found.artifacts.append((record.artifact.name, list(record.artifact.aliases), files))
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found


def _items(items: Any) -> dict[str, Any]:
    """By key; tables and pictures are several items, each with a path of two keys."""
    found: dict[str, Any] = {}
    for item in items:
        first, *rest = item.nested_key or [item.key]
        if rest:
            found.setdefault(first, {})[rest[0]] = json.loads(item.value_json)
        else:
            found[first] = json.loads(item.value_json)
    return found


def _records(data: bytes) -> Iterator[bytes]:
    """Records, put together from their chunks; a chunk never crosses the border of a block."""
    position, parts = HEADER_BYTES, b""
    while position + HEADER_BYTES <= len(data):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < HEADER_BYTES:
            position += left
            continue
        _, length, kind = CHUNK_HEADER.unpack_from(data, position)
        position += HEADER_BYTES
        parts += data[position : position + length]
        position += length
        if kind in (FULL, LAST):
            yield parts
            parts = b""
