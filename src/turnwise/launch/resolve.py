"""From what the user wrote to what the processes read: every default that depends on something else is filled in."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turnwise.config import ConfigError, RLConfig
from turnwise.config.files import dump_toml, merge
from turnwise.launch.arithmetic import Arithmetic, CountTasks, count_tasks, training_arithmetic
from turnwise.launch.models import Progress, resolve_model
from turnwise.launch.noise import check_noise
from turnwise.launch.ports import check_free, free_range
from turnwise.launch.quantized import quantized_model
from turnwise.transport import write_atomic


@dataclass(frozen=True)
class Resolved:
    """A configuration with nothing left open, and the arithmetic that fixed its length."""

    config: RLConfig
    arithmetic: Arithmetic


def resolve(config: RLConfig, progress: Progress = print, count: CountTasks = count_tasks) -> Resolved:
    """Fill in everything: paths, model folder, steps, replicas, ports, adapter slots.

    Raises:
        ConfigError: something that the configuration names is not there, or a port is in use.
    """
    check_conditions(config)
    check_template(config)
    arithmetic = training_arithmetic(config, count)
    check_noise(arithmetic, config)
    model = resolve_model(config.model.name, progress, weights=config.model.load_format != "dummy")
    quantized = quantized_model(config, model, progress)
    filled = with_defaults(config, max_steps=arithmetic.max_steps, model=model, quantized=quantized)
    return Resolved(filled, arithmetic)


def with_defaults(
    config: RLConfig, *, max_steps: int, model: str, quantized: Path | None = None, port: int | None = None
) -> RLConfig:
    """The configuration with its dependent defaults.

    Raises:
        ConfigError: `inference.port` is in use.
    """
    root = config.output_dir.expanduser().resolve()
    trajectories = (config.trajectories_dir or root / "trajectories").expanduser().resolve()
    changes: dict[str, Any] = {
        "output_dir": root,
        "trajectories_dir": trajectories,
        "run_name": config.run_name or root.name,
        "max_steps": max_steps,
        "epochs": None,
        "model": {"name": model, "quantized": quantized},
        "inference": {
            "dp": config.replicas,
            "port": port or _port(config),
            "max_loras": config.adapter_slots,
            "embedded": {"deterministic": config.deterministic},
        },
        "orchestrator": {"max_inflight": config.orchestrator.inflight_limit},
        "trainer": {"processes": len(config.gpus.trainer) or config.trainer.processes or 1},
    }
    if config.model.chat_template:
        changes["model"]["chat_template"] = config.model.chat_template.expanduser().resolve()
    return changed(config, changes)


def changed(config: RLConfig, changes: Mapping[str, Any]) -> RLConfig:
    """A copy with some values replaced, validated again."""
    return RLConfig.model_validate(merge(config.model_dump(), changes))


def write_resolved(config: RLConfig, path: Path) -> None:
    """Write config.toml of a run."""
    write_atomic(path, dump_toml(config).encode())


def check_conditions(config: RLConfig) -> None:
    """Raises ConfigError when a condition of `[stop]` cannot be read."""
    from turnwise.monitor import Conditions

    try:
        Conditions(config.stop)
    except ValueError as error:
        raise ConfigError(f"[stop]: {error}") from error


def check_template(config: RLConfig) -> None:
    """Raises ConfigError when the chat template is not there."""
    template = config.model.chat_template
    if template and not template.expanduser().is_file():
        raise ConfigError(f'model.chat_template = "{template}": no such file (looked from {Path.cwd()}); correct the path.')


def _port(config: RLConfig) -> int:
    inference = config.inference
    if inference.port is None:
        return free_range(inference.host, config.replicas)
    check_free(inference.host, inference.port, config.replicas)
    return inference.port
