"""A small copy of a model's architecture in float64 with random weights, trained by the user's own settings."""

import math
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, PretrainedConfig

from turnwise.config import RLConfig
from turnwise.launch.resolve import changed
from turnwise.trainer.step import Learner

LAYERS, HEADS, HEAD_DIM, VOCABULARY = 2, 2, 16, 128
EXPERTS, EXPERTS_PER_TOKEN, EXPERT_WIDTH = 4, 2, 32
RANK = 4  # of an adapter
WEIGHT_STD = 0.1  # of an adapter's B, which at 0 would hide A


def small_config(config: RLConfig, folder: Path) -> RLConfig:
    """A configuration of the same training of a small copy, whose config.json is written to `folder`.

    Left out: dropout and quantisation, whose gradients are conventions that finite differences do not know; and compilation.

    Raises:
        OSError, ValueError: transformers does not know the architecture.
    """
    shape = AutoConfig.from_pretrained(config.model.weights, trust_remote_code=config.model.trust_remote_code)
    small_shape(shape.get_text_config()).save_pretrained(folder)
    lora = config.trainer.model.lora
    rank = min(RANK, lora.rank) if lora else 0
    model: dict[str, Any] = {"quant": None, "compile": False, "shard": False, "gradient_checkpointing": False, "replicas": None}
    if lora is not None:
        model["lora"] = {"rank": rank, "alpha": lora.alpha * rank / lora.rank, "dropout": 0.0}
    weights = {"name": str(folder), "quantized": None, "load_format": "dummy", "dtype": "float32"}
    return changed(config, {"model": weights, "trainer": {"model": model, "optim": {"offload": False}}})


def small_shape(shape: PretrainedConfig) -> PretrainedConfig:
    """The shape of a text model, in place, with few layers, heads and tokens."""
    layers, groups = int(shape.num_hidden_layers), int(getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads)
    few = min(LAYERS, layers)
    for name, value in shape.to_dict().items():
        if isinstance(value, list) and len(value) == layers and layers > few:  # one value a layer, layer_types for one
            setattr(shape, name, value[:few])
    kv_heads = min(HEADS, groups)
    heads = kv_heads * min(HEADS, shape.num_attention_heads // groups)
    head_dim = _head_dim(shape)
    sizes = {
        "num_hidden_layers": few,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": heads * head_dim,
        "intermediate_size": 2 * heads * head_dim,
        "moe_intermediate_size": EXPERT_WIDTH,
        "num_experts": EXPERTS,
        "num_local_experts": EXPERTS,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": min(EXPERTS_PER_TOKEN, getattr(shape, "num_experts_per_tok", None) or 1),
        "vocab_size": VOCABULARY,
    }
    for name, value in sizes.items():
        if getattr(shape, name, None) is not None:
            setattr(shape, name, value)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(shape, name, None)
    if hasattr(shape, "quantization_config"):
        delattr(shape, "quantization_config")
    return shape


def build_copy(config: RLConfig) -> Learner:
    """The learner of a configuration of `small_config`, on the CPU in float64, with an adapter that is not 0. No collective."""
    learner = Learner(config, torch.device("cpu"))
    learner.policy.double()
    if learner.reference is not None:
        learner.reference.double()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in learner.parameters.items():
        if name.endswith(".lora_B"):
            parameter.detach().copy_(torch.randn(parameter.shape, generator=generator) * WEIGHT_STD)
    return learner


@contextmanager
def in_double() -> Generator[None]:
    """Inside, model code that asks for float32 for the sake of precision keeps float64, on one thread's operations."""
    with _KeepDouble():
        yield


class _KeepDouble(TorchFunctionMode):
    """RMSNorms and routers convert to float32; that would leave 1e-7 of noise, and finite differences magnify it."""

    CONVERSIONS = (torch.Tensor.to, torch.Tensor.type, torch.softmax, torch.Tensor.softmax, torch.nn.functional.softmax)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            if func in self.CONVERSIONS:
                args = tuple(torch.float64 if value is torch.float32 else value for value in args)
                kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
        return func(*args, **kwargs)


def _head_dim(shape: PretrainedConfig) -> int:
    """A small one, unless rotary factors are listed for each of its dimensions."""
    own = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    scaling = getattr(shape, "rope_parameters", None) or {}
    listed = any(isinstance(value, (list, tuple)) for value in scaling.values()) if isinstance(scaling, dict) else False
    return int(own) if listed else min(HEAD_DIM, 2 ** int(math.log2(own)))
