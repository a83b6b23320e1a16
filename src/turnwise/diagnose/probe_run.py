"""Starting the probe: the trainer's own torchrun command, with another program in the trainer's place."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import replace

import msgspec

from turnwise.config import RLConfig
from turnwise.diagnose.core import CheckFailed
from turnwise.diagnose.probe_report import ProbeReport, read_report
from turnwise.launch.child import Child
from turnwise.launch.gpus import Machine, look
from turnwise.launch.models import Progress
from turnwise.launch.plan import RANK_PREFIX, ProcessSpec, engines, shared_environment, trainer_spec
from turnwise.launch.resolve import write_resolved
from turnwise.launch.survivors import end_all
from turnwise.launch.warden import Warden
from turnwise.transport import Batch, RunDir, write_atomic

PROGRAM = ("-m", "turnwise.diagnose.probe")
NAME = "trainer_probe"  # of the process and its log
GRACE_S = 10.0
POLL_S = 0.1
TAIL_LINES = 20
PATIENCE = 2  # times trainer.timeout_s
ERROR = "] error: "  # stands between the rank and what it says before it ends in order
STAGE = f"{RANK_PREFIX}0] probe: "
HELPS = "\nWhat helps: "  # as in `likely_cause`


def run_probe(
    config: RLConfig,
    batch: Batch,
    say: Progress,
    *,
    machine: Machine | None = None,
    run_id: str | None = None,
    program: Sequence[str] | None = None,
) -> ProbeReport:
    """Measure a batch in the processes of a trainer. Nothing of them is left running afterwards.

    Where they fail after a first measurement, the report has those that were made, and in `failure` what ended them.

    Args:
        config: resolved; written to `output_dir/config.toml`, as published versions are to `output_dir/weights`.
        batch: of step 1.
        say: told how far it is.
        machine: this one when left out.
        run_id: of the session, in which the probe gets an identifier of its own.
        program: what torchrun starts in every process, `PROGRAM` when None; tests put a faulty one here.

    Raises:
        CheckFailed: they failed before anything was measured.
    """
    run_dir = RunDir(config.output_dir)
    folder = run_dir.root / "probe"
    out = folder / "report.json"
    out.unlink(missing_ok=True)
    write_resolved(config, run_dir.config)
    write_atomic(folder / "batch.msgpack", msgspec.msgpack.encode(batch))
    own_id = f"{run_id or uuid.uuid4().hex}-probe"
    machine, shared = machine or look(), shared_environment(own_id)
    spec = trainer_spec(
        config,
        shared,
        machine,
        engines(config, shared, machine) if config.gpus.shared else [],
        name=NAME,
        program=program or PROGRAM,
        arguments=("--batch", str(folder / "batch.msgpack"), "--out", str(out)),
    )
    spec.log.unlink(missing_ok=True)
    say("starting the trainer's processes")
    child, failure = _run(spec, own_id, say, timeout_s=config.trainer.timeout_s)
    if not out.exists():
        failure = failure or "the trainer's processes left no report"
        raise _failed(failure, child)
    report = msgspec.structs.replace(read_report(out), log=str(spec.log))
    if not failure:
        return report
    if report.logprobs is None:
        raise _failed(failure, child)
    return msgspec.structs.replace(report, failure=failure, tail=child.last_lines(TAIL_LINES))


def _run(spec: ProcessSpec, run_id: str, say: Progress, *, timeout_s: float) -> tuple[Child, str]:
    """Start the processes and wait for their end; returns why they failed, or nothing."""
    warden = Warden(run_id, spec.log.with_name("warden.stdout"), grace_s=GRACE_S)
    try:
        child = Child(spec)
        try:
            return child, _follow(child, say, timeout_s=timeout_s)
        finally:
            end_all(run_id, GRACE_S)
            child.reap()
    finally:
        warden.dismiss()


def _follow(child: Child, say: Progress, *, timeout_s: float) -> str:
    """Wait for the end, telling each stage; returns why it failed, or nothing.

    Every stage is made of collectives, whose deadline is `timeout_s`: where none begins for much longer, none will.
    """
    latest = time.monotonic()
    with child.spec.log.open(encoding="utf-8", errors="replace") as log:
        unfinished = ""
        while True:
            code = child.exit_code()  # before the log is read, so that nothing of it is missed
            *lines, unfinished = (unfinished + log.read()).split("\n")
            for stage in (line.removeprefix(STAGE) for line in lines if line.startswith(STAGE)):
                say(f"measuring {stage}")
                latest = time.monotonic()
            if code is not None:
                return _reason(child) if code else ""
            if time.monotonic() - latest > PATIENCE * timeout_s:
                return f"the trainer's processes told nothing new for {PATIENCE} times trainer.timeout_s = {timeout_s:g} s"
            time.sleep(POLL_S)


def _reason(child: Child) -> str:
    """Why the processes ended: in their own words where they could say it, else in those of `launch.causes`."""
    own = [line.partition(ERROR)[2] for line in child.last_lines(TAIL_LINES) if line.startswith(RANK_PREFIX) and ERROR in line]
    if own:
        return own[-1]
    cause = child.likely_cause()
    return f"the trainer's command {child.ending()}" + (f": {cause}" if cause else "")


def _failed(failure: str, child: Child) -> CheckFailed:
    evidence, _, remedy = failure.partition(HELPS)
    failed = CheckFailed(evidence, remedy or f"read the log, {child.spec.log}")
    failed.finding = replace(failed.finding, lines=tuple(child.last_lines(TAIL_LINES)))
    return failed
