"""The memory estimate, by numbers worked out by hand for Qwen3-4B and Qwen3-8B, and against what the trainer really keeps."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.shapes import QWEN3_4B, QWEN3_8B
from turnwise.config import RLConfig
from turnwise.config.files import merge
from turnwise.launch.memory import Estimate, estimate, gpu_engine_needs, layer_activations, trainer_parts
from turnwise.launch.shape import ModelShape, read_shape

H200 = 143771 * 2**20
GIB = 2**30
PACK = 16384
TWO_GPUS: dict[str, Any] = {
    "gpus": {"inference": [0], "trainer": [1]},
    "inference": {"engine": "vllm"},
    "trainer": {"micro_batch_tokens": PACK},
    "seq_len": PACK,
}


@pytest.fixture
def qwen4(tmp_path: Path) -> ModelShape:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_4B))
    return read_shape(tmp_path)


@pytest.fixture
def qwen8(tmp_path: Path) -> ModelShape:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    return read_shape(tmp_path)


def config(**changes: Any) -> RLConfig:
    return RLConfig.model_validate(merge(TWO_GPUS, changes))


def trainer(shape: ModelShape, **options: Any) -> dict[str, int]:
    """The trainer's parts under `trainer.*` options, activations under a name without their number of tokens."""
    parts = trainer_parts(config(trainer=options), shape)
    return {name.partition(" (")[0]: size for name, size in parts.items()}


def test_a_layer_of_qwen3_4b_keeps_158_kib_of_a_token(qwen4: ModelShape):
    norms = 2 * (4 + 2) * 2560  # input in float32 and output in bfloat16, of two norms
    heads = 4 * (32 + 8) * 128  # the norms of queries and keys, in float32
    attention = 4 * 32 * 128 * 2  # queries, keys and values for every head, output
    feed_forward = 4 * 9728 * 2  # gate, its activation, up, their product
    assert norms + heads + attention + feed_forward == 161_792
    assert layer_activations(qwen4, 2, on_gpu=True) == 161_792


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, 36 * 161_792 + 77_824),
        ({"gradient_checkpointing": True, "checkpoint_scope": "mlp"}, 36 * (161_792 - 77_824) + 2 * 77_824),
        ({"gradient_checkpointing": True}, 36 * 2560 * 2 + 161_792 + 77_824),
    ],
    ids=["all is kept", "feed-forward blocks are computed again", "layers are computed again"],
)
def test_activations_of_qwen3_4b_with_and_without_checkpointing(qwen4: ModelShape, options: dict[str, Any], kept: int):
    parts = trainer(qwen4, model=options)
    assert parts["activations"] == PACK * kept


def test_an_adapter_on_qwen3_4b_costs_its_states_and_the_frozen_base_its_weights(qwen4: ModelShape):
    parts = trainer(qwen4, model={"lora": {"rank": 16}})
    # rank x (in + out) of q, k, v, o, gate, up, down
    adapter = 36 * 16 * ((2560 + 4096) + 2 * (2560 + 1024) + (4096 + 2560) + 2 * (2560 + 9728) + (9728 + 2560))
    assert adapter == 33_030_144
    assert parts["weights"] == 2 * 4_022_468_096
    assert parts["adapter and its optimiser"] == 16 * adapter  # parameter, gradient, two moments: float32
    assert "gathered layers" not in parts
    assert 95 * GIB < sum(parts.values()) < 110 * GIB  # one H200 holds it without checkpointing


def test_packed_weights_take_17_bits_for_four_and_the_rest_keeps_its_type(qwen4: ModelShape):
    linears = 36 * 2560 * (4096 + 2 * 1024 + 4096 + 3 * 9728)
    assert linears == 3_633_315_840
    parts = trainer(qwen4, model={"quant": {}})
    assert parts["weights"] == linears * 17 // 32 + 2 * (4_022_468_096 - linears)
    assert 2.6e9 < parts["weights"] < 2.8e9  # 8.0 GB in bfloat16
    assert parts["a decoded layer"] == 2 * 2560 * 9728
    engine = gpu_engine_needs(config(trainer={"model": {"quant": {}}}), qwen4)
    assert engine["weights"] == parts["weights"]
    some = trainer(qwen4, model={"quant": {"target_modules": ["o_proj"]}})
    assert some["weights"] == 36 * 2560 * 4096 * 17 // 32 + 2 * (4_022_468_096 - 36 * 2560 * 4096)


def test_the_packed_base_is_whole_on_every_rank_unless_it_is_sharded(qwen4: ModelShape):
    linears = 36 * 2560 * (4096 + 2 * 1024 + 4096 + 3 * 9728)
    gpus = {"gpus": {"inference": [0], "trainer": [1, 2]}}
    for shard_base, divided in ((False, 1), (True, 2)):
        both = config(**gpus, trainer={"model": {"quant": {"shard_base": shard_base}}})
        weights = trainer_parts(both, qwen4)["weights"]
        assert weights == linears * 17 // 32 // divided + 2 * (4_022_468_096 - linears) // 2


