"""Go on with a run: its saved configuration, its newest whole checkpoint, and nothing of the steps after that.

The saved `config.toml` is the base; flags of the command line override it (`--max-steps 200` makes a run longer). The
`@` files only say where the run lies: what was changed in them since the run began is named in a notice, not applied.
Batches after the checkpoint stay, since the trainer replays them; what was derived from the steps after it (metrics,
evaluations, published weights) is written again.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from turnwise.config import ConfigError, RLConfig
from turnwise.config.command import COMMAND_LINE, Request, check
from turnwise.config.files import Tables, merge, read_toml
from turnwise.launch.ports import is_free
from turnwise.launch.run_folder import run_dir_of, steps_of
from turnwise.transport import BatchLog, Control, RunDir, WeightsStore, write_atomic

FIXED = ("model.name", "trainer.model.lora", "trainer.model.quant", "seed")
"""Keys, and tables of keys, that a run keeps for life: its checkpoints and its stream of tasks would not fit another value."""
MACHINE = (
    *("inference.port", "inference.dp", "inference.max_loras", "gpus.inference_memory"),
    *("orchestrator.max_inflight", "trainer.processes"),
)
"""Filled in by `rl` where the user left them out: no difference to tell about."""


def resumed_request(request: Request, root: Path) -> Request:
    """The saved configuration of the run at `root` with the flags of this command, and a notice about what does not count.

    Raises:
        ConfigError: no run is there, another version of turnwise wrote it, or a flag changes what a run keeps for life.
    """
    config_file = run_dir_of(root).config
    saved = read_toml(config_file)
    check(Request(saved, {}, dict.fromkeys(_leaves(saved), str(config_file))))
    flags = request.flags
    for key in _leaves(flags):
        if key.startswith(FIXED) and str(_at(flags, key)) != str(_at(saved, key)):
            raise ConfigError(
                f"{key} = {_at(flags, key)} cannot be changed at --resume: the run has {_at(saved, key)}; "
                "leave the flag out, or start a new run."
            )
    if "epochs" in flags:
        raise ConfigError("epochs cannot be given at --resume, where max_steps is already fixed; use --max-steps.")
    base = _sheltered(saved)
    origin = dict.fromkeys(_leaves(base), str(config_file)) | dict.fromkeys(_leaves(flags), COMMAND_LINE)
    return Request(merge(base, flags), flags, origin, (*request.notices, *_ignored(request, saved)), request.files)


def _sheltered(saved: Tables) -> Tables:
    """Without a port that somebody else listens on by now."""
    inference: dict[str, Any] = dict(saved.get("inference", {}))
    port = inference.get("port")
    if port is not None and not all(is_free(inference["host"], port + i) for i in range(inference.get("dp", 1))):
        del inference["port"]
    return {**saved, "inference": inference}


def _ignored(request: Request, saved: Tables) -> list[str]:
    """A notice naming the keys whose values in the files differ from those of the run."""
    try:
        wanted = check(request).model_dump(mode="json")
    except ConfigError:
        return []  # files that no longer make a configuration: they are not used either
    have = RLConfig.model_validate(saved).model_dump(mode="json")
    derived = ("output_dir", "trajectories_dir", "run_name", "epochs", "model.name", "model.quantized", *MACHINE)
    from_files = [key for key in _leaves(request.tables) if request.origin.get(key) != COMMAND_LINE and key not in derived]
    changed = [key for key in from_files if _at(wanted, key) != _at(have, key)]
    if not changed:
        return []
    return [f"This run keeps {', '.join(changed)} as it began, which the files say otherwise; give a flag to change one."]


def latest_checkpoint(root: Path, say: Callable[[str], None] = print) -> int:
    """Step of the newest whole checkpoint; 0, the initial weights, when the run was ended before it wrote one.

    A damaged one is named and passed over: what came after the older one is done again.

    Raises:
        ConfigError: there are checkpoints, and none is whole.
    """
    from turnwise.trainer.checkpoint_index import CheckpointError, check_checkpoint, checkpoint_steps

    run_dir = RunDir(root)
    steps = checkpoint_steps(root)
    for step in reversed(steps):
        try:
            check_checkpoint(run_dir.checkpoint(step))
        except CheckpointError as error:
            say(f"{error} Trying the one before it.")
        else:
            return step
    if steps:
        raise ConfigError(f"no checkpoint under {run_dir.checkpoints} is whole; start anew with --clean.")
    return 0


def rewind(root: Path, trajectories: Path, step: int) -> None:
    """Forget what came after `step`: weights, metrics, evaluations, trajectories of steps without a batch, the stop request."""
    run_dir = RunDir(root)
    Control(root).clear()
    last_batch = max([step, *BatchLog(run_dir.batches).steps()])
    run_dir.status.unlink(missing_ok=True)
    WeightsStore(run_dir.weights).forget_after(step)
    truncate_metrics(run_dir.metrics, step)
    for later, path in steps_of(run_dir.evals, ".json"):
        if later > step:
            path.unlink()
    for later, path in steps_of(trajectories, ".jsonl"):
        if later > last_batch:
            path.unlink()


def truncate_metrics(path: Path, step: int) -> None:
    """Keep the lines of metrics.jsonl up to `step`; a torn last line goes too."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines() if (number := _step_of(line)) is not None and number <= step]
    write_atomic(path, "".join(f"{line}\n" for line in kept).encode())


def _step_of(line: str) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _at(tables: Mapping[str, Any], key: str) -> Any:
    value: Any = tables
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def _leaves(tables: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys of all values that are not tables."""
    keys: list[str] = []
    for key, value in tables.items():
        keys += _leaves(cast(Mapping[str, Any], value), f"{prefix}{key}.") if isinstance(value, Mapping) else [prefix + key]
    return keys
