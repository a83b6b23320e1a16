"""The part of vLLM's workers that puts noise into the norms (AQN), and norms that can hold it.

In bfloat16 a weight near 1 hardly moves for a sigma below 0.003, where most stages of the usual schedule lie. So the norms of an
engine that will get noise are made float32 once its model is loaded, before anything is compiled or captured. vLLM's own kernels
take weights of the input's type alone; with others it computes a norm by PyTorch's operations, as it does under
`torch.compile` in any case, and as it does for Gemma, whose norm weights are float32 there. Results come in the input's type.
"""

import functools
from typing import Any, cast

import torch

from turnwise.inference.norms import NormNoise, module_norms
from turnwise.inference.wire import FLOAT32_NORMS

NOISE = "_turnwise_noise"  # attribute of the worker, made at the first call: vLLM forbids clashes with names of its own
PUBLISHED = "turnwise_published_dtype"  # attribute of a norm: the type that its weight has in files


class AddsNoise:
    """A worker whose norms can be given noise."""

    model_runner: Any

    @torch.inference_mode()
    def apply_noise(self, sigma: float, seed: int) -> dict[str, Any]:
        """Add N(0, sigma) to the clean norms, or for sigma = 0 restore them; see `NormNoise.apply`. Nothing may be running, and
        prefix caches must be emptied afterwards.
        """
        noise = cast(NormNoise | None, getattr(self, NOISE, None)) or NormNoise()
        setattr(self, NOISE, noise)
        return noise.apply(module_norms(self.model_runner.get_model()), sigma, seed)


def make_norms_float32(model: torch.nn.Module) -> None:
    """Hold the weights of the norms that get noise in float32; exact, and the parameters stay the same objects."""
    for norm in module_norms(model):
        module: Any = model.get_submodule(norm.name)
        setattr(module, PUBLISHED, module.weight.dtype)
        module.weight.data = module.weight.data.float()


def make_norms_float32_at_load(worker_class: Any) -> None:
    """Make vLLM's workers do so after they have loaded the model, where the engine was started with `FLOAT32_NORMS`."""
    original = worker_class.load_model

    @functools.wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if dict(self.vllm_config.additional_config or {}).get(FLOAT32_NORMS):
            make_norms_float32(self.model_runner.get_model())
        return result

    worker_class.load_model = load_model
