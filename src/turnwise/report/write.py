"""`report.md`: what a run did, in the order in which somebody asks."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import ValidationError

from turnwise.config import StopConfig
from turnwise.monitor import Conditions
from turnwise.monitor.expressions import ExpressionError
from turnwise.report.balance import Balance
from turnwise.report.changes import changes, conclusion, table
from turnwise.report.check_page import check_section
from turnwise.report.dialogue import dialogue, pick
from turnwise.report.findings import findings
from turnwise.report.plots import draw_run, smoothed
from turnwise.report.run import Run, Variety, replies, rollouts_of
from turnwise.transport import RunDir

PACKAGES = ("turnwise", "torch", "transformers", "peft", "vllm", "renderers", "gymnasium", "datasets")
SUMMARY_KEYS = (
    *("model.name", "max_steps", "seed", "seq_len", "orchestrator.batch_size", "orchestrator.rollouts_per_example"),
    *("orchestrator.max_staleness", "orchestrator.sampling.temperature", "orchestrator.sampling.max_tokens"),
    *("trainer.model.lora.rank", "trainer.optim.lr", "trainer.loss.kind", "inference.engine", "gpus.inference", "gpus.trainer"),
    "stop.success_when",
)


def write_report(run_root: Path) -> Path:
    """Write `report.md` with pictures under `report/`, and `report/changes.json`. Works on half-finished runs.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: metrics.jsonl has a broken line; the message names it.
        OSError: the file system refused.
    """
    run = Run.load(run_root)
    folder = run_root / "report"
    pictures = draw_run(run, folder)
    sections = [
        _summary(run),
        _warnings(run),
        _changes(run),
        _curves(pictures, run_root),
        _variety(run),
        _samples(run),
        check_section(run_root),
        _about(run),
    ]
    folder.mkdir(exist_ok=True)
    (folder / "changes.json").write_text(json.dumps([change.as_dict() for change in changes(run)], indent=2) + "\n")
    path = RunDir(run_root).report
    draft = path.with_suffix(".tmp")
    draft.write_text("\n\n".join([f"# Report: {run.name}", *filter(None, sections)]) + "\n", encoding="utf-8")
    draft.rename(path)
    return path


def _summary(run: Run) -> str:
    steps, planned = run.train_steps, run.config.get("max_steps")
    if not steps:
        return "No optimiser step has been recorded yet." + (f" Planned: {planned}." if planned else "")
    seconds = sum(run.step_seconds()[1])
    lines = [
        f"- {_verdict(run)}",
        f"- Steps: {steps[-1]}" + (f" of {planned}" if planned else "") + (f", {_duration(seconds)} of steps" if seconds else ""),
    ]
    lines += [f"- {conclusion(changes(run))}"]
    lines += [f"- Best step: {best}" for best in [best_step(run)] if best]
    lines += [f"- {success}" for success in [_success(run)] if success]
    lines += [f"- Who waited: {balance.verdict}" for balance in [Balance.of(run)] if balance]
    return "\n".join(lines)


def _verdict(run: Run) -> str:
    """What the run did; what to do about it is among the warnings."""
    reason = run.learning.reason
    return f"**Verdict: {run.learning.state}.** {reason[:1].upper()}{reason[1:]}."


def best_step(run: Run) -> str:
    """The step with the highest held-out reward (mean over environments), else the highest smoothed training reward."""
    names = run.names("val-core/", "/reward/mean")
    scores = {step: [values[name] for name in names if name in values] for step, values in run.metrics.items()}
    means = {step: sum(found) / len(found) for step, found in scores.items() if found and len(found) == len(names)}
    if means:
        step = max(means, key=lambda step: means[step])
        return f"{step}, held-out reward {means[step]:.3f}{_checkpoint_note(run, step)}"
    steps, rewards = run.series("critic/reward/mean")
    if not steps:
        return ""
    reward, step = max(zip(smoothed(rewards, 5), steps, strict=True))
    return f"{step}, training reward {reward:.3f} (mean of 5 steps; nothing held out was evaluated){_checkpoint_note(run, step)}"


def _checkpoint_note(run: Run, step: int) -> str:
    if step in run.checkpoints():
        return f" (checkpoints/step_{step})"
    return " (its checkpoint was not kept)" if step else " (the untrained model)"


def _success(run: Run) -> str:
    """First step where `stop.success_when` held, found again from the recorded metrics."""
    try:
        stop = StopConfig.model_validate(run.config.get("stop", {}))
        conditions = Conditions(stop)
    except (ValidationError, ExpressionError) as error:
        return f"`stop` of config.toml cannot be read by this version: {str(error).splitlines()[0]}"
    if stop.success_when is None:
        return ""
    conditions.replay({"step": step, **values} for step, values in run.metrics.items())
    if conditions.first_success is None:
        return f"Success condition `{stop.success_when}` was not reached."
    return f"Success condition `{stop.success_when}` first held at step {conditions.first_success}."


def _warnings(run: Run) -> str:
    found = [f"- **{f.title}.** {f.evidence}. *What to do:* {f.remedy}." for f in findings(run)]
    return "## Warnings\n\n" + ("\n".join(found) if found else "None of the checks found anything.")


def _changes(run: Run) -> str:
    found = changes(run)
    if not found:
        return "## Before and after\n\nThis needs two evaluations; " + (
            f"there is one, of step {run.eval_steps[0]}." if run.eval_steps else "there is none."
        )
    note = (
        f"Held-out tasks, evaluated at step {run.eval_steps[0]} and step {run.eval_steps[-1]}. A verdict other than *unchanged* "
        "means a difference of at least three standard errors; whether a rise is good depends on the metric."
    )
    return f"## Before and after\n\n{note}\n\n{table(found)}"


def _curves(pictures: list[tuple[str, Path]], root: Path) -> str:
    if not pictures:
        return ""
    return "## Curves\n\n" + "\n\n".join(
        f"{caption}.\n\n![{caption}]({path.relative_to(root).as_posix()})" for caption, path in pictures
    )


def _variety(run: Run) -> str:
    """How many different replies there are: a policy that says one thing has stopped to play."""
    rows: list[str] = []
    sources = [(f"training, step {step}", run.rollouts(step)) for step in _first_middle_last(run.trajectory_steps())]
    sources += [(f"held-out, step {step}", rollouts_of(run.evals[step])) for step in _first_middle_last(list(run.evals))]
    for label, rollouts in sources:
        variety = Variety.of(replies(rollouts))
        if variety is not None:
            shown = " ".join(variety.most_common.split())[:60].replace("|", "\\|").replace("`", "'")
            share = f"{variety.distinct / variety.replies:.0%}"
            rows.append(
                f"| {label} | {variety.replies} | {variety.distinct} ({share}) | {variety.most_common_share:.0%} | `{shown}` |"
            )
    header = "| rollouts | replies | distinct | share of the commonest | the commonest |\n|---|---:|---:|---:|---|"
    return "## Variety of replies\n\n" + "\n".join([header, *rows]) if rows else ""


def _samples(run: Run) -> str:
    parts: list[str] = []
    for step in _first_middle_last(run.trajectory_steps()):
        for label, rollout in pick(run.rollouts(step)):
            parts.append(f"### Step {step}, {label}\n\n{dialogue(rollout, with_system=not parts)}")
    return "## Sample rollouts\n\n" + "\n\n".join(parts) if parts else ""


def _about(run: Run) -> str:
    rows = [f"| {key} | `{value}` |" for key in SUMMARY_KEYS if (value := _get(run, key)) not in (None, [])]
    envs = [str(env.get("id")) for env in run.config.get("orchestrator", {}).get("env", []) if isinstance(env, dict)]
    rows += [f"| environments | `{', '.join(envs)}` |"] if envs else []
    kept = run.checkpoints()
    resume = f"- Go on: `rl @ {run.root / 'config.toml'} --resume`" + (
        f" (newest checkpoint: step {kept[-1]})" if kept else " (no checkpoint yet)"
    )
    versions = ", ".join(f"{name} {found}" for name in PACKAGES if (found := _version(name)))
    summary = (
        "## Configuration\n\n| key | value |\n|---|---|\n" + "\n".join(rows) + "\n\nAll of it: [config.toml](config.toml)."
        if rows
        else ""
    )
    return f"{summary}\n\n## To repeat or go on\n\n{resume}\n- Written by Python {platform.python_version()}, {versions}.".strip()


def _get(run: Run, key: str) -> object:
    value: object = run.config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _first_middle_last(steps: list[int]) -> list[int]:
    return sorted({steps[0], steps[len(steps) // 2], steps[-1]}) if steps else []


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s" if minutes else f"{rest} s"
