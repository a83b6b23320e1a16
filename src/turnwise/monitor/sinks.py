"""The record of a run, metrics.jsonl, and what a view beside it has to offer."""

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

logger = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes finite numbers under their names."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """`metrics.jsonl`: the record that conditions, resume and the report read. Whole lines only, also after a failure."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._drop_torn_line()
        self._file = path.open("ab", buffering=0)

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Append one line.

        Raises:
            OSError: the file system refused; the file holds the lines before.
        """
        line = json.dumps({"step": step, "time": round(time.time(), 3), **metrics}, allow_nan=False).encode() + b"\n"
        size = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(f"only {written} of {len(line)} bytes were written: is the disk full?")
        except OSError as error:
            os.truncate(self.path, size)
            raise OSError(
                error.errno, f"step {step} could not be recorded ({error.strerror or error})", str(self.path)
            ) from error

    def close(self) -> None:
        self._file.close()

    def _drop_torn_line(self) -> None:
        """A process killed while writing leaves a line without its end; the next line must not be glued to it."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            logger.warning("%s: dropped a line that was cut off after %d characters", self.path, len(content) - whole)
            os.truncate(self.path, whole)


def finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Only what can be drawn."""
    return {name: float(value) for name, value in metrics.items() if value is not None and math.isfinite(value)}
