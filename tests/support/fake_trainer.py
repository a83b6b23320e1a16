"""A trainer without a model: publishes real adapter folders and answers each batch with the next version."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from turnwise.transport import Batch, BatchLog, Canary, RunDir, WeightsReady, WeightsStore, tensor_digest

NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def adapter(version: int) -> dict[str, torch.Tensor]:
    return {NAME: torch.full((2, 4), float(version))}


def publish(store: WeightsStore, version: int, metrics: dict[str, float] | None = None, canaries: Sequence[Canary] = ()) -> None:
    """Announce an adapter whose values are its version."""
    tensors = adapter(version)

    def fill(folder: Path) -> None:
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text("{}")

    digest = tensor_digest(tensors)
    ready = WeightsReady(version, "lora", str(store.path(version)), digest, metrics or {}, canaries=list(canaries))
    store.publish(ready, fill)


@dataclass
class FakeTrainer:
    """Consumes batches in order; each takes `step_s` seconds."""

    run_dir: RunDir
    max_steps: int
    step_s: float = 0.0
    first: int = 0
    stop_after: int | None = None  # dies silently after this version
    canaries: Callable[[int], Sequence[Canary]] = lambda version: ()
    batches: list[Batch] = field(default_factory=list)
    ahead: list[bool] = field(default_factory=list)  # was the next batch there when a step was done?

    async def run(self) -> None:
        store, log = WeightsStore(self.run_dir.weights), BatchLog(self.run_dir.batches)
        publish(store, self.first)
        for step in range(self.first + 1, self.max_steps + 1):
            if self.stop_after is not None and step > self.stop_after:
                return
            await _appeared(log.path(step))
            self.batches.append(log.read(step))
            await asyncio.sleep(self.step_s)
            self.ahead.append(log.path(step + 1).exists())
            publish(store, step, {"actor/loss": 0.5 / step, "timing/train_s": self.step_s}, self.canaries(step))


async def _appeared(path: Path) -> None:
    while True:
        if await asyncio.to_thread(path.exists):
            return
        await asyncio.sleep(0.01)
