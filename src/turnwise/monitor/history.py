"""Values of metrics over steps: in memory for conditions, and as `metrics.jsonl` holds them."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


class History:
    """Values of the metrics that somebody asks about, by step. A later value of the same step replaces the earlier."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.step = 0
        self._values: dict[str, dict[int, float]] = {}

    def record(self, step: int, name: str, value: float) -> None:
        """Keep a value; NaN and infinity are no values."""
        if math.isfinite(value):
            self._values.setdefault(name, {})[step] = value

    def values(self, name: str, window: int | None = None) -> list[float]:
        """Values of the last `window` steps, oldest first; all of them for None."""
        series = self._values.get(name, {})
        return [series[step] for step in sorted(series) if window is None or step > self.step - window]

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values, oldest first."""
        series = self._values.get(name, {})
        steps = sorted(series)
        return steps, [series[step] for step in steps]

    def at(self, name: str, steps: Iterable[int]) -> list[float]:
        """Values of those steps that have one, in their order."""
        series = self._values.get(name, {})
        return [series[step] for step in steps if step in series]

    def latest(self, name: str) -> float | None:
        series = self._values.get(name)
        return series[max(series)] if series else None

    def running_mean(self, name: str, window: int | None = None) -> float | None:
        """Mean over the last `window` steps (default: the history's own); None until the metric spans so many.

        A mean over fewer steps would let one lucky batch pass for success.
        """
        window = window or self.window
        values = self.values(name, window)
        if not values or self.step - min(self._values[name]) + 1 < window:
            return None
        return math.fsum(values) / len(values)


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Lines of a `metrics.jsonl`, oldest first. A torn last line, left by a killed process, is left out.

    Raises:
        ValueError: a line in the middle is not a JSON object with a `step`; the message names file and line.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.endswith(b"\n"):
            return
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a metrics line ({error!r}); remove it to go on") from error
        yield record


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a line: its finite numbers, without `step` and `time`."""
    found = {name: value for name, value in record.items() if name not in ("step", "time")}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float) and math.isfinite(value)}
