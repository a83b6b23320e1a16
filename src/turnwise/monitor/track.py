"""`python -m turnwise.monitor.track --config CONFIG`: uploads a run while it goes on, in a process of its own.

It reads the run folder and nothing else, so that whatever a service or a network does can neither slow nor end a run.
How the run ended is a line of JSON on stdin; stdin's end without one is the end of `rl` itself. From then on there are
`monitor.upload_timeout_s` seconds left.
"""

import argparse
import fcntl
import logging
import os
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from turnwise.config import RLConfig, load_config
from turnwise.monitor.follow import Follower
from turnwise.monitor.mlflow_sink import MlflowTracker
from turnwise.monitor.secrets import Redactor
from turnwise.monitor.tracking import Ending, Tracker
from turnwise.monitor.wandb_sink import WandbTracker

POLL_S = 1.0
NICENESS = 10  # behind everything that trains
OVERDUE = 3  # exit code when uploads took too long

Make = Callable[[], Tracker]

logger = logging.getLogger(__name__)


class Tracking:
    """The trackers of a run, each left out, with a warning, once it fails.

    Args:
        makers: by the trackers' names; a tracker that cannot be made is left out.
    """

    def __init__(self, follower: Follower, redactor: Redactor, makers: dict[str, Make]) -> None:
        self.follower, self.redactor = follower, redactor
        self.trackers: list[Tracker] = []
        for name, make in makers.items():
            with self._guarded(name):
                self.trackers.append(make())

    def catch_up(self) -> None:
        """Pass on what is new in the run folder."""
        for record in self.follower.records():
            for tracker in list(self.trackers):
                with self._guarded(tracker.name, tracker):
                    tracker.log(record)
        for checkpoint in self.follower.checkpoints():
            for tracker in list(self.trackers):
                with self._guarded(tracker.name, tracker):
                    tracker.checkpoint(checkpoint)

    def finish(self, ending: Ending) -> list[str]:
        """Pass on what is left, the report and the ending; returns where to look."""
        self.catch_up()
        report, places = self.follower.report(), list[str]()
        for tracker in list(self.trackers):
            with self._guarded(tracker.name, tracker):
                places.append(f"{tracker.name}: {tracker.finish(ending, report)}")
        return places

    @contextmanager
    def _guarded(self, name: str, tracker: Tracker | None = None) -> Generator[None]:
        try:
            yield
        except Exception as error:  # network, quota, a changed service: the record itself is in the run folder
            problem = self.redactor.text(f"{type(error).__name__}: {error}")
            logger.warning("%s stopped (%s); the run goes on, its metrics are in metrics.jsonl", name, problem)
            if tracker in self.trackers:
                self.trackers.remove(tracker)


class Leash:
    """The end of the run, as stdin tells it, and the time that is left then."""

    def __init__(self, timeout_s: float) -> None:
        self.ending = Ending()
        self.ended = threading.Event()
        self._timeout_s = timeout_s
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        self.ending = Ending.parse(sys.stdin.readline())
        timer = threading.Timer(self._timeout_s, self._give_up)
        timer.daemon = True
        timer.start()
        self.ended.set()

    def _give_up(self) -> None:
        """Not by an exception: what hangs may hang in a library."""
        print(f"not all was uploaded within monitor.upload_timeout_s = {self._timeout_s:g}", flush=True)
        os._exit(OVERDUE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Follow a run to its end."""
    parser = argparse.ArgumentParser(prog="python -m turnwise.monitor.track", description="Uploads a run while it goes on.")
    parser.add_argument("--config", type=Path, required=True, help="resolved config.toml of the run")
    config = load_config(parser.parse_args(arguments).config)
    logging.basicConfig(stream=sys.stdout, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    os.nice(NICENESS)
    leash = Leash(config.monitor.upload_timeout_s)
    folder = config.output_dir / "tracking"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the tracker of an earlier start may still be uploading; its own leash ends it
        places = follow(config, leash)
    (folder / "places").write_text("".join(f"{place}\n" for place in places))
    return 0


def follow(config: RLConfig, leash: Leash) -> list[str]:
    """Track a run until it ends; returns where to look."""
    redactor = Redactor(config.model_dump(mode="json"))
    wandb, mlflow, makers = config.wandb, config.mlflow, dict[str, Make]()
    if wandb is not None and wandb.mode != "disabled":
        makers["W&B"] = lambda: WandbTracker(config, wandb, redactor)
    if mlflow is not None:
        makers["MLflow"] = lambda: MlflowTracker(config, mlflow, redactor)
    samples, interval = (wandb.samples, wandb.samples_interval) if wandb else (0, None)
    tracking = Tracking(Follower(config, redactor, samples=samples, interval=interval), redactor, makers)
    while tracking.trackers and not leash.ended.wait(POLL_S):
        tracking.catch_up()
    return tracking.finish(leash.ending)


if __name__ == "__main__":
    sys.exit(main())
