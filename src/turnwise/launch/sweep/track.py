"""One run of a sweep while the sweep goes on: where it stands, judged by its folder, and what is to be done with it."""

from turnwise.config.sweep import SweepConfig
from turnwise.launch.run_folder import is_held
from turnwise.launch.supervise import ExitCode
from turnwise.launch.sweep.attempts import AttemptLog
from turnwise.launch.sweep.evidence import Evidence, FolderReader
from turnwise.launch.sweep.plan import PlannedRun
from turnwise.launch.sweep.process import RunProcess, alive
from turnwise.report.sweep import RunState, SweepRow, scores_of

BY_USER = (ExitCode.INTERRUPTED, ExitCode.KILLED)


class Track:
    """The state of a run, which is derived from its folder whenever nobody works in it."""

    def __init__(self, run: PlannedRun, sweep: SweepConfig) -> None:
        self.run, self.sweep = run, sweep
        self.log = AttemptLog(run.folder)
        self.state = RunState.PENDING
        self.reason = ""
        self.waiting = False  # to be started, for the first time or again
        self.process: RunProcess | None = None
        self.place: int | None = None  # index of the place where it runs
        self._folder = FolderReader(run.folder)
        self._attempts = self.log.read()

    @property
    def evidence(self) -> Evidence:
        return self._folder.read()

    @property
    def gpus(self) -> tuple[int, ...]:
        """The GPUs of its last start."""
        return self._attempts.gpus

    def survey(self) -> None:
        """Find out where the run stands, from its folder alone; one that somebody works in is taken over."""
        self._attempts, evidence = self.log.read(), self.evidence
        if is_held(self.run.folder) or alive(self._attempts):
            self.begun(RunProcess(self.run, None, self._attempts))
        else:
            self._judge(evidence)

    def begun(self, process: RunProcess) -> None:
        """It runs now."""
        self._attempts = self.log.read()
        self.process, self.state, self.reason, self.waiting = process, RunState.RUNNING, "", False

    def settle(self, *, stopping: bool) -> None:
        """Its process is over: note how, and judge the run again. `stopping`: the sweep had asked it to end."""
        assert self.process is not None, f"{self.run.label} does not run"
        code, evidence = self.process.exit_code, self.evidence
        by_user = (
            stopping or code in BY_USER or (code is None and evidence.stop is not None and evidence.stop.kind == "interrupted")
        )
        failed = not (evidence.complete or evidence.aborted or by_user or code == ExitCode.BAD_CONFIG)
        self.log.ended(exit_code=code, step=evidence.step, failed=failed)
        self._attempts = self.log.read()
        self.process = self.place = None
        self._judge(evidence)
        if self.state is RunState.ENDED_EARLY and by_user:
            self.waiting = False  # whoever interrupted it did not want it now; the next sweep goes on with it
            self.reason = f"interrupted at {evidence.lack}" if evidence.begun else "interrupted before it began"

    def refused(self, why: str) -> None:
        """It cannot be started as things are."""
        self.state, self.reason, self.waiting = RunState.FAILED, why, False

    def row(self) -> SweepRow:
        """What tables show of it."""
        evidence, attempts = self.evidence, self._attempts
        return SweepRow(
            label=self.run.label,
            experiment=self.run.experiment.id,
            title=self.run.experiment.title,
            seed=self.run.seed,
            folder=self.run.folder,
            state=self.state,
            reason=self.reason,
            step=evidence.step,
            max_steps=evidence.max_steps,
            scores=scores_of(evidence.metrics, self.sweep.metric),
            started=attempts.started,
            ended=attempts.ended,
            attempts=attempts.count,
            gpus=attempts.gpus,
            verdict=evidence.verdict,
        )

    def _judge(self, evidence: Evidence) -> None:
        failures, most = self._attempts.failures, self.sweep.max_attempts
        if evidence.complete:
            self.state, self.reason, self.waiting = RunState.COMPLETE, "", False
        elif evidence.aborted:
            self.state, self.reason, self.waiting = RunState.ENDED_EARLY, evidence.lack, False
        elif failures >= most:
            self.state, self.waiting = RunState.FAILED, False
            self.reason = f"{evidence.lack}{self._exit()}; {failures} of max_attempts = {most} starts failed"
        elif evidence.begun or failures:
            self.state, self.reason, self.waiting = RunState.ENDED_EARLY, evidence.lack + self._exit(), True
        else:
            self.state, self.reason, self.waiting = RunState.PENDING, "", True

    def _exit(self) -> str:
        """How its last process ended, where that is known and bad."""
        code = self._attempts.exit_code
        if code is None or code == 0:
            return ""
        return f", ended by signal {-code}" if code < 0 else f", exit code {code}"
