"""Start the processes of a run, watch over them, and end them together: done, failed, or interrupted."""

import signal
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from types import FrameType
from typing import Protocol

from turnwise.launch.child import Child
from turnwise.launch.plan import Plan
from turnwise.launch.survivors import end_all, kill_all
from turnwise.launch.warden import Warden
from turnwise.transport import Control
from turnwise.transport.control import StopKind

POLL_S = 0.1
HEALTH_POLL_S = 0.5
ECHO_S = 0.1  # two signals closer than this are one key press that came twice, from the terminal and from a parent process
TAIL_LINES = 20


class ExitCode(IntEnum):
    """What `rl` returns."""

    DONE = 0
    FAILED = 1
    BAD_CONFIG = 2
    INTERRUPTED = 3  # with a checkpoint: --resume goes on
    ABORTED = 4  # by a condition of [stop]
    KILLED = 130  # interrupted twice: ended at once


@dataclass(frozen=True)
class Deadlines:
    """Seconds that processes get."""

    startup_s: float = 900.0  # until every engine answers /health
    stop_s: float = 1800.0  # for the step in progress and its checkpoint, once a stop was asked for
    rescue_s: float = 120.0  # for a checkpoint after another process failed
    grace_s: float = 10.0  # between SIGTERM and SIGKILL


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    code: ExitCode
    reason: str
    log_tail: tuple[str, ...] = ()  # last lines of the process that failed
    cause: str | None = None  # what its log says about it, and what helps, where that is known


class View(Protocol):
    """What the user sees meanwhile."""

    def say(self, text: str) -> None: ...

    def update(self, children: Sequence[Child]) -> None: ...


