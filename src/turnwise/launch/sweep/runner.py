"""The life of a sweep: start what waits where there is room, judge what has ended, and show and keep the state of it all."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from turnwise.config.differences import differences
from turnwise.config.files import read_toml
from turnwise.launch.run_folder import locked
from turnwise.launch.supervise import ExitCode, Interrupts
from turnwise.launch.sweep.plan import SweepPlan
from turnwise.launch.sweep.process import RL, last_words, next_mode, start
from turnwise.launch.sweep.track import Track
from turnwise.report.sweep import RunState, SweepRow
from turnwise.report.sweep_page import write_comparison, write_status

POLL_S = 0.5
PLACED = ("gpus.", "output_dir", "trajectories_dir", "run_name")  # where a run works, which is no part of what it does


class View(Protocol):
    """What the user sees meanwhile."""

    def say(self, text: str) -> None: ...

    def update(self, rows: Sequence[SweepRow]) -> None: ...


class Sweeper:
    """One sweep, until nothing is left to do or the user ends it.

    Every decision is made from the runs' own folders, so that a sweep that was killed goes on where it was: what is complete
    stays, what ended early is gone on with, and what still runs is taken over.
    """

    def __init__(self, plan: SweepPlan, view: View, *, rl: Sequence[str] = RL, poll_s: float = POLL_S) -> None:
        self.plan, self.view, self.rl, self.poll_s = plan, view, rl, poll_s
        self.tracks = [Track(run, plan.sweep) for run in plan.runs]
        self.interrupts = Interrupts()
        self.stopping = False
        self._hurried = False
        self._shown: list[SweepRow] = []
        self._compared: list[SweepRow] = []

    def run(self, *, retry: bool = False) -> ExitCode:
        """Run everything; `retry` also tries again what had failed for good.

        Raises:
            ConfigError: another sweep works in the folder.
            OSError: the file system refused.
        """
        with locked(self.plan.root), self.interrupts.caught():
            self.survey(retry=retry)
            self._keep(self._compare)
            while self.step():
                time.sleep(self.poll_s)
            self._keep(self._compare)
        return self._verdict()

    def survey(self, *, retry: bool = False) -> None:
        """Find out where every run stands."""
        for track in self.tracks:
            if retry and track.log.read().failures:
                track.log.try_again()
            track.survey()
            if track.process is not None:
                track.place = self._place_of(track)
                self.view.say(f"{track.run.label} runs already: taken over")
            elif changed := self._changed(track):
                self.view.say(
                    f"{track.run.label} began with other values, which it keeps (delete its folder to begin anew): {changed}"
                )
        self._show()

    def step(self) -> bool:
        """Look once at everything; False when nothing is left to wait for."""
        self._heed_interrupts()
        for track in self.tracks:
            if track.process is not None and track.process.over():
                self._settle(track)
        if not self.stopping:
            self._start_what_fits()
        self._show()
        running = [track for track in self.tracks if track.process is not None]
        return bool(running)

    def _start_what_fits(self) -> None:
        for place in range(len(self.plan.places)):
            while self._free(place) and (track := next((track for track in self.tracks if track.waiting), None)):
                self._start(track, place)

    def _start(self, track: Track, place: int) -> None:
        run, gpus = track.run, self.plan.places[place]
        mode = next_mode(run, self.plan.sweep.when_ended_early)
        try:
            track.begun(start(run, mode, gpus, self.plan.root, self.rl))
        except OSError as error:
            track.refused(f"cannot be started: {error}")
            return
        track.place = place
        words = {"new": "begins", "resume": "goes on", "rerun": "begins anew"}[mode]
        where = f" on GPUs {', '.join(map(str, track.gpus))}" if track.gpus else ""
        self.view.say(f"{run.label} {words}{where}")

    def _settle(self, track: Track) -> None:
        code = track.process.exit_code if track.process else None
        track.settle(stopping=self.stopping)
        if code == ExitCode.BAD_CONFIG and track.state is not RunState.COMPLETE:
            track.refused(last_words(self.plan.root, track.run.label))
        again = "; tries again" if track.waiting and not self.stopping else ""
        self.view.say(f"{track.run.label} {track.state}{f': {track.reason}' if track.reason else ''}{again}")
        self._show()
        self._keep(self._compare)

    def _heed_interrupts(self) -> None:
        if self.interrupts.once and not self.stopping:
            self.stopping = True
            self.view.say("Stopping: each run finishes its step and writes a checkpoint. Press Ctrl-C again to end them at once.")
            self._interrupt_runs()
        if self.interrupts.twice and not self._hurried:
            self._hurried = True
            self.view.say("Interrupted again: ending all runs at once.")
            self._interrupt_runs()

    def _interrupt_runs(self) -> None:
        for track in self.tracks:
            if track.process is not None and not track.process.interrupt():
                self.view.say(f"{track.run.label} was not started by a sweep: it goes on")
                track.process = None

    def _free(self, place: int) -> bool:
        """Whether nobody runs there, or on one of its GPUs."""
        gpus = set(self.plan.places[place] or ())
        running = [track for track in self.tracks if track.process is not None]
        if self.plan.places[place] is None:
            return not running
        return all(track.place != place and not gpus & set(track.gpus) for track in running)

    def _place_of(self, track: Track) -> int | None:
        """Where a run that was taken over belongs; None where its GPUs are those of no place."""
        taken = {other.place for other in self.tracks if other.process is not None}
        fitting = [at for at, gpus in enumerate(self.plan.places) if gpus is None or set(track.gpus) <= set(gpus)]
        return next((at for at in fitting if at not in taken), None)

    def _changed(self, track: Track) -> str:
        """What a run that has begun does otherwise than its files now say."""
        file = self.plan.root / "configs" / f"{track.run.label}.toml"
        if not track.evidence.begun or not file.exists():
            return ""
        found = differences(read_toml(file), track.run.tables)
        return "; ".join(str(difference) for difference in found if not difference.key.startswith(PLACED))

    def _show(self) -> None:
        """Draw the state, and keep it where it has changed."""
        rows = [track.row() for track in self.tracks]
        if rows != self._shown:
            self._shown = rows
            self._keep(lambda: write_status(self.plan.root, self.plan.sweep, rows))
        self.view.update(rows)

    def _compare(self) -> None:
        """Write the page about all runs, unless nothing has changed since the last time."""
        if self._shown == self._compared:
            return
        self._compared = self._shown
        metrics = {track.run.label: track.evidence.metrics for track in self.tracks if track.evidence.metrics}
        write_comparison(self.plan.root, self.plan.sweep, self._shown, metrics, self.plan.shortened)

    def _keep(self, write: Callable[[], object]) -> None:
        """Write a page; a disk that is full, say, is told and ends no run."""
        try:
            write()
        except (OSError, ValueError) as error:
            self.view.say(f"A page of the sweep could not be written: {error}")

    def _verdict(self) -> ExitCode:
        if all(track.state is RunState.COMPLETE for track in self.tracks):
            return ExitCode.DONE
        return ExitCode.INTERRUPTED if self.stopping else ExitCode.FAILED
