"""The memory of a GPU on which an engine and the trainer run: who gets how much.

The trainer gets what it is estimated to need, with a margin for the estimate; the engine gets the rest, since more KV cache is
the only use for memory that nobody needs. A fraction that the user gives stands; then it is only checked.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor

from turnwise.config import ConfigError, RLConfig
from turnwise.config.root import shared_gpu_reserve
from turnwise.launch.memory import GIB, cache_bytes, gpu_engine_needs, trainer_parts
from turnwise.launch.shape import ModelShape

MARGINS = (1.5, 1.25, 1.0)  # on the trainer's estimate; smaller ones only where the engine would not fit otherwise
MOST = 0.9  # of a GPU for an engine, as where it is alone: free memory must exceed its part when it starts


@dataclass(frozen=True)
class Split:
    """One shared GPU, in bytes."""

    gpu: int
    total: int
    engine: int
    trainer: int  # bound of the trainer's allocator

    @property
    def free(self) -> int:
        """The reserve, and what rounding leaves."""
        return self.total - self.engine - self.trainer

    def text(self, name: str) -> str:
        """`name` is how the GPU is called to the user."""
        share = self.engine / self.total
        return (
            f"{name} is shared: engine {self.engine / GIB:.1f} GiB ({share:.0%}), trainer at most {self.trainer / GIB:.1f} GiB, "
            f"{self.free / GIB:.1f} GiB stay free; the trainer starts once the engine serves."
        )


def splits(config: RLConfig, totals: Mapping[int, int]) -> list[Split]:
    """The split of every shared GPU whose size is known, once the engine's fraction is set."""
    found: list[Split] = []
    for gpu in config.gpus.shared:
        total = totals.get(gpu)
        trainer = config.trainer_memory(gpu, total) if total else None
        if total and trainer is not None:
            found.append(Split(gpu, total, int(total * (config.engine_memory or 0)), trainer))
    return found


def engine_fraction(config: RLConfig, shape: ModelShape, totals: Mapping[int, int]) -> float:
    """The fraction of its GPU that each engine takes, so that engine and trainer fit on every shared GPU; `totals` in bytes.

    Raises:
        ConfigError: they do not fit on one of them.
    """
    return min(_fraction_of_one(config, shape, gpu, totals[gpu]) for gpu in config.gpus.shared)


def engine_minimum(config: RLConfig, shape: ModelShape, total: int) -> int:
    """What a vLLM engine cannot start without: itself, and the KV cache of one sample of full length."""
    return sum(gpu_engine_needs(config, shape, total).values()) + (config.seq_len + 1) * cache_bytes(config, shape)


def trainer_minimum(config: RLConfig, shape: ModelShape) -> int:
    """What the trainer's allocator is estimated to hold at most: all but its CUDA context."""
    parts = trainer_parts(config, shape)
    return sum(parts.values()) - parts["process"]


def _fraction_of_one(config: RLConfig, shape: ModelShape, gpu: int, total: int) -> float:
    engine, trainer = engine_minimum(config, shape, total), trainer_minimum(config, shape)
    for margin in MARGINS:
        rest = total - shared_gpu_reserve(total) - margin * trainer
        fraction = min(MOST, floor(100 * rest / total) / 100)
        if fraction * total >= engine:
            return fraction
    raise ConfigError(
        f"gpus.share: GPU {gpu} has {total / GIB:.1f} GiB, too little for both: the engine needs at least {engine / GIB:.1f} "
        f"GiB, the trainer about {trainer / GIB:.1f} GiB, and {shared_gpu_reserve(total) / GIB:.1f} GiB stay free. Give each "
        "a GPU of its own, make the trainer smaller (trainer.micro_batch_tokens, trainer.model.gradient_checkpointing), "
        "or set gpus.inference_memory to try it all the same."
    )
