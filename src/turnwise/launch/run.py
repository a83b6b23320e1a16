"""One run from a checked request to its exit code: folder, defaults, plan, supervision, report."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from turnwise.config import ConfigError, RLConfig
from turnwise.config.command import Request, check
from turnwise.inference.launcher import check_engine
from turnwise.launch import resume
from turnwise.launch.allocation import allocate
from turnwise.launch.describe import arithmetic_lines, weights_line
from turnwise.launch.ending import ending_lines, look_again, write_report_if_possible
from turnwise.launch.gpus import Machine, look
from turnwise.launch.hints import environment_hints
from turnwise.launch.last_steps import record_last_steps
from turnwise.launch.live import make_view
from turnwise.launch.plan import compose
from turnwise.launch.resolve import Resolved, resolve, write_resolved
from turnwise.launch.run_folder import clean, holds_run, locked, refuse_existing
from turnwise.launch.shape import known_shape
from turnwise.launch.supervise import Deadlines, ExitCode, Outcome, Supervisor
from turnwise.launch.tracking import TrackingProcess, check_tracking, ending_of, is_tracked
from turnwise.launch.watch import Watch
from turnwise.transport import RunDir

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What the command line says beside the configuration."""

    resume: bool = False
    clean: bool = False
    plain: bool = False
    command: str = "rl"  # what to type to go on, without --resume and --clean


def run(request: Request, options: Options, say: Say = print) -> ExitCode:
    """Do a run.

    Raises:
        ConfigError: it cannot start; the message is complete.
    """
    root = output_root(request)
    if options.resume:
        request = resume.resumed_request(request, root)
    config = check(request)
    for line in (*request.notices, *request.changes):
        say(line)
    with locked(root) as lock:
        if not (options.resume or options.clean):
            refuse_existing(root)
        machine = look()
        resolved = allocated(resolve(config, say), say, machine)
        check_engine(resolved.config)
        check_tracking(resolved.config)
        heed_hints(resolved.config, say)
        step = resume.latest_checkpoint(root, say) if options.resume else None
        if step is not None and _is_complete(resolved.config, step):
            say(f"This run is complete: step {step} of {resolved.config.max_steps}. Give a larger --max-steps to go on.")
            return ExitCode.DONE
        _make_room(resolved.config, options, step, say)
        write_resolved(resolved.config, root / "config.toml")
        return _supervise(resolved, machine, options, step, lock, say)


def allocated(resolved: Resolved, say: Say, machine: Machine) -> Resolved:
    """The same on the GPUs of `machine`.

    Raises:
        ConfigError: GPUs are missing or too small; the message names all of it.
    """
    config = resolved.config
    uses_gpus = bool(config.gpus.inference or config.gpus.trainer)
    allocation = allocate(config, machine, known_shape(config.model.name) if uses_gpus else "no GPU is used")
    if allocation.errors:
        raise ConfigError("\n".join(allocation.errors))
    for line in allocation.lines():
        say(line)
    return replace(resolved, config=allocation.config)


def heed_hints(config: RLConfig, say: Say) -> None:
    """Say what environments and their containers need.

    Raises:
        ConfigError: something without which no rollout can begin; the message names all of it.
    """
    hints = environment_hints(config)
    for hint in hints:
        if not hint.fatal:
            say(hint.text)
    if fatal := [hint.text for hint in hints if hint.fatal]:
        raise ConfigError("\n".join(fatal))


def output_root(request: Request) -> Path:
    """Absolute folder of the run that a request means."""
    return Path(str(request.tables.get("output_dir", RLConfig().output_dir))).expanduser().resolve()


def _make_room(config: RLConfig, options: Options, step: int | None, say: Say) -> None:
    """Forget what the new processes will write again: everything, or what came after the checkpoint."""
    root, trajectories = config.output_dir, config.trajectories_dir or config.output_dir / "trajectories"
    if step is not None:
        resume.rewind(root, trajectories, step)
        say(f"Resuming after step {step}")
    elif options.clean and holds_run(root):
        removed = clean(root, trajectories)
        say(f"Deleted the run in {root} ({', '.join(sorted({path.name for path in removed}))})")


def _is_complete(config: RLConfig, step: int) -> bool:
    """Whether nothing is left to do after `step`, the final evaluation included."""
    evaluated = (RunDir(config.output_dir).evals / f"step_{step}.json").exists()
    return config.max_steps is not None and step >= config.max_steps and evaluated


def _supervise(resolved: Resolved, machine: Machine, options: Options, step: int | None, lock: int, say: Say) -> ExitCode:
    config = resolved.config
    run_id = uuid.uuid4().hex
    plan = compose(config, run_id=run_id, resume_step=step, machine=machine)
    for line in [*arithmetic_lines(resolved.arithmetic, config), weights_line(config)]:
        say(line)
    say(f"Logs: {plan.run_dir.logs}/{{inference,orchestrator,trainer}}.stdout")
    view = make_view(Watch(plan.run_dir, resolved.arithmetic.max_steps), str(config.run_name), plain=options.plain)
    tracking = TrackingProcess(config) if is_tracked(config) else None
    deadlines = Deadlines(startup_s=config.inference.startup_timeout_s, stop_s=config.trainer.timeout_s)
    try:
        outcome = Supervisor(plan, run_id, view, deadlines=deadlines, lock_descriptor=lock).run()
    finally:
        view.close()
    _conclude(outcome, config, options, tracking, say)
    return outcome.code


def _conclude(outcome: Outcome, config: RLConfig, options: Options, tracking: TrackingProcess | None, say: Say) -> None:
    run_dir = RunDir(config.output_dir)
    try:
        record_last_steps(config)
    except (OSError, ValueError) as error:
        say(f"The last steps could not be recorded: {error}")
    if outcome.code != ExitCode.KILLED and run_dir.metrics.exists() and (trouble := write_report_if_possible(run_dir)):
        say(trouble)
    progress = look_again(run_dir.root, config.max_steps or 0)
    if tracking is not None:
        tracking.conclude(ending_of(outcome, progress), say)
    for line in ending_lines(outcome, run_dir, progress, f"{options.command} --resume"):
        say(line)
