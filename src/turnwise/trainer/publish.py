"""Publication of policy versions: an adapter in PEFT form, or a Hugging Face folder, with the digest that engines prove."""

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from turnwise.trainer import fsdp
from turnwise.trainer.lora import peft_name, save_adapter
from turnwise.trainer.step import Learner
from turnwise.transport import Canary, WeightsReady, WeightsStore, served_adapter, tensor_digest


def full_tensors(learner: Learner) -> dict[str, Tensor]:
    """The policy's whole tensors, on the CPU, under the names of the file; a collective, and empty but on rank 0.

    Adapters stay float32; a whole model gets the type in which it computes, which is what engines load.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in learner.parameters.items():
        whole = fsdp.full(parameter)
        if fsdp.rank() == 0 and learner.lora:
            tensors[peft_name(name)] = whole.cpu()
        elif fsdp.rank() == 0:
            tensors[name] = whole.to("cpu", learner.dtype)
    return tensors


class PublishError(Exception):
    """Weights cannot be published. The message is complete: it is printed as it stands, without a traceback."""


def write_policy(folder: Path, learner: Learner, tensors: dict[str, Tensor]) -> None:
    """Write tensors of `full_tensors` to `folder`, as a PEFT adapter or a Hugging Face model.

    Raises:
        OSError: the file system refused.
        PublishError: transformers saves this model under other names than it has in memory, so that no digest would agree.
    """
    try:
        if learner.lora:
            save_adapter(folder, tensors, learner.lora, learner.config.model.name)
            return
        learner.policy.model.save_pretrained(folder, state_dict=tensors)
    except SafetensorError as error:  # how safetensors reports a full disk, for one
        raise OSError(f"{folder}: {error}") from error
    _check_names(folder, tensors)
    learner.save_tokenizer(folder)


def _check_names(folder: Path, tensors: dict[str, Tensor]) -> None:
    saved: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as content:
            saved |= set(content.keys())
    if saved != set(tensors):
        example = sorted(saved ^ set(tensors))[0]
        raise PublishError(f"this model is saved under other tensor names than it has in memory ({example}); train it with LoRA")


def publish(
    learner: Learner,
    store: WeightsStore,
    version: int,
    metrics: dict[str, float],
    *,
    keep: int,
    canaries: Sequence[Canary] = (),
) -> None:
    """Announce the current policy as `version`, and remove versions that no engine needs any more; a collective.

    Args:
        learner: the policy.
        store: the run's published versions.
        version: optimiser steps taken.
        metrics: of the step that made it.
        keep: versions up to the served one that stay.
        canaries: of the step that made it.

    Raises:
        PublishError: the file system refused, or the model cannot be published; no part of the version is visible.
    """
    tensors = full_tensors(learner)
    if fsdp.rank() == 0:
        tensors, digest = _for_engine(learner, tensors)
        ready = WeightsReady(
            version=version,
            kind="lora" if learner.lora else "full",
            path=str(store.path(version)),
            digest=digest,
            metrics=metrics,
            canaries=list(canaries),
        )
        try:
            store.publish(ready, lambda folder: write_policy(folder, learner, tensors))
        except OSError as error:
            raise PublishError(
                f"weights of version {version} could not be published: {error}. Nothing of the run is lost: make room or repair "
                "the file system, then `rl --resume`"
            ) from error
        store.prune(keep)


def _for_engine(learner: Learner, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """What an engine reads, and the digest of what it then holds.

    vLLM computes adapters in the model's type, as this trainer does, so nothing is lost when they travel in it.
    """
    if learner.lora is None or learner.config.inference.engine != "vllm":
        return tensors, tensor_digest(tensors)
    files = {name: tensor.to(learner.dtype) for name, tensor in tensors.items()}
    return files, tensor_digest(served_adapter(files, dtype=learner.dtype, scale=learner.lora.alpha / learner.lora.rank))
