"""Rules about `[trainer]`."""

from collections.abc import Callable, Iterator

from turnwise.config.problems import Problem
from turnwise.config.root import RLConfig

Rule = Callable[[RLConfig], Iterator[Problem]]
UNQUANTISED = ("lm_head", "embed_tokens")
FUSED_IN_VLLM = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def _trainer_processes(config: RLConfig) -> Iterator[Problem]:
    processes, gpus = config.trainer.processes, config.gpus.trainer
    if gpus and processes is not None and processes != len(gpus):
        yield Problem(
            ("trainer.processes", "gpus.trainer"),
            f"trainer.processes = {processes}, but gpus.trainer = {gpus} makes {len(gpus)} processes, one a GPU; "
            "leave processes out.",
        )


def _trainer_replicas(config: RLConfig) -> Iterator[Problem]:
    model, processes = config.trainer.model, len(config.gpus.trainer) or config.trainer.processes or 1
    if model.replicas is None:
        return
    if not model.shard:
        yield Problem(
            ("trainer.model.replicas", "trainer.model.shard"),
            f"trainer.model.replicas = {model.replicas} are copies of a sharded model, and trainer.model.shard = false makes "
            "one a process; leave one of them out.",
        )
    elif processes % model.replicas:
        fitting = [count for count in range(1, processes + 1) if processes % count == 0]
        yield Problem(
            ("trainer.model.replicas", "gpus.trainer", "trainer.processes"),
            f"trainer.model.replicas = {model.replicas} does not divide the {processes} processes of the trainer; "
            f"use {' or '.join(map(str, fitting))}.",
        )


def _weight_transfer(config: RLConfig) -> Iterator[Problem]:
    if config.trainer.weight_transfer != "broadcast":
        return
    if config.trainer.model.lora is not None:
        yield Problem(
            ("trainer.weight_transfer", "trainer.model.lora"),
            'trainer.weight_transfer = "broadcast" carries full weights, and trainer.model.lora is set: adapters travel as '
            'files; use "auto", or train all parameters with --no-trainer.model.lora.',
        )
    common = [gpu for gpu in config.gpus.trainer if gpu in config.gpus.inference]
    if common:
        yield Problem(
            ("trainer.weight_transfer", "gpus.trainer", "gpus.inference"),
            f'trainer.weight_transfer = "broadcast" needs GPUs that engines and trainer do not share, and both use GPU '
            f'{", ".join(map(str, common))}: NCCL takes one process a GPU; use "files", or GPUs apart.',
        )


def _loss(config: RLConfig) -> Iterator[Problem]:
    loss = config.trainer.loss
    if loss.kind == "cispo" and loss.clip_high < 1:
        yield Problem(
            ("trainer.loss.clip_high", "trainer.loss.kind"),
            f'trainer.loss.clip_high = {loss.clip_high:g} is the absolute bound of the ratio for kind = "cispo" and would '
            "shrink every gradient; use 1 or more, for example 5.0.",
        )
    if loss.kind == "cispo" and loss.dual_clip is not None:
        yield Problem(
            ("trainer.loss.dual_clip", "trainer.loss.kind"),
            f'trainer.loss.dual_clip = {loss.dual_clip:g} has no meaning for kind = "cispo", '
            "which has no clipped surrogate; remove it.",
        )
    if loss.importance_sampling != "none" and loss.old_logprobs == "behaviour":
        yield Problem(
            ("trainer.loss.old_logprobs", "trainer.loss.importance_sampling"),
            f'trainer.loss.old_logprobs = "behaviour" with importance_sampling = "{loss.importance_sampling}" would correct for '
            'the policy that sampled twice; use one of the two: old_logprobs = "auto", or importance_sampling = "none".',
        )
    if loss.importance_sampling != "none" and loss.importance_cap < 1:
        yield Problem(
            ("trainer.loss.importance_cap", "trainer.loss.importance_sampling"),
            f'trainer.loss.importance_cap = {loss.importance_cap:g} with importance_sampling = "{loss.importance_sampling}" '
            "would touch tokens on which engine and trainer agree; use 1 or more, for example 2.0.",
        )


def _quant(config: RLConfig) -> Iterator[Problem]:
    quant = config.trainer.model.quant
    if quant is None:
        return
    for name in quant.target_modules:
        if name in UNQUANTISED:
            yield Problem(
                ("trainer.model.quant.target_modules",),
                f'trainer.model.quant.target_modules names "{name}": embeddings and the output layer keep their type; '
                "leave it out.",
            )
    if quant.shard_base and config.trainer.model.lora is None:
        yield Problem(
            ("trainer.model.quant.shard_base", "trainer.model.lora"),
            "trainer.model.quant.shard_base = true is about the packed base under LoRA, and trainer.model.lora is unset: weights "
            "that train are sharded by trainer.model.shard; leave shard_base out.",
        )
    elif quant.shard_base and not config.trainer.model.shard:
        yield Problem(
            ("trainer.model.quant.shard_base", "trainer.model.shard"),
            "trainer.model.quant.shard_base = true shards the packed base, and trainer.model.shard = false shards nothing; "
            "leave one of them out.",
        )
    yield from _quant_in_vllm(config, quant.target_modules)


def _quant_in_vllm(config: RLConfig, modules: list[str]) -> Iterator[Problem]:
    """What vLLM cannot serve of a packed base; after full fine-tuning it serves plain weights."""
    if config.inference.engine != "vllm" or config.trainer.model.lora is None:
        return
    if not config.gpus.inference:
        yield Problem(
            ("trainer.model.quant", "inference.engine", "gpus.inference"),
            'trainer.model.quant is set, inference.engine = "vllm" and gpus.inference = []: vLLM has no product with MXFP4 '
            'weights for CPUs; use engine = "embedded", or name GPUs.',
        )
    for fused in FUSED_IN_VLLM:
        named = [name for name in fused if name in modules]
        if named and len(named) < len(fused):
            yield Problem(
                ("trainer.model.quant.target_modules", "inference.engine"),
                f"trainer.model.quant.target_modules names {', '.join(named)} of {', '.join(fused)}, which vLLM fuses into one "
                "layer; name all of them, or none.",
            )


def _schedule(config: RLConfig) -> Iterator[Problem]:
    warmup = config.trainer.optim.warmup_steps
    if config.max_steps is not None and warmup >= config.max_steps and warmup > 0:
        yield Problem(
            ("trainer.optim.warmup_steps", "max_steps"),
            f"trainer.optim.warmup_steps = {warmup} never ends within max_steps = {config.max_steps}; use fewer.",
        )


TRAINER_RULES: tuple[Rule, ...] = (
    _trainer_processes,
    _trainer_replicas,
    _weight_transfer,
    _loss,
    _quant,
    _schedule,
)
