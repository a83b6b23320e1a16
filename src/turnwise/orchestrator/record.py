"""What is kept of a step: the metrics of its batch and of its training in one line, and the verdict on the run."""

import asyncio
import time
from collections.abc import Mapping

from turnwise.config import RLConfig
from turnwise.monitor import Conditions, Learning, Monitor, Verdict, console_line, read_metrics
from turnwise.orchestrator.evaluate import EvalResult
from turnwise.transport import BatchLog, RunDir, WeightsReady

Metrics = dict[str, float]

PATIENCE_LOG_S = 15.0  # between two lines that say what is being waited for


def say(text: str) -> None:
    """A line for whoever watches the log."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


async def say_again(text: str) -> None:
    """Say what is being waited for, now and then, until cancelled."""
    began = time.monotonic()
    while True:
        say(f"{text} ({time.monotonic() - began:.0f} s)")
        await asyncio.sleep(PATIENCE_LOG_S)


class Recorder:
    """Owns the metrics of the run."""

    def __init__(self, config: RLConfig) -> None:
        self.config, self.run_dir = config, RunDir(config.output_dir)
        self.log = BatchLog(self.run_dir.batches)
        self.conditions = Conditions(config.stop)
        self.conditions.replay(read_metrics(self.run_dir.metrics))
        self.monitor = Monitor(config, self.run_dir.root)
        self._batches: dict[int, Metrics] = {}  # metrics of batches that are not trained on yet
        self._told = self.learning.state

    @property
    def learning(self) -> Learning:
        """What the run does."""
        return self.conditions.learning

    def batch_written(self, step: int, metrics: Metrics) -> None:
        self._batches[step] = metrics

    def trained(self, ready: WeightsReady, extra: Mapping[str, float]) -> Verdict | None:
        """Record step n once version n is there: its batch, its training, and `extra`."""
        step = ready.version
        batch = self._batches.pop(step, None)
        if batch is None:  # written before a resume
            batch = self.log.read(step).metrics
        metrics = {**batch, **extra, **ready.metrics}
        verdict = self.conditions.update(step, metrics)
        self.monitor.log(step, metrics | self.conditions.learning.metrics())
        say(console_line(step, metrics, max_steps=self.config.max_steps))
        self._tell_learning()
        return verdict

    def evaluated(self, result: EvalResult) -> Verdict | None:
        result.write(self.run_dir.evals)
        self.monitor.log(result.step, result.metrics)
        say(console_line(result.step, result.metrics, max_steps=self.config.max_steps))
        verdict = self.conditions.update(result.step, result.metrics)
        self._tell_learning()
        return verdict

    def _tell_learning(self) -> None:
        """Say what the run does, when that has changed."""
        if self.learning.state is not self._told:
            self._told = self.learning.state
            say(self.learning.line)

    def has_evaluated(self, step: int) -> bool:
        return (self.run_dir.evals / f"step_{step}.json").exists()

    def close(self) -> None:
        self.monitor.close()
