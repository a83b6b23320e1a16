"""Models from Hugging Face folders, for the lean path or the generic one."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as transformers_logging

from turnwise.config import RLConfig
from turnwise.inference.embedded.lean import LeanModel, why_not_lean
from turnwise.kernels.quantized.layout import is_packed
from turnwise.kernels.quantized.model import load_decoded
from turnwise.kernels.quantized.tensors import Packed

log = logging.getLogger(__name__)
DTYPES: dict[str, Any] = {"auto": "auto", "bfloat16": torch.bfloat16, "float32": torch.float32}


def load_served(name: str | Path, dtype: Any, *, trust_remote_code: bool = False) -> tuple[Any, Mapping[str, Packed]]:
    """The model to serve, as `load_model`, and codes and scales of the linear layers that come in MXFP4, by name.

    These layers hold the decoded values.

    Raises:
        OSError, ValueError: as `load_model`.
    """
    if Path(name).is_dir() and is_packed(Path(name)):
        return load_decoded(Path(name), dtype, trust_remote_code=trust_remote_code)
    return load_model(name, dtype, trust_remote_code=trust_remote_code), {}


def load_model(name: str | Path, dtype: Any, *, trust_remote_code: bool = False) -> Any:
    """A transformers causal language model on the CPU, for inference.

    Raises:
        OSError, ValueError: the folder is missing, incomplete or of an unknown kind.
    """
    model = AutoModelForCausalLM.from_pretrained(str(name), dtype=dtype, trust_remote_code=trust_remote_code)
    return model.eval().requires_grad_(False)


def load_lean(folder: Path, like: LeanModel) -> LeanModel:
    """Weights from `folder` in the shapes and the type of the model that they replace.

    Raises:
        OSError: no such checkpoint.
        ValueError: it has other shapes than `like`.
    """
    if not folder.is_dir():
        raise OSError(f"weights_path = {folder} is not a folder.")
    model = LeanModel(load_model(folder, like.dtype), like.max_length)
    _check_shapes(folder, model, like)
    return model


def lean_with(tensors: Mapping[str, Tensor], like: LeanModel) -> LeanModel:
    """A model like `like` with other weights, under the names of the checkpoint.

    Raises:
        ValueError: as `model_with`.
    """
    return LeanModel(model_with(tensors, like.source, like.config, like.dtype), like.max_length)


def model_with(tensors: Mapping[str, Tensor], kind: Any, config: Any, dtype: torch.dtype) -> Any:
    """A transformers model of the class `kind` with these weights, copied.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape.
    """
    state = {name: tensor.to(dtype, copy=True) for name, tensor in tensors.items()}
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)  # it prints a table of what we raise
    transformers_logging.disable_progress_bar()
    try:
        model, info = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    finally:
        transformers_logging.set_verbosity(before)
    wrong = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
    if wrong:
        raise ValueError(f"the tensors do not fit {kind.__name__}: {wrong}")
    return model.eval().requires_grad_(False)


def _check_shapes(folder: Path, model: LeanModel, like: LeanModel) -> None:
    same = (len(model.layers), model.vocabulary, model.heads, model.kv_heads, model.head_dim, model.embedding.shape[1])
    wanted = (len(like.layers), like.vocabulary, like.heads, like.kv_heads, like.head_dim, like.embedding.shape[1])
    if same != wanted:
        raise ValueError(f"{folder}: layers, vocabulary, heads, kv heads, head size, hidden size = {same}, expected {wanted}.")


def max_length(config: RLConfig, model_config: Any) -> int:
    """Most tokens of a sequence: `seq_len` and one more (for logprobs of a full sample), within the model's positions."""
    return min(config.seq_len + 1, getattr(model_config, "max_position_embeddings", config.seq_len + 1))


def eos_ids(name: str | Path, model_config: Any) -> frozenset[int]:
    """End tokens of the model's generation config or, without one, of its config; vLLM stops there too."""
    try:
        eos = GenerationConfig.from_pretrained(str(name)).eos_token_id
    except OSError:
        eos = model_config.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset(eos) if isinstance(eos, list) else frozenset([int(eos)])


def lean_reason(name: str | Path, *, trust_remote_code: bool = False) -> str | None:
    """Why the model at `name` needs the generic path; None when the lean one serves it."""
    return why_not_lean(AutoConfig.from_pretrained(str(name), trust_remote_code=trust_remote_code))
