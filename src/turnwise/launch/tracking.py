"""The tracker of a run as seen from `rl`: a process beside the others, which nothing waits for but the end of the run."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from turnwise.config import ConfigError, RLConfig
from turnwise.launch.child import tail
from turnwise.launch.supervise import Outcome
from turnwise.launch.watch import Progress
from turnwise.monitor.held_out import evaluations
from turnwise.monitor.mlflow_sink import missing_for_mlflow
from turnwise.monitor.tracking import ENDING, FOLDER, PLACES, Ending
from turnwise.monitor.wandb_sink import missing_for_wandb
from turnwise.transport import RunDir

QUIET_S = 2.0  # of waiting before a word about it
SLACK_S = 10.0  # beyond the time for uploads, which the tracker keeps itself
TOLD_LINES = 5


def is_tracked(config: RLConfig) -> bool:
    """Whether a run is followed by a service."""
    return config.mlflow is not None or (config.wandb is not None and config.wandb.mode != "disabled")


def check_tracking(config: RLConfig) -> None:
    """Raises ConfigError when a package or an account is missing; the message names all of it."""
    missing = [
        problem
        for problem in (
            config.wandb and missing_for_wandb(config.wandb),
            config.mlflow and missing_for_mlflow(config.mlflow),
        )
        if problem
    ]
    if missing:
        raise ConfigError("\n".join(missing))


class TrackingProcess:
    """Started with the run; told at its end how it went.

    In a session of its own, without the mark of the run's processes: it outlives them, to take the report along. It ends by
    itself some time after its stdin, and so after `rl`, however that ended.
    """

    def __init__(self, config: RLConfig, argv: Sequence[str] | None = None) -> None:
        run_dir = RunDir(config.output_dir)
        self.log, self.timeout_s = run_dir.logs / "tracking.stdout", config.monitor.upload_timeout_s
        self._places = run_dir.root / FOLDER / PLACES
        for left in (self._places, run_dir.root / FOLDER / ENDING):  # by an earlier start
            left.unlink(missing_ok=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self._since = output.tell()
            self._process = subprocess.Popen(
                argv or (sys.executable, "-m", "turnwise.monitor.track", "--config", str(run_dir.config)),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def conclude(self, ending: Ending, say: Callable[[str], None]) -> None:
        """Tell how the run ended, wait for the uploads, and say what became of them. Ctrl-C ends the wait."""
        if self._process.stdin:
            with suppress(BrokenPipeError):  # it is gone already, and its log says why
                self._process.stdin.write(ending.line().encode())
                self._process.stdin.close()
        code = self._wait(say)
        lines = self._places.read_text().splitlines() if self._places.exists() else []
        if code or not lines:
            last = tail(self.log, TOLD_LINES, since=self._since)
            lines += [f"Tracking ended early (exit code {code}); its log is {self.log}:", *(f"  {line}" for line in last)]
        for line in lines:
            say(line)

    def _wait(self, say: Callable[[str], None]) -> int:
        """Exit code of the process, which is gone then."""
        try:
            with suppress(subprocess.TimeoutExpired):
                return self._process.wait(QUIET_S)
            say(f"Uploading what is left of the run, for {self.timeout_s:g} s at most (Ctrl-C: leave it).")
            return self._process.wait(self.timeout_s + SLACK_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self._process.kill()
            return self._process.wait()


def ending_of(outcome: Outcome, progress: Progress) -> Ending:
    """What a tracker is told of a run's end."""
    learning = progress.learning
    summary: dict[str, str | float] = {"step": progress.step, "verdict": str(learning.state), "verdict_reason": learning.reason}
    if found := evaluations(progress.evals):
        best = max(found, key=lambda one: one.reward)  # the earlier wins a tie
        summary |= {"best_step": best.step, "best_held_out_reward": best.reward, "last_held_out_reward": found[-1].reward}
    return Ending(outcome.code.name.lower(), outcome.reason, int(outcome.code), summary)
