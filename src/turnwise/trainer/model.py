"""The policy: a causal language model of transformers that returns log-probabilities of sampled tokens, and no logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from turnwise.config import ModelConfig, RLConfig
from turnwise.kernels.mxfp4.layer import MXFP4Linear
from turnwise.kernels.mxfp4.sharded import shard_packed
from turnwise.kernels.quantized.layout import REPORT, LayoutError
from turnwise.kernels.quantized.model import load_packed
from turnwise.kernels.quantized.report import Report, read_lines
from turnwise.trainer import fsdp
from turnwise.trainer.attention import Layout, register_attention
from turnwise.trainer.logprobs import TokenStats, token_logprobs
from turnwise.trainer.lora import add_lora
from turnwise.trainer.lora_layer import LoraLinear
from turnwise.trainer.packing import MicroBatch
from turnwise.trainer.quant import FakeQuant, pack_linears, round_weights, train_quantised
from turnwise.trainer.recompute import prepare_layers

# settings that change logits between the output layer and the softmax; token_logprobs knows the temperature only
LOGIT_CHANGES = ("final_logit_softcapping", "logits_scaling", "logit_scale")


class ModelError(Exception):
    """The model cannot be trained. The message is complete: it is printed as it stands, without a traceback."""


class Policy(nn.Module):
    """A language model for training. The forward pass of this module is the only one that is called, as FSDP2 needs."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or head.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
            raise ModelError(
                f"{type(model).__name__} has no plain output layer (a linear layer without bias), which training needs"
            )
        for name in LOGIT_CHANGES:
            if getattr(model.config, name, None) not in (None, 1, 1.0):
                raise ModelError(
                    f"{type(model).__name__} sets {name} = {getattr(model.config, name)}, which training does not support"
                )
        self.model = model

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        return cast(nn.ModuleList, cast(Any, self.model.get_decoder()).layers)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        layout: Layout,
        positions: Tensor,
        targets: Tensor,
        temperature: float,
        entropy_grad: bool,
    ) -> TokenStats:
        """Statistics of `targets`, each predicted at its index in `positions` of the packed input."""
        decoder: Any = self.model.get_decoder()
        output = decoder(input_ids=input_ids[None], position_ids=position_ids[None], layout=layout, use_cache=False)
        hidden = output.last_hidden_state[0].index_select(0, positions)
        head = cast(nn.Linear, self.model.get_output_embeddings())
        return token_logprobs(hidden, head.weight, targets, temperature=temperature, entropy_grad=entropy_grad)

    def stats(self, batch: MicroBatch, *, temperature: float, entropy_grad: bool = False) -> TokenStats:
        """Log-probability and entropy of the sampled tokens of a micro-batch."""
        return self(batch.input_ids, batch.position_ids, batch.layout, batch.positions, batch.targets, temperature, entropy_grad)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that are trained, under the names of the Hugging Face model."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}


@dataclass(frozen=True)
class Loaded:
    """A policy ready to train, and the type in which it computes and is published."""

    policy: Policy
    dtype: torch.dtype
    fake_quant: FakeQuant | None = None  # of parameters that train; None where none of them is quantised
    notes: Sequence[str] = ()  # what is worth telling about how it is held


