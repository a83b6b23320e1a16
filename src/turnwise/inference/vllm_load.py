"""How new base weights get into the model of a vLLM worker."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from turnwise.inference.vllm_base import PLAIN
from turnwise.inference.vllm_layers import kinds

POST_PROCESSED = "process_weights_after_loading"
HARMLESS = "Attention"  # vLLM's usual one: sets its scales to 1


def load_into_model(worker: Any, pairs: Iterable[tuple[str, Tensor]]) -> None:
    """Replace the base weights by `pairs` of name, as in the Hugging Face model, and whole tensor, in place.

    The buffers keep their addresses, which CUDA graphs hold. A tensor is used, on the current stream, before the next pair is
    asked for, so one buffer may serve them all; `pairs` is read to its end. Nothing may be running, and prefix caches must be
    emptied afterwards.

    Weights that the engine uses as published are copied straight to their places. Where it packs or quantises them (on a CPU, for
    one), vLLM's own reload does it again, layer by layer, and needs copies of one layer's tensors meanwhile; there a layer whose
    tensors did not come keeps the old ones. `weights_digest` is the proof in both cases.

    Args:
        worker: vLLM's worker, which the extension is part of.

    Raises:
        ValueError: vLLM knows no such tensor, or a layer of an engine that uses them as published got none.
    """
    model = worker.model_runner.get_model()
    if not used_as_published(model, str(worker.device)):
        worker.model_runner.reload_weights(weights_iterator=((name, tensor.clone()) for name, tensor in pairs))
        return
    loaded: set[str] = model.load_weights(pairs)
    missing = sorted({name for name, _ in model.named_parameters()} - loaded)
    if missing:
        raise ValueError(f"{len(missing)} tensors of the engine's model got no new values: {', '.join(missing[:4])} ...")


def used_as_published(model: Any, device: str) -> bool:
    """Whether every tensor lies in the engine as vLLM's loaders wrote it, so that they can write it again."""
    return not device.startswith("cpu") and all(_unprocessed(layer) for layer in model.modules())


def _unprocessed(layer: Any) -> bool:
    method = getattr(layer, "quant_method", None)
    if method is not None and type(method).__name__ not in PLAIN:
        return False
    return not hasattr(layer, POST_PROCESSED) or type(layer).__name__ == HARMLESS


def repack_outputs_after_reload(runner_class: Any) -> None:
    """Make the reload of vLLM's CPU model runner pack output layers anew.

    An output layer that is tied to the embedding has no tensor in the checkpoint, so that the reload passes it over, and logits
    would go on coming from the old embedding.
    """
    original = runner_class.reload_weights

    def reload_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for layer in self.get_model().modules():
            if "ParallelLMHead" in kinds(layer):
                layer.quant_method.process_weights_after_loading(layer)

    runner_class.reload_weights = reload_weights
