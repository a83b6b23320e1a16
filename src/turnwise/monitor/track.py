"""`python -m turnwise.monitor.track --config CONFIG`: uploads a run while it goes on, in a process of its own.

It reads the run folder and nothing else, so that whatever a service or a network does can neither slow nor end a run.
How the run ended is a line of JSON on stdin; stdin's end without one is the end of `rl` itself, or, where an earlier process
was told the ending of this run, sends what that one could not. From then on there are `monitor.upload_timeout_s` seconds left.
"""

import argparse
import fcntl
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from turnwise.config import RLConfig, load_config
from turnwise.monitor.follow import Follower
from turnwise.monitor.mlflow_sink import MlflowTracker
from turnwise.monitor.secrets import Redactor
from turnwise.monitor.tracking import ENDING, FOLDER, PLACES, Ending, Tracker
from turnwise.monitor.wandb_sink import WandbTracker

POLL_S = 1.0
NICENESS = 10  # behind everything that trains
OVERDUE = 3  # exit code when uploads took too long
FIRST_PAUSE_S, LONGEST_PAUSE_S = 60.0, 600.0  # before a tracker that failed is tried again

Make = Callable[[], Tracker]
Follow = Callable[[], Follower]

logger = logging.getLogger(__name__)


class Followed:
    """One tracker, and how far it has followed the run. One that failed is made again later where that is of use.

    Args:
        name: of the service.
        make: a tracker, which remembers what it was sent before.
        follow: a follower from the beginning of the run.
        again: whether to try again, after `FIRST_PAUSE_S` and twice as long each time; W&B repeats requests itself.
        clock: seconds.
    """

    def __init__(
        self, name: str, make: Make, follow: Follow, redactor: Redactor, *, again: bool, clock: Callable[[], float]
    ) -> None:
        self.name, self.is_over = name, False
        self._make, self._follow, self._redactor, self._again, self._clock = make, follow, redactor, again, clock
        self._tracker: Tracker | None = None
        self._follower = follow()
        self._pause, self._due, self._told = FIRST_PAUSE_S, clock(), False

    def catch_up(self, *, at_once: bool = False) -> None:
        """Pass on what is new in the run folder; after a failure only when it is time for that, or `at_once`."""
        if self.is_over or (self._tracker is None and self._clock() < self._due and not at_once):
            return
        with self._guarded():
            tracker = self._tracker or self._made()
            for record in self._follower.records():
                tracker.log(record)
            for checkpoint in self._follower.checkpoints():
                tracker.checkpoint(checkpoint)
            self._tracker = tracker
            if self._told:
                logger.warning("%s goes on; what it lacked has been sent", self.name)
                self._pause, self._told = FIRST_PAUSE_S, False

    def finish(self, ending: Ending) -> str | None:
        """Pass on what is left, the report and the ending; returns where to look, or None when not all of it was taken."""
        self.catch_up(at_once=True)
        place: str | None = None
        with self._guarded():
            if self._tracker is not None:
                place = self._tracker.finish(ending, self._follower.report())
        return place

    def _made(self) -> Tracker:
        self._follower = self._follow()
        return self._make()

    @contextmanager
    def _guarded(self) -> Generator[None]:
        try:
            yield
        except Exception as error:  # network, quota, a changed service: the record itself is in the run folder
            problem = self._redactor.text(f"{type(error).__name__}: {error}")
            self._tracker, self.is_over = None, not self._again
            if not self._told:
                what = "stopped" if self.is_over else "does not answer as it should, and is tried again later"
                logger.warning("%s %s (%s); the run goes on, its metrics are in metrics.jsonl", self.name, what, problem)
            self._told, self._due = True, self._clock() + self._pause
            self._pause = min(2 * self._pause, LONGEST_PAUSE_S)


class Tracking:
    """The trackers of a run. None of them keeps another from following.

    Args:
        makers: a tracker and a follower by the trackers' names.
        again: names of those that are tried again when they have failed.
    """

    def __init__(
        self,
        redactor: Redactor,
        makers: Mapping[str, tuple[Make, Follow]],
        *,
        again: Collection[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.followed = [
            Followed(name, make, follow, redactor, again=name in again, clock=clock) for name, (make, follow) in makers.items()
        ]

    @property
    def is_over(self) -> bool:
        """Whether nothing will be sent any more."""
        return all(one.is_over for one in self.followed)

    def catch_up(self) -> None:
        """Pass on what is new in the run folder."""
        for one in self.followed:
            one.catch_up()

    def finish(self, ending: Ending) -> dict[str, str | None]:
        """Pass on what is left, the report and the ending; where to look by tracker, None where not all of it was taken."""
        return {one.name: one.finish(ending) for one in self.followed}


class Leash:
    """The end of the run, as stdin tells it, and the time that is left then.

    Args:
        timeout_s: seconds after that, before this process ends.
        told: file that keeps the line for a later process, which is told none.
    """

    def __init__(self, timeout_s: float, told: Path) -> None:
        self.ending, self._told = Ending(), told
        self.ended = threading.Event()
        self._timeout_s = timeout_s
        threading.Thread(target=self._wait, daemon=True).start()

    def _wait(self) -> None:
        line = sys.stdin.readline()
        if line:
            self._told.write_text(line)
        elif self._told.exists():
            line = self._told.read_text()
        self.ending = Ending.parse(line)
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
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # each repeated request; the last one's failure is told in any case
    folder = config.output_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    leash = Leash(config.monitor.upload_timeout_s, folder / ENDING)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the tracker of an earlier start may still be uploading; its own leash ends it
        places = follow(config, leash)
    (folder / PLACES).write_text("".join(f"{place}\n" for place in places))
    return 0


def follow(config: RLConfig, leash: Leash) -> list[str]:
    """Track a run until it ends; returns where to look."""
    redactor = Redactor(config.model_dump(mode="json"))
    wandb, mlflow, makers = config.wandb, config.mlflow, dict[str, tuple[Make, Follow]]()
    if wandb is not None and wandb.mode != "disabled":
        samples, interval = wandb.samples, wandb.samples_interval
        makers["W&B"] = (
            lambda: WandbTracker(config, wandb, redactor),
            lambda: Follower(config, redactor, samples=samples, interval=interval),
        )
    if mlflow is not None:
        makers["MLflow"] = (
            lambda: MlflowTracker(config, mlflow, redactor),
            lambda: Follower(config, redactor, samples=0, interval=None),
        )
    tracking = Tracking(redactor, makers, again=("MLflow",))
    tracking.catch_up()
    while not tracking.is_over and not leash.ended.wait(POLL_S):
        tracking.catch_up()
    leash.ended.wait()  # what is left to say is how the run ended
    return [f"{name}: {place or rest(config)}" for name, place in tracking.finish(leash.ending).items()]


def rest(config: RLConfig) -> str:
    """What to tell of a tracker that did not take all of a run."""
    log, command = config.output_dir / "logs" / "tracking.stdout", "python -m turnwise.monitor.track --config"
    return (
        f"not all of the run was sent; {log} says why, and `{command} {config.output_dir}/config.toml </dev/null` sends the rest"
    )


if __name__ == "__main__":
    sys.exit(main())