class Interrupts:
    """Counts requests of the user to stop. SIGHUP (a closed terminal) asks once, however often it comes."""

    def __init__(self) -> None:
        self._presses = 0
        self._hung_up = False
        self._last = float("-inf")

    @contextmanager
    def caught(self) -> Generator["Interrupts"]:
        """Take over the signals inside the block."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def once(self) -> bool:
        return self._presses >= 1 or self._hung_up

    @property
    def twice(self) -> bool:
        return self._presses >= 2

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._hung_up = True
            return
        now = time.monotonic()
        if now - self._last > ECHO_S:
            self._presses += 1
        self._last = now


class Supervisor:
    """One run, from the start of its processes until none of them is left."""

    def __init__(
        self, plan: Plan, run_id: str, view: View, *, deadlines: Deadlines | None = None, lock_descriptor: int | None = None
    ) -> None:
        self.plan = plan
        self.run_id = run_id
        self.view = view
        self.deadlines = deadlines or Deadlines()
        self.control = Control(plan.run_dir.root)
        self.interrupts = Interrupts()
        self.children: list[Child] = []
        self._lock_descriptor = lock_descriptor
        self._next_health = 0.0
        self._stop_asked: float | None = None
        self._last_batch: float | None = (
            None  # when the orchestrator had ended: the trainer has only its checkpoint left to write
        )

    def run(self) -> Outcome:
        """Start everything and return when everything has ended. Nothing of the run is left then, also after an error here."""
        log = self.plan.run_dir.logs / "warden.stdout"
        with self.interrupts.caught():
            warden = Warden(self.run_id, log, grace_s=self.deadlines.grace_s, lock_descriptor=self._lock_descriptor)
            try:
                self._start()
                outcome = self._watch()
                self._end()
            finally:
                kill_all(self.run_id)
                for child in self.children:
                    child.reap()
                warden.dismiss()
        return outcome

    def _start(self) -> None:
        for spec in self.plan.processes:
            self.children.append(Child(spec))

    def _watch(self) -> Outcome:
        while True:
            if self.interrupts.twice:
                self.view.say("Interrupted again: ending everything at once.")
                return Outcome(ExitCode.KILLED, "interrupted twice; steps since the last checkpoint are lost")
            if self.interrupts.once and self._stop_asked is None and (refused := self._ask_to_stop()):
                return Outcome(ExitCode.FAILED, refused)
            if failed := self._failed():
                return self._rescue(failed)
            if self._finished():
                return self._verdict()
            if late := self._overdue():
                return Outcome(ExitCode.FAILED, late)
            self._check_health()
            self.view.update(self.children)
            time.sleep(POLL_S)

    def _workers(self) -> list[Child]:
        return [child for child in self.children if child.spec.role != "inference"]

    def _finished(self) -> bool:
        return all(child.exit_code() == 0 for child in self._workers())

    def _failed(self) -> Child | None:
        """A process whose end was not due. Engines must outlive the run; once it was asked to stop, they no longer matter."""
        for child in self.children:
            code = child.exit_code()
            if code is None or (child.spec.role != "inference" and code == 0):
                continue
            if child.spec.role == "inference" and (self._stop_asked is not None or self._finished()):
                continue
            return child
        return None

    def _overdue(self) -> str | None:
        """What took longer than it may, in words."""
        now = time.monotonic()
        for child in self.children:
            if not child.healthy and now - child.started > self.deadlines.startup_s:
                return (
                    f"{child.name} did not answer {child.spec.health_url} within {self.deadlines.startup_s:.0f} s; "
                    f"see {child.spec.log}, or raise inference.startup_timeout_s"
                )
        running = [child.name for child in self._workers() if child.exit_code() is None]
        if self._stop_asked is not None and now - self._stop_asked > self.deadlines.stop_s:
            return f"{', '.join(running)} did not end within {self.deadlines.stop_s:.0f} s after it was asked to stop"
        if running == ["trainer"]:
            self._last_batch = self._last_batch or now
            if now - self._last_batch > self.deadlines.stop_s:
                return f"the trainer did not end within {self.deadlines.stop_s:.0f} s after the orchestrator had"
        return None

    def _check_health(self) -> None:
        now = time.monotonic()
        if now < self._next_health:
            return
        self._next_health = now + HEALTH_POLL_S
        for child in self.children:
            if not child.healthy and child.check_health():
                self.view.say(f"{child.name} serves after {time.monotonic() - child.started:.0f} s")

    def _ask_to_stop(self) -> str | None:
        """File the user's request to stop; returns why that cannot be done."""
        self._stop_asked = time.monotonic()
        if refused := self._request("interrupted", "interrupted by the user"):
            return refused
        self.view.say("Stopping: the trainer finishes its step and writes a checkpoint. Press Ctrl-C again to end at once.")
        return None

    def _request(self, kind: StopKind, reason: str) -> str | None:
        """File a request to stop unless there is one; returns why the file cannot be written."""
        try:
            if self.control.stop_request() is None:
                self.control.request_stop(kind, reason)
        except OSError as error:
            return f"the request to stop cannot be written: {error}"
        return None

    def _rescue(self, failed: Child) -> Outcome:
        """After a process failed: let the trainer save what it has, where it still can."""
        reason = self._reason(failed)
        told = f"{reason}; its log is {failed.spec.log}"
        outcome = Outcome(ExitCode.FAILED, told, tuple(failed.last_lines(TAIL_LINES)), failed.likely_cause())
        trainers = [child for child in self.children if child.spec.role == "trainer" and child.exit_code() is None]
        if trainers and self._stop_asked is None and self._request("failed", reason) is None:
            self.view.say(f"{reason}. The trainer writes a checkpoint before everything ends (Ctrl-C: end at once).")
            self._wait(trainers, self.deadlines.rescue_s, lambda: self.interrupts.once)
        return outcome

    def _reason(self, failed: Child) -> str:
        """Why a process ended, where the orchestrator has said so to the others; else how."""
        request = self.control.stop_request()
        if failed.spec.role == "orchestrator" and request is not None and request.kind == "failed":
            return request.reason
        return f"{failed.name} {failed.ending()}"

    def _wait(self, children: Sequence[Child], seconds: float, hurry: Callable[[], bool]) -> None:
        deadline = time.monotonic() + seconds
        while any(child.exit_code() is None for child in children) and time.monotonic() < deadline and not hurry():
            self.view.update(self.children)
            time.sleep(POLL_S)

    def _verdict(self) -> Outcome:
        request = self.control.stop_request()
        if request is None:
            return Outcome(ExitCode.DONE, "all steps done")
        codes = {
            "success": ExitCode.DONE,
            "interrupted": ExitCode.INTERRUPTED,
            "abort": ExitCode.ABORTED,
            "failed": ExitCode.FAILED,
        }
        return Outcome(codes[request.kind], request.reason)

    def _end(self) -> None:
        """End what still runs: engines after an orderly run, everything after a failure."""
        if self.interrupts.twice:
            return
        end_all(self.run_id, self.deadlines.grace_s, hurry=lambda: self.interrupts.twice)
