"""Rules between tables: each with the fault planted, and with a configuration that keeps it."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.config import RLConfig
from turnwise.config.files import merge
from turnwise.config.root import shared_gpu_reserve
from turnwise.config.rules import broken_rules

VLLM = {"inference": {"engine": "vllm"}}
SOUND = {"max_steps": 10, "orchestrator": {"env": [{"id": "wordle"}]}}


def texts(changes: dict[str, Any]) -> list[str]:
    return [problem.text for problem in broken_rules(RLConfig.model_validate(merge(SOUND, changes)))]


def test_a_sound_configuration_breaks_no_rule():
    assert texts({}) == []


FAULTS = [
    ({"max_steps": None}, "max_steps is not set; set max_steps, or epochs instead."),
    ({"epochs": 2}, "max_steps = 10 and epochs = 2 are both set, and one follows from the other; remove one."),
    ({"orchestrator": {"env": []}}, "orchestrator.env is empty"),
    (
        {"orchestrator": {"batch_size": 30}},
        "orchestrator.batch_size = 30 is not a multiple of rollouts_per_example = 8; use 24 or 32.",
    ),
    ({"orchestrator": {"batch_size": 4}}, "orchestrator.batch_size = 4 is not a multiple of rollouts_per_example = 8; use 8."),
    (
        VLLM | {"gpus": {"inference": [0, 1], "trainer": [1, 2]}},
        "gpus.inference = [0, 1] and gpus.trainer = [1, 2]: GPU 1 is in both; give it to one of them, or set gpus.share = "
        "true to split its memory.",
    ),
    (
        {"gpus": {"containers": [3], "trainer": [3], "share": True}},
        "gpus.trainer = [3] and gpus.containers = [3]: GPU 3 is in both; GPUs of containers are never shared; give it to "
        "one of them.",
    ),
    (
        VLLM | {"gpus": {"inference": [3], "containers": [3], "trainer": [3], "share": True}},
        "gpus.inference = [3] and gpus.trainer = [3] and gpus.containers = [3]: GPU 3 is in all three; GPUs of containers",
    ),
    (
        {"gpus": {"inference": [0]}, "inference": {"engine": "embedded"}},
        'gpus.inference = [0] needs inference.engine = "vllm": the embedded engine computes on CPUs only; set the engine, or',
    ),
    (
        {"inference": {"engine": "vllm", "vllm": {"gpu_memory_utilization": 1.5}}},
        "inference.vllm.gpu_memory_utilization = 1.5 must be a fraction of a GPU's memory, above 0 and at most 1.",
    ),
    (
        {"inference": {"engine": "vllm", "vllm": {"gpu-memory-utilization": "half"}}},
        "inference.vllm.gpu_memory_utilization = 'half' must be a fraction",
    ),
    ({"gpus": {"trainer": [2, 2]}}, "gpus.trainer = [2, 2] names GPU 2 2 times; name it once."),
    ({"gpus": {"trainer": [-1]}}, "GPU -1 cannot exist"),
    (
        {"gpus": {"inference": [0, 1, 2]}, "inference": {"engine": "vllm", "tp": 2}},
        "inference.tp = 2 does not divide the 3 GPUs of gpus.inference = [0, 1, 2]",
    ),
    (
        {"gpus": {"inference": [0, 1]}, "inference": {"engine": "vllm", "dp": 3}},
        "inference.dp = 3 replicas of tp = 1 need 3 GPUs",
    ),
    ({"inference": {"tp": 2}}, 'inference.tp = 2 needs engine = "vllm"'),
    ({"inference": {"port": 65535, "dp": 2}}, "inference.port = 65535 leaves no port for 2 replicas"),
    ({"inference": {"max_loras": 2}}, "inference.max_loras = 2 is too few for orchestrator.max_staleness = 1"),
    ({"orchestrator": {"sampling": {"max_tokens": 2048}}}, "orchestrator.sampling.max_tokens = 2048 leaves no room for a prompt"),
    (
        {"orchestrator": {"overlong": {}, "sampling": {"max_tokens": 128}}},
        "orchestrator.overlong.buffer = 128 would punish every reply: it must be less than the limit of 128 tokens; use 8,",
    ),
    ({"orchestrator": {"overlong": {"buffer": 9}, "sampling": {"max_tokens": 8}}}, "limit of 8 tokens; raise the limit."),
    (
        {"orchestrator": {"overlong": {"max_tokens": 384}, "sampling": {"max_tokens": 256}}},
        "punishes replies of more than 256 tokens, and orchestrator.sampling.max_tokens = 256 allows none; leave the first out.",
    ),
    (
        {"trainer": {"model": {"quant": {"target_modules": ["q_proj", "lm_head"]}}}},
        'trainer.model.quant.target_modules names "lm_head": embeddings and the output layer keep their type; leave it out.',
    ),
    (
        {"trainer": {"model": {"quant": {"shard_base": True}, "lora": None}}},
        "trainer.model.quant.shard_base = true is about the packed base under LoRA, and trainer.model.lora is unset",
    ),
    (
        {"trainer": {"model": {"quant": {"shard_base": True}, "shard": False}}},
        "trainer.model.quant.shard_base = true shards the packed base, and trainer.model.shard = false shards nothing",
    ),
    (
        {"trainer": {"model": {"quant": {}}}, "inference": {"engine": "vllm"}},
        'vLLM has no product with MXFP4 weights for CPUs; use engine = "embedded", or name GPUs.',
    ),
    (
        VLLM | {"trainer": {"model": {"quant": {"target_modules": ["q_proj", "v_proj"]}}}, "gpus": {"inference": [0]}},
        "trainer.model.quant.target_modules names q_proj, v_proj of q_proj, k_proj, v_proj, which vLLM fuses into one layer",
    ),
    (
        {"inference": {"noise": {"sigma_start": 0.001, "sigma_end": 0.001}}},
        "inference.noise.sigma_end = 0.001 must be less than sigma_start = 0.001, since noise fades out over the run; use 1e-05,",
    ),
    ({"trainer": {"micro_batch_tokens": 100}}, "trainer.micro_batch_tokens = 100 cannot hold one sample of seq_len = 2048"),
    ({"gpus": {"trainer": [0, 1]}, "trainer": {"processes": 3}}, "trainer.processes = 3, but gpus.trainer = [0, 1]"),
    (
        {"gpus": {"trainer": [0, 1, 2, 3]}, "trainer": {"model": {"replicas": 3}}},
        "trainer.model.replicas = 3 does not divide the 4 processes of the trainer; use 1 or 2 or 4.",
    ),
    (
        {"trainer": {"processes": 2, "model": {"replicas": 2, "shard": False}}},
        "trainer.model.replicas = 2 are copies of a sharded model, and trainer.model.shard = false makes one a process;",
    ),
    (
        {"trainer": {"weight_transfer": "broadcast"}},
        'trainer.weight_transfer = "broadcast" carries full weights, and trainer.model.lora is set: adapters travel as files',
    ),
    (
        VLLM
        | {"gpus": {"inference": [0, 1], "trainer": [1, 2], "share": True}}
        | {"trainer": {"weight_transfer": "broadcast", "model": {"lora": None}}},
        "needs GPUs that engines and trainer do not share, and both use GPU 1: NCCL takes one process a GPU; use",
    ),
    ({"trainer": {"loss": {"kind": "cispo"}}}, "trainer.loss.clip_high = 0.2 is the absolute bound of the ratio"),
    ({"trainer": {"loss": {"kind": "cispo", "clip_high": 5.0, "dual_clip": 3.0}}}, "trainer.loss.dual_clip = 3 has no meaning"),
    (
        {"trainer": {"loss": {"importance_sampling": "truncate", "importance_cap": 0.5}}},
        'trainer.loss.importance_cap = 0.5 with importance_sampling = "truncate"',
    ),
    (
        {"trainer": {"loss": {"importance_sampling": "mask", "old_logprobs": "behaviour"}}},
        'trainer.loss.old_logprobs = "behaviour" with importance_sampling = "mask" would correct for the policy that',
    ),
    ({"trainer": {"optim": {"warmup_steps": 10}}}, "trainer.optim.warmup_steps = 10 never ends within max_steps = 10"),
    ({"stop": {"stop_on_success": True}}, "stop.stop_on_success = true needs a condition"),
]


@pytest.mark.parametrize(("changes", "words"), FAULTS, ids=[words[:50] for _, words in FAULTS])
def test_a_planted_fault_is_told_once_with_key_value_rule_and_remedy(changes: dict[str, Any], words: str):
    found = texts(changes)
    assert len(found) == 1
    assert found[0].startswith(words) or words in found[0]


KEPT = [
    VLLM | {"gpus": {"inference": [0], "trainer": [0], "share": True}},
    VLLM | {"gpus": {"inference": [0, 1], "trainer": [1, 2], "containers": [3], "share": True, "inference_memory": 0.5}},
    {"gpus": {"share": True, "inference_memory": 0.5}},
    {"inference": {"engine": "vllm", "vllm": {"gpu_memory_utilization": 1}}},
    {"epochs": 2.5, "max_steps": None},
    {"gpus": {"inference": [0, 1], "trainer": [2, 3], "containers": [4]}, "inference": {"engine": "vllm", "tp": 2, "dp": 1}},
    {"inference": {"max_loras": 2}, "trainer": {"model": {"lora": None}}},
    {"trainer": {"loss": {"kind": "cispo", "clip_high": 5.0}}},
    {"orchestrator": {"overlong": {"buffer": 64, "max_tokens": 256}, "sampling": {"max_tokens": 256}}},
    {"trainer": {"model": {"quant": {"shard_base": True}}}, "inference": {"noise": {"stages": 3}}},
    {"trainer": {"model": {"quant": {"scale_mode": "ceil"}, "lora": None}}},
    {"trainer": {"model": {"quant": {}, "lora": None}}, "inference": {"engine": "vllm"}},
    VLLM | {"trainer": {"model": {"quant": {"target_modules": ["gate_proj", "up_proj"]}}}, "gpus": {"inference": [0]}},
    {"stop": {"stop_on_success": True, "success_when": "running_mean(total_reward) > 1"}},
    {"gpus": {"trainer": [0, 1]}, "trainer": {"processes": 2}},
]


@pytest.mark.parametrize("changes", KEPT)
def test_what_keeps_the_rules_passes(changes: dict[str, Any]):
    assert texts(changes) == []


@settings(deadline=None)
@given(st.integers(2, 200), st.integers(2, 40))
def test_the_batch_sizes_that_are_proposed_keep_the_rule(batch: int, group: int):
    found = texts({"orchestrator": {"batch_size": batch, "rollouts_per_example": group}})
    assert bool(found) == (batch % group != 0)
    if found:
        proposed = [int(word) for word in found[0].split("use ")[1].rstrip(".").split(" or ")]
        assert all(size % group == 0 and size >= group and abs(size - batch) < group for size in proposed)


@settings(deadline=None)
@given(*[st.lists(st.integers(0, 7), unique=True, max_size=4) for _ in range(3)])
def test_a_gpu_in_two_lists_is_always_found(inference: list[int], trainer: list[int], containers: list[int]):
    lists = {"inference": inference, "trainer": trainer, "containers": containers}
    found = texts(VLLM | {"gpus": lists})
    assert len(found) == sum(sum(gpu in part for part in lists.values()) > 1 for gpu in range(8))
    shared = texts(VLLM | {"gpus": lists | {"share": True}})
    assert len(shared) == sum(gpu in containers and (gpu in inference or gpu in trainer) for gpu in range(8))
    gpus = RLConfig.model_validate(VLLM | {"gpus": lists | {"share": True}}).gpus
    assert sorted(gpus.shared) == sorted(set(inference) & set(trainer))


@pytest.mark.parametrize(
    ("tables", "engine"),
    [
        ({}, "embedded"),
        ({"gpus": {"trainer": [0]}}, "embedded"),
        ({"gpus": {"inference": []}, "inference": {"dp": 2}}, "embedded"),
        ({"gpus": {"inference": [0]}}, "vllm"),
        ({"gpus": {"inference": [0, 1]}, "inference": {"tp": 2}}, "vllm"),
        ({"gpus": {"inference": [0]}, "inference": {"engine": "embedded"}}, "embedded"),
    ],
)
def test_inference_gpus_choose_the_engine_where_nobody_did(tables: dict[str, Any], engine: str):
    assert RLConfig.model_validate(tables).inference.engine == engine


@pytest.mark.parametrize(
    ("gpus", "vllm", "fraction"),
    [
        ({}, {}, None),
        ({"inference_memory": 0.5}, {}, 0.5),
        ({"inference_memory": 0.5}, {"gpu_memory_utilization": 0.7}, 0.7),
        ({"inference_memory": 0.5}, {"gpu-memory-utilization": 0.8, "max_num_seqs": 4}, 0.8),
    ],
)
def test_vllms_own_memory_setting_wins_over_ours(gpus: dict[str, Any], vllm: dict[str, Any], fraction: float | None):
    config = RLConfig.model_validate({"gpus": gpus, "inference": {"engine": "vllm", "vllm": vllm}})
    assert config.engine_memory == fraction


def test_the_trainer_gets_of_a_shared_gpu_what_engine_and_reserve_leave():
    tables = {"inference": [0], "trainer": [0, 1], "share": True, "inference_memory": 0.75}
    config = RLConfig.model_validate(VLLM | {"gpus": tables})
    assert config.trainer_memory(0, 80 * 2**30) == 20 * 2**30 - shared_gpu_reserve(80 * 2**30)
    assert config.trainer_memory(1, 80 * 2**30) is None
    assert RLConfig.model_validate(VLLM | {"gpus": tables | {"share": False}}).trainer_memory(0, 80 * 2**30) is None


FULL: dict[str, Any] = {"model": {"lora": None}}
TRANSFERS: list[tuple[dict[str, Any], tuple[str, str]]] = [
    ({}, ("files", "gloo")),
    ({"trainer": FULL}, ("files", "gloo")),
    ({"trainer": FULL | {"weight_transfer": "broadcast"}}, ("broadcast", "gloo")),
    (VLLM | {"gpus": {"inference": [0], "trainer": [1, 2]}}, ("files", "nccl")),
    (VLLM | {"gpus": {"inference": [0], "trainer": [1, 2]}, "trainer": FULL}, ("broadcast", "nccl")),
    (VLLM | {"gpus": {"inference": [0], "trainer": [1]}, "trainer": FULL | {"weight_transfer": "files"}}, ("files", "nccl")),
    (VLLM | {"gpus": {"inference": [0, 1], "trainer": [1, 2], "share": True}, "trainer": FULL}, ("files", "nccl")),
    (VLLM | {"gpus": {"inference": [0]}, "trainer": FULL | {"weight_transfer": "broadcast"}}, ("broadcast", "gloo")),
]


@pytest.mark.parametrize(("changes", "wanted"), TRANSFERS)
def test_full_weights_are_broadcast_between_gpus_that_are_apart_unless_someone_chose(
    changes: dict[str, Any], wanted: tuple[str, str]
):
    config = RLConfig.model_validate(merge(SOUND, changes))
    assert texts(changes) == []
    assert (config.weight_transfer, config.broadcast_backend) == wanted


@pytest.mark.parametrize(("engine", "chosen", "seeded"), [("vllm", None, False), ("embedded", None, True), ("vllm", True, True)])
def test_requests_have_seeds_where_they_are_free_or_asked_for(engine: str, chosen: bool | None, seeded: bool):
    tables = {"inference": {"engine": engine}, "orchestrator": {"sampling": {"request_seeds": chosen}}}
    assert RLConfig.model_validate(tables).request_seeds is seeded
