"""Publication of policy versions as files: a PEFT adapter or a Hugging Face folder, with the digest that engines prove."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from turnwise.config import LoraConfig
from turnwise.trainer import fsdp
from turnwise.trainer.lora import peft_name, save_adapter
from turnwise.trainer.step import Learner
from turnwise.transport import Canary, Digest, WeightsReady, WeightsStore, served_adapter


def full_tensors(learner: Learner) -> dict[str, Tensor]:
    """The policy's whole tensors, on the CPU, under the names of the file; a collective, and empty but on rank 0.

    Adapters stay float32; a whole model gets the type in which it computes.
    """
    return _on_rank_0(learner, torch.float32 if learner.lora else learner.dtype)


def whole_tensors(learner: Learner, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Names as in the file and whole tensors, where the policy is, one at a time. Each is a collective.

    Under fake quantisation these are the values with which the policy computes, not the masters behind them.
    """
    for name, parameter in learner.parameters.items():
        tensor = fsdp.full(parameter.detach().to(dtype))
        if learner.fake_quant is not None:
            tensor = learner.fake_quant.served(name, tensor)
        yield peft_name(name) if learner.lora else name, tensor


class PublishError(Exception):
    """Weights cannot be published. The message is complete: it is printed as it stands, without a traceback."""


def write_policy(folder: Path, learner: Learner, tensors: dict[str, Tensor], lora: LoraConfig | None = None) -> None:
    """Write tensors of `full_tensors` to `folder`, as a PEFT adapter or a Hugging Face model.

    Args:
        folder: exists.
        learner: the policy.
        tensors: the file's.
        lora: what to write beside an adapter; the policy's own configuration if None.

    Raises:
        OSError: the file system refused.
        PublishError: transformers saves this model under other names than it has in memory, so that no digest would agree.
    """
    try:
        if learner.lora:
            save_adapter(folder, tensors, lora or learner.lora, learner.config.model.name)
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
    digest = Digest()

    def served(name: str, tensor: Tensor) -> Tensor:
        tensor = _as_served(learner, name, tensor)
        digest.add(name, tensor)
        learner.published.see(tensor)
        return tensor

    tensors = _on_rank_0(learner, engine_dtype(learner), served)
    if fsdp.rank() == 0:
        ready = WeightsReady(
            version=version,
            kind="lora" if learner.lora else "full",
            path=str(store.path(version)),
            digest=digest.hexdigest(),
            metrics=metrics | learner.published.metrics(),
            canaries=list(canaries),
        )
        announce(store, ready, lambda folder: write_policy(folder, learner, tensors, _lora_as_served(learner)))
        store.prune(keep)


def announce(store: WeightsStore, ready: WeightsReady, fill: Callable[[Path], None]) -> None:
    """Put a version into the store.

    Raises:
        PublishError: the file system refused; no part of the version is visible.
    """
    try:
        store.publish(ready, fill)
    except OSError as error:
        raise PublishError(
            f"weights of version {ready.version} could not be published: {error}. Nothing of the run is lost: make room or "
            "repair the file system, then `rl --resume`"
        ) from error


def engine_dtype(learner: Learner) -> torch.dtype:
    """The type in which engines read the policy.

    vLLM computes adapters in the model's type, as this trainer does, so nothing is lost when they travel in it.
    """
    return torch.float32 if learner.lora and not _goes_to_vllm(learner) else learner.dtype


def _goes_to_vllm(learner: Learner) -> bool:
    return learner.config.inference.engine == "vllm"


def _as_served(learner: Learner, name: str, tensor: Tensor) -> Tensor:
    """What an engine holds once it has read a tensor.

    vLLM multiplies alpha / rank into B on the CPU, tensor by tensor, while nothing is generated: 0.04 s for 66 million parameters
    with one thread, several times as much with many. So it is done here, before the file is written, with the same rounding.
    """
    if learner.lora is None or not _goes_to_vllm(learner):
        return tensor
    scale = learner.lora.alpha / learner.lora.rank
    return served_adapter({name: tensor}, dtype=learner.dtype, scale=scale)[name]


def _lora_as_served(learner: Learner) -> LoraConfig | None:
    """The configuration that goes with `_as_served`: where the scale is in B, alpha / rank is 1."""
    if learner.lora is None or not _goes_to_vllm(learner):
        return learner.lora
    return learner.lora.model_copy(update={"alpha": float(learner.lora.rank)})


def _on_rank_0(
    learner: Learner, dtype: torch.dtype, change: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor
) -> dict[str, Tensor]:
    """`whole_tensors`, on the CPU of rank 0; `change` makes of each what is kept, there, where the policy is."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in whole_tensors(learner, dtype):
        if fsdp.rank() == 0:
            tensor = change(name, tensor)
            tensors[name] = tensor if learner.lora else tensor.cpu()
    return _on_cpu(tensors)


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of one type from a GPU in one copy, into pinned memory: 500 small copies wait for the GPU 500 times."""
    if not any(tensor.is_cuda for tensor in tensors.values()):
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
    pinned = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True).copy_(flat)
    parts = pinned.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensor.shape) for (name, tensor), part in zip(tensors.items(), parts, strict=True)}
