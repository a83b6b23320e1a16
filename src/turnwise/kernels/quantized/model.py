"""A transformers model from a folder of MXFP4 weights, with linear layers that hold them packed or decoded.

transformers would hand such a folder to the library compressed-tensors, which decodes everything.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from turnwise.kernels.mxfp4.layer import MXFP4Linear
from turnwise.kernels.mxfp4.ops import dequantize
from turnwise.kernels.quantized.layout import LayoutError
from turnwise.kernels.quantized.tensors import FolderTensors, Packed, open_tensors

NOT_WEIGHTS = ("rotary_emb.inv_freq",)  # in files of old versions of transformers: they follow from the configuration

Place = Callable[[PreTrainedModel, str, nn.Linear, Packed], None]


def load_packed(folder: Path, dtype: torch.dtype | str, **options: Any) -> PreTrainedModel:
    """The model on the CPU, each quantised layer an `MXFP4Linear` under the name of the linear layer.

    Args:
        dtype: type of all other tensors, and of the model; "auto" is that of config.json.
        options: for `AutoModelForCausalLM.from_config`.

    Raises:
        LayoutError: the files do not fit the model.
        OSError, ValueError: transformers cannot read config.json.
    """
    return _load(folder, dtype, _place_packed, options)


def load_decoded(folder: Path, dtype: torch.dtype | str, **options: Any) -> tuple[PreTrainedModel, Mapping[str, Packed]]:
    """As `load_packed`, with linear layers that hold the decoded values in `dtype`; and the bytes of each by name.

    Raises:
        As `load_packed`.
    """
    bytes_of: dict[str, Packed] = {}

    def place(model: PreTrainedModel, name: str, linear: nn.Linear, packed: Packed) -> None:
        bytes_of[name] = packed
        linear.weight = nn.Parameter(dequantize(*packed, model.dtype), requires_grad=False)

    return _load(folder, dtype, place, options), bytes_of


def without_quantisation(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The folder's configuration as that of a model with plain weights."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    return config


def _load(folder: Path, dtype: torch.dtype | str, place: Place, options: Mapping[str, Any]) -> PreTrainedModel:
    config = without_quantisation(folder, trust_remote_code=bool(options.get("trust_remote_code", False)))
    dtype = (config.dtype or torch.float32) if isinstance(dtype, str) else dtype
    with no_init_weights():  # memory that is never written to costs nothing: what is packed replaces it
        model = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, dtype=dtype, **options))
    with open_tensors(folder) as tensors:
        for name in tensors.layers:
            packed = tensors.packed(name)
            place(model, name, _linear(model, folder, name, packed[0]), packed)
        _fill(model, tensors)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _place_packed(model: PreTrainedModel, name: str, linear: nn.Linear, packed: Packed) -> None:
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, MXFP4Linear(*packed, bias=linear.bias))


def _linear(model: PreTrainedModel, folder: Path, name: str, codes: Tensor) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise LayoutError(f"{folder} holds MXFP4 weights for {name}, which is no linear layer of {type(model).__name__}")
    stored, expected = [codes.shape[0], 2 * codes.shape[1]], list(module.weight.shape)
    if stored != expected:
        raise LayoutError(f"{name} has weights of shape {stored} in {folder}, expected {expected}")
    return module


def _fill(model: PreTrainedModel, tensors: FolderTensors) -> None:
    """Put the tensors that are not quantised into their places."""
    places: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    tied = set(cast(Any, model).all_tied_weights_keys or ())
    for name in tensors.others:
        if name.endswith(NOT_WEIGHTS):
            continue
        value, target = tensors.get(name), places.pop(name, None)
        if target is None and name not in tied:
            raise LayoutError(f"{tensors.folder} holds {name}, which {type(model).__name__} has not")
        if target is not None:
            if target.shape != value.shape:
                raise LayoutError(f"{name} has shape {list(value.shape)} in {tensors.folder}, expected {list(target.shape)}")
            target.data = value.to(target.dtype)
    quantised = tuple(f"{name}." for name in tensors.layers)
    kept = set(model.state_dict()) - tied
    missing = sorted(name for name in places if name in kept and not (name.startswith(quantised) and not name.endswith(".bias")))
    if missing:
        raise LayoutError(f"{tensors.folder} lacks {len(missing)} tensors of {type(model).__name__}, the first is {missing[0]}")