def test_weights_that_train_quantised_are_whole_and_their_codes_wait_for_the_backward_pass(qwen4: ModelShape):
    plain, rounded = (trainer(qwen4, model={"lora": None, **more}) for more in ({}, {"quant": {}}))
    codes = 36 * 2560 * (4096 + 2 * 1024 + 4096 + 3 * 9728) * 17 // 32
    assert rounded.pop("quantised weights") == codes
    assert rounded == plain
    again = trainer(qwen4, model={"lora": None, "quant": {}, "gradient_checkpointing": True})
    assert again["quantised weights"] == codes // 36


def test_all_of_qwen3_8b_needs_16_bytes_a_parameter_and_hardly_fits_on_one_h200_without_offloading(qwen8: ModelShape):
    parts = trainer(qwen8, model={"lora": None, "gradient_checkpointing": True})
    assert parts["weights"] + parts["gradients and optimiser"] == 16 * 8_190_735_360
    assert 0.95 * H200 < sum(parts.values()) < H200
    offloaded = trainer(qwen8, model={"lora": None, "gradient_checkpointing": True}, optim={"offload": True})
    assert sum(offloaded.values()) < 0.6 * H200


def test_offloaded_moments_are_in_ram_once_for_each_replica(qwen8: ModelShape):
    def ram(**trainer: object) -> dict[str, int]:
        tables = {"gpus": {"trainer": [0, 1], "inference": [2]}, "inference": {"engine": "vllm"}, "trainer": trainer}
        estimates = estimate(RLConfig.model_validate(tables), qwen8)
        return {name: size for part in estimates if part.place == "RAM" for name, size in part.parts.items()}

    assert ram(model={"lora": None}) == {}
    assert ram(model={"lora": None}, optim={"offload": True}) == {"moments": 8 * 8_190_735_360}
    assert ram(model={"lora": None, "replicas": 2}, optim={"offload": True}) == {"moments": 16 * 8_190_735_360}
    assert ram(model={"lora": None, "shard": False}, optim={"offload": True}) == {"moments": 16 * 8_190_735_360}


def test_several_updates_need_a_copy_of_what_is_trained(qwen8: ModelShape):
    once = trainer(qwen8, model={"lora": None})
    twice = trainer(qwen8, model={"lora": None}, updates_per_batch=2)
    assert twice["gradients and optimiser"] - once["gradients and optimiser"] == 4 * 8_190_735_360


def test_offloaded_moments_save_8_bytes_a_parameter(qwen8: ModelShape):
    kept = trainer(qwen8, model={"lora": None})
    offloaded = trainer(qwen8, model={"lora": None}, optim={"offload": True})
    assert kept["gradients and optimiser"] - offloaded["gradients and optimiser"] == 8 * 8_190_735_360
    asked = config(trainer={"model": {"lora": None}, "optim": {"offload": True}})
    assert {"moments": 8 * 8_190_735_360} in [part.parts for part in estimate(asked, qwen8) if part.place == "RAM"]


def test_sharding_divides_states_and_gathers_two_layers_and_the_embeddings(qwen8: ModelShape):
    four = config(gpus={"trainer": [1, 2, 3, 4]}, trainer={"model": {"lora": None}})
    parts = trainer_parts(four, qwen8)
    assert parts["weights"] == 8_190_735_360  # 4 bytes a parameter over 4 processes
    assert parts["gathered layers"] == 2 * (2 * 192_946_432 + 2 * 151_936 * 4096)
    halves = trainer_parts(config(gpus={"trainer": [1, 2, 3, 4]}, trainer={"model": {"lora": None, "replicas": 2}}), qwen8)
    assert halves["weights"] == 2 * parts["weights"]
    whole = trainer_parts(config(gpus={"trainer": [1, 2, 3, 4]}, trainer={"model": {"lora": None, "shard": False}}), qwen8)
    assert whole["weights"] == 4 * parts["weights"]


def test_a_kl_penalty_under_full_fine_tuning_needs_the_model_twice(qwen4: ModelShape):
    parts = trainer(qwen4, model={"lora": None}, loss={"kl_beta": 0.01})
    assert parts["reference model"] == 2 * 4_022_468_096
    assert "reference model" not in trainer(qwen4, loss={"kl_beta": 0.01})


def test_logits_never_take_more_than_a_chunk(qwen4: ModelShape):
    assert trainer(qwen4)["logits"] == 12 * 2**27 + PACK * 2560 * 4


def test_an_engine_with_qwen3_4b_gives_the_rest_of_its_part_to_the_cache(qwen4: ModelShape):
    (engine,) = (part for part in estimate(config(), qwen4, {0: H200, 1: H200}) if part.process == "inference 0")
    ((cache, size),) = ((name, size) for name, size in engine.parts.items() if name.startswith("KV cache"))
    assert engine.total == int(0.92 * H200)
    assert cache == f"KV cache (the rest: {size // 147_456:,} tokens)"
    assert 750_000 < size // 147_456 < 900_000  # some 114 GiB


