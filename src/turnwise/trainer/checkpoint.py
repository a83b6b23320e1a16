"""Checkpoints of the trainer: sharded state by torch.distributed.checkpoint, the policy in a form others read, and a manifest."""

import hashlib
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

import turnwise
from turnwise.config import RLConfig
from turnwise.trainer import fsdp
from turnwise.trainer.checkpoint_index import META, CheckpointError, Meta, check_checkpoint, manifest
from turnwise.trainer.publish import PublishError, full_tensors, write_policy
from turnwise.trainer.step import Learner
from turnwise.transport import Progress, RunDir, atomic_dir

TRAINER = "trainer"
PROGRESS = "orchestrator.msgpack"


def save_checkpoint(learner: Learner, run_dir: RunDir, step: int, progress: Progress) -> Path:
    """Write `checkpoints/step_N`; a collective. It appears whole or not at all.

    Raises:
        CheckpointError: the file system refused, on every rank; what was there before is untouched.
    """
    target = run_dir.checkpoint(step)
    tensors = full_tensors(learner)
    with _common_draft(target) as draft:
        with _agreement(target):
            dcp.save(_state(learner), checkpoint_id=draft / TRAINER)
        with _agreement(target):
            if fsdp.rank() == 0:
                _write_rest(draft, learner, tensors, step, progress)
    return target


def load_checkpoint(learner: Learner, run_dir: RunDir, step: int) -> Progress:
    """Put the learner where it was after `step`; a collective. Returns the orchestrator's progress then.

    Raises:
        CheckpointError: the checkpoint is missing, not whole, corrupt, or of another model or adapter.
    """
    folder = run_dir.checkpoint(step)
    meta = check_checkpoint(folder, contents=fsdp.rank() == 0)
    state = _state(learner, ranks=meta.world_size)
    try:
        dcp.load(state, checkpoint_id=folder / TRAINER)
    except (CheckpointException, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder / TRAINER} does not fit this configuration ({_reason(error)}); resume with the model and adapter settings "
            f"of the run's config.toml, or start anew with --clean"
        ) from error
    _restore(learner, state)
    return msgspec.msgpack.decode((folder / PROGRESS).read_bytes(), type=Progress)


def _state(learner: Learner, ranks: int | None = None) -> dict[str, Any]:
    """What a checkpoint holds, as live tensors where loading may write into them.

    A rank beyond those that wrote the checkpoint (`ranks`) finds no generator state there and keeps its own.
    """
    moments = {name: learner.optimizer.state[parameter] for name, parameter in learner.parameters.items()}
    state: dict[str, Any] = {
        "parameters": {name: parameter.detach() for name, parameter in learner.parameters.items()},
        "moments": {name: {key: entry[key] for key in ("exp_avg", "exp_avg_sq", "step")} for name, entry in moments.items()},
    }
    if ranks is None or fsdp.rank() < ranks:
        state["generators"] = {str(fsdp.rank()): _generators(learner.device)}
    return state


def _generators(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore(learner: Learner, state: dict[str, Any]) -> None:
    for name, parameter in learner.parameters.items():
        parameter.detach().copy_(state["parameters"][name])
        for key, value in state["moments"][name].items():
            learner.optimizer.state[parameter][key].copy_(value)
    generators = state.get("generators", {}).get(str(fsdp.rank()), {})
    if "cpu" in generators:
        torch.set_rng_state(generators["cpu"])
    if "cuda" in generators:
        torch.cuda.set_rng_state(generators["cuda"], learner.device)


def _write_rest(draft: Path, learner: Learner, tensors: dict[str, Tensor], step: int, progress: Progress) -> None:
    folder = draft / ("adapter" if learner.lora else "model")
    folder.mkdir()
    write_policy(folder, learner, tensors)
    (draft / PROGRESS).write_bytes(msgspec.msgpack.encode(progress))
    meta = Meta(
        step=step,
        version=turnwise.__version__,
        time=time.time(),
        config_digest=config_digest(learner.config),
        world_size=fsdp.world_size(),
        files=manifest(draft),
    )
    (draft / META).write_bytes(msgspec.json.encode(meta))


def config_digest(config: RLConfig) -> str:
    """SHA-256 of the resolved configuration, to tell afterwards which one a checkpoint came from."""
    return hashlib.sha256(config.model_dump_json().encode()).hexdigest()


@contextmanager
def _common_draft(target: Path) -> Generator[Path]:
    """Rank 0's atomic folder, known to all ranks; renamed into place when every rank got through."""
    with ExitStack() as stack:
        draft: Path | None = None
        with _agreement(target):
            if fsdp.rank() == 0:
                draft = stack.enter_context(atomic_dir(target))
        draft = fsdp.broadcast(draft)
        assert draft is not None
        yield draft
        with _agreement(target):
            stack.close()


@contextmanager
def _agreement(target: Path) -> Generator[None]:
    """Run the body on every rank; if it fails on one, raise CheckpointError on all."""
    problem: str | None = None
    try:
        yield
    except (CheckpointException, PublishError, OSError, RuntimeError) as error:
        problem = _reason(error)
    problems = [text for text in fsdp.gather(problem) if text]
    if problems:
        raise CheckpointError(
            f"{target} could not be written: {problems[0]}. Nothing of it is left; earlier checkpoints and batches are "
            "untouched. Make room or repair the file system, then `rl --resume`"
        )


def _reason(error: BaseException) -> str:
    """The innermost words of an error; DCP wraps those of each rank in its own."""
    if isinstance(error, CheckpointException):
        return "; ".join(sorted({_reason(inner[0]) for inner in error.failures.values()})) or str(error)
    return " ".join(str(error).split()) or type(error).__name__
