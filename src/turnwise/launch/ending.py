"""What `rl` says and leaves when a run has ended: the report, before and after, the checkpoint, how to go on."""

from pathlib import Path

from turnwise.launch.run_folder import steps_of
from turnwise.launch.supervise import ExitCode, Outcome
from turnwise.launch.watch import Progress, Watch
from turnwise.transport import RunDir


def ending_lines(outcome: Outcome, run_dir: RunDir, progress: Progress, resume_command: str) -> list[str]:
    """The last lines of a run, the important ones last."""
    lines: list[str] = []
    if outcome.log_tail:
        lines += ["", "Its last lines:", *(f"  {line}" for line in outcome.log_tail), ""]
    lines += [f"{_heading(outcome)} at step {progress.step} of {progress.max_steps}: {outcome.reason}"]
    if outcome.cause:
        lines.append(f"Likely cause: {outcome.cause}")
    if progress.rewards or progress.evals:
        lines.append(f"Verdict: {progress.learning}")
        if progress.learning.remedy:
            lines.append(f"What to do: {progress.learning.remedy}")
    lines += before_and_after(progress)
    checkpoints = steps_of(run_dir.checkpoints, "")
    if checkpoints:
        lines.append(f"Checkpoint: {checkpoints[-1][1]}")
    if run_dir.report.exists():
        lines.append(f"Report: {run_dir.report}")
    if outcome.code != ExitCode.DONE:
        lines.append(
            f"Go on with: {resume_command}" + ("" if checkpoints else "  (no checkpoint yet: from the recorded batches)")
        )
    return lines


def before_and_after(progress: Progress) -> list[str]:
    """Held-out scores at the first and the last evaluation."""
    if len(progress.evals) < 2:
        return []
    first, last = min(progress.evals), max(progress.evals)
    lines: list[str] = []
    for name in sorted(progress.evals[first].keys() & progress.evals[last].keys()):
        if not name.endswith("/mean"):
            continue
        label = name.removeprefix("val-core/").removesuffix("/mean")
        before, after = (_with_error(progress.evals[step], name) for step in (first, last))
        lines.append(f"Held out, {label}: {before} at step {first} -> {after} at step {last}")
    return lines


def write_report_if_possible(run_dir: RunDir) -> str | None:
    """Write report.md; returns what went wrong instead of raising, since the run itself is done and kept."""
    from turnwise.report import write_report

    try:
        write_report(run_dir.root)
    except (OSError, ValueError) as error:
        return f"The report could not be written: {error}"
    return None


def look_again(run_root: Path, max_steps: int) -> Progress:
    """The state of a finished run, read from its beginning."""
    watch = Watch(RunDir(run_root), max_steps)
    watch.look()
    return watch.progress


def _heading(outcome: Outcome) -> str:
    return {
        ExitCode.DONE: "Done",
        ExitCode.FAILED: "Failed",
        ExitCode.INTERRUPTED: "Interrupted",
        ExitCode.ABORTED: "Aborted",
        ExitCode.KILLED: "Ended at once",
    }.get(outcome.code, "Ended")


def _with_error(scores: dict[str, float], name: str) -> str:
    stderr = scores.get(name.removesuffix("mean") + "stderr")
    return f"{scores[name]:.3f}" + ("" if stderr is None else f" ± {stderr:.3f}")
