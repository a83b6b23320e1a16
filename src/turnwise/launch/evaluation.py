"""`turnwise eval`: the held-out evaluation of a checkpoint, with engines that live as long as it does."""

import asyncio
import re
import tempfile
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from turnwise.config import ConfigError, RLConfig
from turnwise.inference.launcher import check_engine
from turnwise.launch.allocation import allocate
from turnwise.launch.engines import Engines
from turnwise.launch.gpus import look
from turnwise.launch.models import Progress, resolve_model
from turnwise.launch.quantized import quantized_model
from turnwise.launch.resolve import changed, check_template, with_defaults, write_resolved

REASONS_SHOWN = 3


def evaluate(config: RLConfig, checkpoint: Path | None, say: Progress = print) -> dict[str, Any]:
    """Evaluate a checkpoint on the held-out tasks; the untrained model for None. Nothing is left running afterwards.

    Returns:
        {"step", "version", "metrics", "rollouts"}, as in evals/step_N.json.

    Raises:
        ConfigError: the checkpoint is not there, or the engines do not start.
    """
    version = _step_of(checkpoint) if checkpoint else 0
    check_template(config)
    model = _model_of(config, checkpoint, say)
    own = checkpoint is not None and (checkpoint / "model").is_dir()  # saved with the values that it was trained with
    quantized = None if own else quantized_model(config, model, say, trains=False)
    with tempfile.TemporaryDirectory(prefix="turnwise-eval-") as scratch:
        # a saved configuration names the port of its run, which may be going on
        here = changed(config, {"output_dir": Path(scratch), "inference": {"port": None}})
        resolved = with_defaults(here, max_steps=1, model=model, quantized=quantized)
        write_resolved(resolved, Path(scratch) / "config.toml")
        return _with_engines(resolved, _adapter_of(checkpoint), version, say)


def print_evaluation(metrics: Mapping[str, float], console: Console | None = None) -> None:
    """The metrics as a table, each mean with its standard error."""
    table = Table(title="Held-out evaluation", title_justify="left")
    for column in ("metric", "value", "standard error"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name in sorted(metrics):
        if not name.endswith("/stderr"):
            error = metrics.get(f"{name.removesuffix('/mean')}/stderr")
            table.add_row(name, f"{metrics[name]:.4f}", "" if error is None else f"{error:.4f}")
    (console or Console()).print(table)


def failures(rollouts: Sequence[Mapping[str, Any]]) -> str | None:
    """How many rollouts count in no mean, and the most frequent reasons; None where all of them count."""
    errors = Counter(str(rollout["error"]) for rollout in rollouts if rollout["error"] is not None)
    if not errors:
        return None
    reasons = " | ".join(reason for reason, _ in errors.most_common(REASONS_SHOWN))
    return f"{errors.total()} of {len(rollouts)} rollouts ended with an error and count in no mean. Reasons: {reasons}"


def _with_engines(config: RLConfig, adapter: Path | None, version: int, say: Progress) -> dict[str, Any]:
    check_engine(config)
    machine = look()
    if errors := allocate(config, machine, "only the engine runs", evaluation=True).errors:
        raise ConfigError("\n".join(errors))
    with Engines(config, machine, run_id=uuid.uuid4().hex) as engines:
        return asyncio.run(_evaluate(config, engines, adapter, version, say))


async def _evaluate(config: RLConfig, engines: Engines, adapter: Path | None, version: int, say: Progress) -> dict[str, Any]:
    from turnwise.orchestrator.evaluate import evaluate_checkpoint

    say("starting the engine")
    await engines.serving()
    say("evaluating")
    async with engines.client() as client:
        return await evaluate_checkpoint(config, adapter, version, client)


def _model_of(config: RLConfig, checkpoint: Path | None, say: Progress) -> str:
    """The base model for an adapter; the checkpoint's own weights after full fine-tuning."""
    if checkpoint and (checkpoint / "model").is_dir():
        return str((checkpoint / "model").resolve())
    return resolve_model(config.model.name, say)


def _adapter_of(checkpoint: Path | None) -> Path | None:
    """The adapter of a checkpoint; None after full fine-tuning, where the engine starts with its weights.

    Raises:
        ConfigError: the checkpoint holds neither.
    """
    if checkpoint is None or (checkpoint / "model").is_dir():
        return None
    adapter = (checkpoint / "adapter").resolve()
    if not (adapter / "adapter_config.json").is_file():
        raise ConfigError(f"--checkpoint {checkpoint} holds neither an adapter/ nor a model/ folder; it may be incomplete.")
    return adapter


def _step_of(checkpoint: Path) -> int:
    match = re.fullmatch(r"step_(\d+)", checkpoint.resolve().name)
    if not checkpoint.is_dir() or not match:
        raise ConfigError(f"--checkpoint {checkpoint} is not a checkpoints/step_N folder (looked from {Path.cwd()})")
    return int(match[1])