def test_adapter_slots_are_as_large_as_the_largest_adapter_that_vllm_admits(qwen4: ModelShape):
    rank_20_is_32 = config(trainer={"model": {"lora": {"rank": 20, "target_modules": ["q_proj"]}}})
    parts = gpu_engine_needs(rank_20_is_32, qwen4, H200)
    assert parts["4 adapter slots"] == 4 * 2 * 66_060_288  # max_staleness 1, and three; every linear layer at rank 32
    assert "adapter slots" not in " ".join(gpu_engine_needs(config(trainer={"model": {"lora": None}}), qwen4, H200))


def test_the_engines_step_follows_the_size_of_the_gpu_and_the_users_limits(qwen4: ModelShape):
    work = "forward pass and CUDA graphs"
    large, small = (gpu_engine_needs(config(), qwen4, total)[work] for total in (H200, 24 * GIB))
    assert large - small == (8192 - 2048) * (4 * 9728 + 6 * 2560) * 2 + (1024 - 256) * 151_936 * 8
    limited = config(inference={"vllm": {"max-num-seqs": 256, "max_num_batched_tokens": 2048}})
    assert gpu_engine_needs(limited, qwen4, H200)[work] == small


def test_tensor_parallelism_divides_weights_and_cache(qwen4: ModelShape):
    pair = config(gpus={"inference": [0, 1], "trainer": [2]}, inference={"tp": 2})
    parts = [part for part in estimate(pair, qwen4, {0: H200, 1: H200}) if part.process == "inference 0"]
    assert [part.place for part in parts] == ["GPU 0", "GPU 1"]
    assert parts[0].certain == 4_022_468_096
    assert any(name.endswith(f"{size // 73_728:,} tokens)") for name, size in parts[0].parts.items() if "cache" in name)


def test_the_cache_is_what_rollouts_need_where_the_gpu_is_not_known(qwen4: ModelShape):
    small = config(seq_len=1024, orchestrator={"max_inflight": 10}, trainer={"micro_batch_tokens": 1024})
    engine = estimate(small, qwen4)[0]
    assert engine.parts["KV cache (10 x 1024 tokens)"] == 10 * 1024 * 147_456


def test_each_gpu_is_listed_once_for_each_of_its_processes(qwen4: ModelShape):
    shared = config(gpus={"inference": [0, 1], "trainer": [0, 2], "share": True})
    places = [(part.place, part.process) for part in estimate(shared, qwen4)]
    assert places == [
        *[("GPU 0", "inference 0"), ("GPU 1", "inference 1")],
        *[("GPU 0", "trainer rank 0"), ("GPU 2", "trainer rank 1")],
    ]


def test_on_a_cpu_every_process_is_in_ram(qwen4: ModelShape):
    parts = estimate(RLConfig.model_validate({"trainer": {"processes": 2}}), qwen4)
    assert [part.process for part in parts] == ["inference 0", "trainer rank 0", "trainer rank 1", "orchestrator, torchrun, rl"]
    assert {part.place for part in parts} == {"RAM"}
    assert "prefix cache" in parts[0].parts


def test_an_estimate_is_the_sum_of_its_parts():
    assert Estimate("RAM", "x", {"weights": 3, "process": 4}).total == 7
    assert Estimate("RAM", "x", {"process": 4}).certain == 0


@pytest.mark.parametrize("lora", [True, False], ids=["adapter", "all parameters"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_layer_keeps_what_the_estimate_says(tmp_path: Path, family: str, lora: bool):
    """The bytes that autograd saves in the trainer's own forward pass, two layers against four; within a sixth."""
    kept = [_saved_bytes(family, layers, lora=lora) for layers in (2, 4)]
    sizes = ModelShape(2, 256, 972, 8, 2, 64, 1000, tied=True, dtype="bfloat16", qk_norm=family == "qwen3")
    assert (kept[1] - kept[0]) / 2 / 512 == pytest.approx(layer_activations(sizes, 2, on_gpu=False), rel=1 / 6)


def _saved_bytes(family: str, layers: int, *, lora: bool) -> int:
    """Bytes of all tensors that a forward pass over 512 tokens saves for its backward pass, parameters aside."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    from turnwise.config import LoraConfig
    from turnwise.trainer.attention import NO_PARENT, Layout, register_attention
    from turnwise.trainer.lora import add_lora
    from turnwise.trainer.model import Policy

    make_config, make_model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[family]
    sizes = make_config(
        **{"hidden_size": 256, "intermediate_size": 972, "num_hidden_layers": layers, "num_attention_heads": 8},
        **{"num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000, "tie_word_embeddings": True},
    )
    sizes._attn_implementation = register_attention()  # pyright: ignore[reportPrivateUsage]
    policy = Policy(make_model(sizes).to(torch.bfloat16))
    if lora:
        add_lora(policy.model, LoraConfig(), seed=0)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in policy.parameters()}
    saved: dict[int, tuple[int, torch.Tensor]] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.arange(512)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        policy(ids, torch.arange(512), Layout((512,), (NO_PARENT,)), torch.arange(511), ids[1:], 1.0, False)
    return sum(size for size, _ in saved.values())
