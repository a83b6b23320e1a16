"""Any transformers causal language model through its own forward pass, one sequence at a time, adapters by peft.

Slower than the lean path, which serves the Llama-like families; it is what everything else falls back to.
"""

from collections.abc import Generator, Iterable
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache
from transformers.pytorch_utils import Conv1D

from turnwise.inference.embedded.loading import load_model, model_with
from turnwise.inference.embedded.lora import AdapterError, read_config, read_tensors
from turnwise.inference.embedded.sequence import Sequence
from turnwise.inference.norms import Norm, module_norms
from turnwise.transport import tensor_digest


class GenericDecoder:
    """See `Decoder`. Each sequence has its own cache, so that a reply never depends on the others."""

    def __init__(self, model: Any, *, max_length: int) -> None:
        self.max_length = max_length
        self._base = model
        self._linears = _linear_shapes(model)
        self._peft: PeftModel | None = None
        self._tensors: dict[str, dict[str, Tensor]] = {}
        self._caches: dict[Sequence, Any] = {}

    @property
    def rows(self) -> Seq[Sequence]:
        return list(self._caches)

    @property
    def adapters(self) -> Seq[str]:
        return list(self._tensors)

    def admit(self, sequence: Sequence) -> int:
        self._caches[sequence] = DynamicCache(config=self._base.config)
        sequence.computed = 0
        return len(sequence.tokens)

    def step(self) -> tuple[list[Sequence], Tensor]:
        logits = [self._forward(sequence, cache) for sequence, cache in self._caches.items()]
        return list(self._caches), torch.stack(logits)

    def release(self, sequence: Sequence) -> None:
        del self._caches[sequence]

    def load_adapter(self, name: str, folder: Path) -> None:
        read_config(folder)
        tensors = read_tensors(folder)
        self._check(folder, tensors)
        if name in self._tensors:
            self.unload_adapter(name)
        if self._peft is None:
            self._peft = PeftModel.from_pretrained(self._base, str(folder), adapter_name=name)
        else:
            self._peft.load_adapter(str(folder), adapter_name=name)
        self._peft.eval()
        self._tensors[name] = tensors

    def unload_adapter(self, name: str) -> None:
        assert self._peft is not None
        del self._tensors[name]
        if self._tensors:
            self._peft.set_adapter(next(iter(self._tensors)))
            self._peft.delete_adapter(name)
        else:
            self._base = self._peft.unload()
            self._peft = None

    def digest(self, name: str | None) -> str:
        if name is not None:
            return tensor_digest(self._tensors[name])
        if self._peft is not None:
            raise ValueError("the digest of the full weights is taken without adapters; unload them first.")
        tied = set(getattr(self._base, "all_tied_weights_keys", None) or [])
        return tensor_digest({key: value for key, value in self._base.state_dict().items() if key not in tied})

    def reload(self, folder: Path) -> None:
        self._check_bare()
        if not folder.is_dir():
            raise OSError(f"weights_path = {folder} is not a folder.")
        self._base = load_model(folder, self._base.dtype)
        self._peft = None

    def replace(self, pairs: Iterable[tuple[str, Tensor]]) -> None:
        self._check_bare()
        self._base = model_with(dict(pairs), type(self._base), self._base.config, self._base.dtype)
        self._peft = None

    def norms(self) -> Seq[Norm]:
        return module_norms(self._base)

    def _check_bare(self) -> None:
        if self._tensors:
            raise ValueError("full weights cannot be reloaded while adapters are loaded; unload them first.")

    def reset_prefix_cache(self) -> None:
        """There is none."""

    def prompt_logprobs(self, ids: Seq[int], adapter: str | None) -> list[float]:
        tokens = torch.tensor(ids)
        with self._using(adapter) as model:
            logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1].float()
        return torch.log_softmax(logits, -1).gather(1, tokens[1:, None])[:, 0].tolist()

    def _forward(self, sequence: Sequence, cache: Any) -> Tensor:
        new = torch.tensor([sequence.tokens[sequence.computed :]])
        with self._using(sequence.adapter) as model:
            out = model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
        sequence.computed = len(sequence.tokens)
        return out.logits[0, -1].float()

    @contextmanager
    def _using(self, adapter: str | None) -> Generator[Any]:
        """The model with one adapter switched on, or none."""
        if self._peft is None:
            yield self._base
        elif adapter is None:
            with self._peft.disable_adapter():
                yield self._peft
        else:
            self._peft.set_adapter(adapter)
            yield self._peft

    def _check(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """Raises AdapterError unless every tensor fits a linear layer of the model."""
        for name, tensor in tensors.items():
            module, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
            if module not in self._linears or rest not in ("A.weight", "B.weight"):
                raise AdapterError(f"{folder}: {name} belongs to no linear layer of this model.")
            outputs, inputs = self._linears[module]
            matches = tensor.shape[1] == inputs if rest == "A.weight" else tensor.shape[0] == outputs
            if not matches:
                raise AdapterError(f"{folder}: {name} has shape {tuple(tensor.shape)} for a layer {inputs} -> {outputs}.")


def _linear_shapes(model: Any) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every linear layer by name."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            shapes[name] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            shapes[name] = (module.weight.shape[1], module.weight.shape[0])
    return shapes