def load_model(config: ModelConfig, device: torch.device) -> PreTrainedModel:
    """Read the model in Hugging Face form, on the CPU, with segment attention; with `load_format = "dummy"`, draw its weights.

    The linear layers of `model.quantized` are packed.

    Raises:
        ModelError: there is no such model, or its files cannot be read.
    """
    transformers_logging.disable_progress_bar()
    if Path(config.name).is_absolute() and not (Path(config.name) / "config.json").exists():
        raise ModelError(f"model.name = {config.name!r} is no folder with a model: it has no config.json")
    options: dict[str, Any] = {"attn_implementation": register_attention(), "trust_remote_code": config.trust_remote_code}
    dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        if config.load_format == "dummy":
            return _dummy_model(config.name, dtype, device, options)
        if config.quantized is not None:
            return load_packed(config.quantized, dtype, **options)
        model = AutoModelForCausalLM.from_pretrained(config.name, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        where = "model.quantized" if isinstance(error, LayoutError) else "model.name"
        raise ModelError(f"{where} = {config.weights!r} cannot be loaded: {error}") from error
    return cast(PreTrainedModel, model)


def _dummy_model(name: str, dtype: torch.dtype | str, device: torch.device, options: dict[str, Any]) -> PreTrainedModel:
    """Random weights, the same in every process, made where they are needed: 8 GB come slowly from a CPU's generator."""
    shape = AutoConfig.from_pretrained(name, trust_remote_code=options["trust_remote_code"])
    dtype = (shape.dtype or torch.float32) if isinstance(dtype, str) else dtype
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
        torch.manual_seed(0)
        return cast(PreTrainedModel, AutoModelForCausalLM.from_config(shape, dtype=dtype, **options))


def build_policy(config: RLConfig, device: torch.device) -> Loaded:
    """The policy of step 0: adapters on a frozen base, or float32 master weights; sharded where there is more than one process.

    Raises:
        ModelError: the model cannot be loaded or trained.
        ValueError: `target_modules` names a layer that the model does not have.
    """
    options = config.trainer.model
    model = load_model(config.model, device)
    dtype = model.dtype
    policy = Policy(model)
    fake_quant, notes = _quantise(model, config)
    if options.lora is not None:
        add_lora(model, options.lora, seed=config.seed)
        if isinstance(model.get_output_embeddings(), LoraLinear):
            raise ModelError("trainer.model.lora.target_modules names the output layer, which gets no adapter; remove it")
    else:
        model.float().requires_grad_(True)
    policy.train().to(device)
    dropout = options.lora is not None and options.lora.dropout > 0
    recompute = options.checkpoint_scope if options.gradient_checkpointing else None
    prepare_layers(policy.layers, recompute=recompute, compiled=options.compile, dropout=dropout)
    _shard(policy, config, dtype, device)
    return Loaded(policy, dtype, fake_quant, notes)


def _quantise(model: PreTrainedModel, config: RLConfig) -> tuple[FakeQuant | None, Sequence[str]]:
    """Quantise what is not quantised by now, and say what is."""
    options = config.trainer.model
    if config.model.quantized is not None and config.model.load_format != "dummy":
        packed = [name for name, module in model.named_modules() if isinstance(module, MXFP4Linear)]
        return None, read_lines(config.model.quantized / REPORT) or Report("", {}, packed).lines()
    if options.quant is None:
        return None, ()
    if options.lora is not None:
        return None, pack_linears(model, options.quant).lines()
    fake = train_quantised(model, options.quant, model.dtype)
    return fake, [*fake.report.lines(), "all parameters train; engines get the values of the quantised weights"]


def build_reference(config: RLConfig, device: torch.device) -> Policy:
    """The initial weights, frozen: the reference of `kl_beta` under full fine-tuning."""
    model = load_model(config.model, device)
    model.requires_grad_(False)
    if config.trainer.model.quant is not None:
        round_weights(model, config.trainer.model.quant)
    policy = Policy(model).eval().to(device)
    if config.trainer.model.shard and fsdp.world_size() > 1:
        fsdp.shard(policy, policy.layers, device=device, compute_dtype=None)
    return policy


def _shard(policy: Policy, config: RLConfig, dtype: torch.dtype, device: torch.device) -> None:
    options = config.trainer.model
    mixed = options.lora is None and dtype != torch.float32  # master weights are float32, the forward pass is not
    sharded = fsdp.world_size() > 1 and options.shard
    if sharded and options.quant is not None and options.quant.shard_base:
        shard_packed(policy, fsdp.world_size() // fsdp.meshes().replicas)
    if sharded or mixed:
        fsdp.shard(policy, policy.layers, device=device, compute_dtype=dtype if mixed else None)
