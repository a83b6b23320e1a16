"""What a training step costs: where its time went, tokens a second, model FLOP utilisation, peak memory."""

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import nn

from turnwise.kernels.mxfp4.layer import MXFP4Linear
from turnwise.trainer import fsdp
from turnwise.trainer.attention import NO_PARENT, Layout
from turnwise.trainer.flops import PER_PARAMETER, model_size, peak_flops, step_flops
from turnwise.trainer.model import Loaded
from turnwise.trainer.packing import MicroBatch

GIB = 2**30


class Meter:
    """Measures one step at a time, on this rank."""

    def __init__(self, loaded: Loaded, device: torch.device) -> None:
        self.device = device
        policy = loaded.policy
        self.size = model_size(policy.model.config)
        self.head = cast(nn.Linear, policy.model.get_output_embeddings()).weight
        table = policy.model.get_input_embeddings().weight
        counted = [parameter for parameter in policy.parameters() if parameter is not table or table is self.head]
        floating = [parameter for parameter in counted if parameter.is_floating_point()]
        self.trainable = sum(parameter.numel() for parameter in floating if parameter.requires_grad)
        self.frozen = sum(parameter.numel() for parameter in floating if not parameter.requires_grad) + _packed(policy)
        known = device.type == "cuda" and loaded.dtype == torch.bfloat16
        self.peak_flops = peak_flops(torch.cuda.get_device_name(device)) if known else None
        self.begin()

    def begin(self) -> None:
        """Forget the step before."""
        self.begun = time.perf_counter()
        self.seconds = {"forward_backward": 0.0, "optimizer": 0.0}
        self.tokens, self.flops = 0, 0.0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Count the time of the body; it must end by waiting for the device, as whatever reads a number from it does."""
        begun = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begun

    def count(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Count a forward and backward pass over these."""
        self.tokens += sum(len(batch.input_ids) for batch in micro_batches)
        self.flops += sum(self._flops(batch) for batch in micro_batches)

    def cost(self, layout: Layout) -> float:
        """Operations of a forward and backward pass over a packed sequence with logits everywhere."""
        parents = [0 if parent == NO_PARENT else layout.lengths[parent] for parent in layout.parents]
        return step_flops(self.size, self.trainable, self.frozen, layout.lengths, parents)

    def _flops(self, batch: MicroBatch) -> float:
        unsampled = len(batch.input_ids) - len(batch.targets)  # where no logits are computed
        return self.cost(batch.layout) - PER_PARAMETER[self.head.requires_grad] * self.head.numel() * unsampled

    def metrics(self) -> dict[str, float]:
        """Of the step since `begin`, over all ranks; a collective. Empty when nothing was trained on."""
        seconds = time.perf_counter() - self.begun
        tokens, flops = fsdp.sum_over_ranks(torch.tensor([self.tokens, self.flops], dtype=torch.float64)).tolist()
        if not tokens:
            return {}
        measured = {f"timing/{name}_s": spent for name, spent in self.seconds.items()}
        measured["perf/trainer_tokens_per_s"] = tokens / seconds
        if self.peak_flops is not None:
            measured["perf/mfu"] = flops / (seconds * self.peak_flops * fsdp.world_size())
        if self.device.type == "cuda":
            measured["perf/memory_peak_gib"] = peak_memory_gib(self.device)
        return measured


def _packed(policy: nn.Module) -> int:
    """Weights of linear layers that hold them as four-bit codes, which are no parameters unless FSDP2 shards them."""
    layers = (module for module in policy.modules() if type(module) is MXFP4Linear)
    return sum(layer.in_features * layer.out_features for layer in layers)


def peak_memory_gib(device: torch.device) -> float:
    """The most that tensors took since it was last reset, on the rank where that is most, in GiB; a collective."""
    peak = torch.tensor(torch.cuda.max_memory_allocated(device) / GIB, dtype=torch.float64)
    return float(fsdp.max_over_ranks(peak))
