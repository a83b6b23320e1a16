"""One call per step, the same names everywhere."""

import logging
import math
import numbers as number_types
import re
from collections.abc import Mapping
from pathlib import Path

from turnwise.config import RLConfig
from turnwise.monitor.history import read_metrics
from turnwise.monitor.sinks import JsonlSink, Sink, finite
from turnwise.monitor.tensorboard_sink import TensorBoardSink

NONFINITE = "monitor/nonfinite/count"

logger = logging.getLogger(__name__)


class Monitor:
    """Writes metrics to `metrics.jsonl`, and to TensorBoard as configured.

    metrics.jsonl is the record: a failure to write it is raised. TensorBoard is a view of it: one that fails is left out
    with a warning and the run goes on. W&B and MLflow read the record, in a process of their own (`monitor/track.py`).

    Args:
        config: the resolved configuration.
        run_root: folder of the run; an existing metrics.jsonl there is continued.

    Raises:
        OSError: the run folder cannot be written.
    """

    def __init__(self, config: RLConfig, run_root: Path) -> None:
        self.nonfinite = 0  # values that were NaN or infinite so far
        self._warned: set[str] = set()
        self._jsonl = JsonlSink(run_root / "metrics.jsonl")
        self._views: list[Sink] = []
        name = config.run_name or run_root.resolve().name
        if config.monitor.tensorboard:
            last = max((line["step"] for line in read_metrics(self._jsonl.path)), default=None)
            folder = run_root / "tensorboard" / (re.sub(r"[^\w.-]+", "_", name) or "run")
            self._views.append(TensorBoardSink(folder, config, resume_step=None if last is None else last + 1))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step; may be called again for the same step with others, such as an evaluation's.

        NaN and infinity are written as null and counted under `monitor/nonfinite/count`.

        Raises:
            TypeError: a value is not a number.
            OSError: metrics.jsonl cannot be written.
        """
        clean = {name: self._clean(step, name, value) for name, value in metrics.items()}
        if bad := sum(value is None for value in clean.values()):
            clean[NONFINITE] = float(bad)
        self._jsonl.log(step, clean)
        for view in list(self._views):
            self._guarded(view, "log", step, finite(clean))

    def close(self) -> None:
        """Flush and close everything; a second call does nothing."""
        self._jsonl.close()
        while self._views:
            self._guarded(self._views.pop(), "close")

    def _clean(self, step: int, name: str, value: object) -> float | None:
        if not isinstance(value, number_types.Real):
            raise TypeError(f"metric {name} of step {step} is {value!r}, which is not a number; convert it with float()")
        number = float(value)
        if math.isfinite(number):
            return number
        self.nonfinite += 1
        if name not in self._warned:
            self._warned.add(name)
            logger.warning("metric %s is %s at step %d; it is written as null", name, number, step)
        return None

    def _guarded(self, view: Sink, method: str, *args: object) -> None:
        """A view never ends a run: its first failure is reported, and it is left out from then on."""
        try:
            getattr(view, method)(*args)
        except Exception as error:  # network, disk quota, a service that went away: the record itself is in metrics.jsonl
            logger.warning(
                "%s stopped (%s: %s); metrics go on in %s", type(view).__name__, type(error).__name__, error, self._jsonl.path
            )
            if view in self._views:
                self._views.remove(view)
