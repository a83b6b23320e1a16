"""`turnwise eval`: the held-out evaluation of a checkpoint, with engines that live as long as it does."""

import asyncio
import re
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from turnwise.config import ConfigError, RLConfig
from turnwise.inference.launcher import check_engine
from turnwise.launch.allocation import allocate
from turnwise.launch.child import Child
from turnwise.launch.gpus import look
from turnwise.launch.models import Progress, resolve_model
from turnwise.launch.plan import engines, shared_environment
from turnwise.launch.quantized import quantized_model
from turnwise.launch.resolve import changed, check_template, with_defaults, write_resolved
from turnwise.launch.survivors import end_all
from turnwise.launch.warden import Warden

GRACE_S = 10.0
POLL_S = 0.25


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


def _with_engines(config: RLConfig, adapter: Path | None, version: int, say: Progress) -> dict[str, Any]:
    run_id = uuid.uuid4().hex
    check_engine(config)
    machine = look()
    if errors := allocate(config, machine, "only the engine runs", evaluation=True).errors:
        raise ConfigError("\n".join(errors))
    warden = Warden(run_id, config.output_dir / "logs" / "warden.stdout", grace_s=GRACE_S)
    try:
        children = [Child(spec) for spec in engines(config, shared_environment(run_id), machine)]
        try:
            return asyncio.run(_evaluate(config, children, adapter, version, say))
        finally:
            end_all(run_id, GRACE_S)
            for child in children:
                child.reap()
    finally:
        warden.dismiss()


async def _evaluate(config: RLConfig, children: list[Child], adapter: Path | None, version: int, say: Progress) -> dict[str, Any]:
    from turnwise.inference.client import InferenceClient
    from turnwise.orchestrator.evaluate import evaluate_checkpoint

    say("starting the engine")
    await _serving(children, config.inference.startup_timeout_s)
    say("evaluating")
    urls = [str(child.spec.health_url).removesuffix("/health") for child in children]
    inference = config.inference
    async with InferenceClient(
        urls, model=config.model.name, request_timeout_s=inference.request_timeout_s, max_retries=inference.max_retries
    ) as client:
        return await evaluate_checkpoint(config, adapter, version, client)


async def _serving(children: list[Child], timeout_s: float) -> None:
    """Wait until every engine serves.

    Raises:
        ConfigError: one ended, or took too long; with the last lines of its log.
    """
    for _ in range(max(1, int(timeout_s / POLL_S))):
        for child in children:
            if child.exit_code() is not None:
                cause = child.likely_cause()
                told = [f"Likely cause: {cause}"] if cause else []
                raise ConfigError("\n".join([f"{child.name} {child.ending()}. Its last lines:", *child.last_lines(20), *told]))
        if all([await asyncio.to_thread(child.check_health) for child in children]):
            return
        await asyncio.sleep(POLL_S)
    raise ConfigError(f"the engine did not serve within {timeout_s:.0f} s; raise inference.startup_timeout_s")


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
