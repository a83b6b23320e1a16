"""`[gpus]` against machines that are written down here: what is missing, too small, taken or left idle."""

import json
from typing import Any

import pytest

from support.shapes import QWEN3_4B, SMOLLM2_135M
from turnwise.config import RLConfig
from turnwise.config.files import merge
from turnwise.launch.allocation import allocate, label
from turnwise.launch.gpus import Gpu, Machine, TorchBuild
from turnwise.launch.shape import ModelShape, read_shape

GIB = 2**30
CUDA = TorchBuild("2.11.0+cu130", "13.0")
CPU = TorchBuild("2.13.0+cpu", None)
BASE: dict[str, Any] = {"inference": {"engine": "vllm"}, "gpus": {"inference": [0], "trainer": [1]}, "seq_len": 1536}


def machine(*gib: float, used: dict[int, float] | None = None, offered: str | None = None, torch: TorchBuild = CUDA) -> Machine:
    """A machine with GPUs of these sizes."""
    held = used or {}
    gpus = [Gpu(str(i), f"GPU-{i}", "NVIDIA H200", int(size * GIB), int(held.get(i, 0) * GIB)) for i, size in enumerate(gib)]
    return Machine(tuple(gpus), offered, torch)


def config(**changes: Any) -> RLConfig:
    return RLConfig.model_validate(merge(BASE, changes))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    folder = tmp_path_factory.mktemp("small")
    (folder / "config.json").write_text(json.dumps(SMOLLM2_135M))
    return read_shape(folder)


@pytest.fixture(scope="module")
def qwen4(tmp_path_factory: pytest.TempPathFactory) -> ModelShape:
    folder = tmp_path_factory.mktemp("qwen")
    (folder / "config.json").write_text(json.dumps(QWEN3_4B))
    return read_shape(folder)


def test_two_free_gpus_hold_a_small_run(small: ModelShape):
    allocation = allocate(config(), machine(140, 140), small)
    assert (allocation.errors, allocation.lines(), allocation.config) == ((), [], config())


@pytest.mark.parametrize(
    ("gpus", "present", "words"),
    [
        (
            {"trainer": [2, 3]},
            machine(140, 140),
            "gpus.trainer = [2, 3] but this machine has 2 GPUs (0, 1); use those.",
        ),
        ({"trainer": [1]}, machine(140), "gpus.trainer = [1] but this machine has 1 GPU (0); use those."),
        (
            {"inference": [4]},
            Machine(machine(140, 140).gpus, "6,7", CUDA),
            "gpus.inference = [4] but CUDA_VISIBLE_DEVICES = '6,7' in the environment offers 2, which count as 0, 1 here",
        ),
        (
            {"inference": [], "trainer": [], "containers": [2]},
            machine(140, 140),
            "gpus.containers = [2] but this machine has 2 GPUs (0, 1)",
        ),
        ({}, Machine((), ""), "gpus.inference = [0] but CUDA_VISIBLE_DEVICES = '' in the environment hides all GPUs; unset it"),
        ({}, Machine(), "gpus.inference = [0] but this machine has no NVIDIA GPU; leave the list empty to use CPUs"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused(gpus: dict[str, Any], present: Machine, words: str, small: ModelShape):
    errors = allocate(config(gpus=gpus), present, small).errors
    assert errors[0].startswith(words)


def test_everything_that_is_missing_is_told_at_once(small: ModelShape):
    asked = config(gpus={"inference": [5], "trainer": [6], "containers": [7]})
    errors = allocate(asked, machine(140, torch=CPU), small).errors
    assert [error.split(" = ")[0] for error in errors] == ["gpus.inference", "gpus.trainer", "gpus.containers", "gpus.trainer"]


def test_trainer_gpus_need_a_torch_with_cuda(small: ModelShape):
    (error,) = allocate(config(), machine(140, 140, torch=CPU), small).errors
    assert error.startswith("gpus.trainer = [1] needs a torch with CUDA, and torch 2.13.0+cpu here has none; run `pip install ")
    assert allocate(config(gpus={"trainer": []}), machine(140, torch=CPU), small).errors == ()


def test_an_evaluation_asks_for_the_engines_gpus_only(small: ModelShape):
    asked = config(gpus={"trainer": [7], "share": True})
    assert allocate(asked, machine(140, torch=CPU), small, evaluation=True).errors == ()
    (error,) = allocate(config(gpus={"inference": [3]}), machine(140), small, evaluation=True).errors
    assert error.startswith("gpus.inference = [3]")


@pytest.mark.parametrize(
    ("gpus", "words"),
    [
        (
            {"inference": [], "trainer": [0]},
            "gpus.inference is empty, so vLLM runs on the CPU, which needs a build of vLLM for CPUs; set gpus.inference = [1]",
        ),
        ({"trainer": []}, "the trainer runs on the CPU, while GPU 1 is free; set gpus.trainer = [1]"),
    ],
)
def test_a_part_that_stays_on_the_cpu_beside_a_free_gpu_is_told(gpus: dict[str, Any], words: str, small: ModelShape):
    (warning,) = allocate(config(gpus=gpus), machine(140, 140), small).warnings
    assert warning.startswith(words)


def test_no_gpu_is_proposed_where_none_is_free(small: ModelShape):
    asked = config(gpus={"inference": [], "trainer": [0], "containers": [1]})
    (warning,) = allocate(asked, machine(140, 140), small).warnings
    assert warning == "gpus.inference is empty, so vLLM runs on the CPU, which needs a build of vLLM for CPUs."
    assert allocate(config(gpus={"trainer": [], "containers": [1]}), machine(140, 140), small).warnings == ()


@pytest.mark.parametrize(
    ("used", "memory", "words"),
    [
        (
            {0: 30},
            None,
            "GPU 0 (NVIDIA H200, 140.0 GiB): other processes hold 30.0 GiB of it (nvidia-smi lists them), and the engine starts "
            "only where 92% are free; end them, use another GPU, or set gpus.inference_memory below 0.79.",
        ),
        ({0: 30}, 0.5, None),
        ({0: 80}, 0.5, "the engine starts only where 50% are free"),
        ({0: 5}, None, None),
        ({1: 60}, None, None),
        ({1: 71}, None, "GPU 1 (NVIDIA H200, 140.0 GiB): other processes hold 71.0 GiB of it (nvidia-smi lists them); end them"),
    ],
)
def test_memory_that_others_hold_is_told_where_it_matters(
    used: dict[int, float], memory: float | None, words: str | None, small: ModelShape
):
    asked = config(gpus={"inference_memory": memory})
    warnings = allocate(asked, machine(140, 140, used=used), small).warnings
    assert len(warnings) == (words is not None)
    assert words is None or words in warnings[0]


def test_weights_that_exceed_a_gpu_are_an_error_and_an_estimate_that_does_a_warning(qwen4: ModelShape):
    tiny = allocate(config(), machine(140, 7), qwen4)
    assert tiny.errors == (
        "GPU 1 (NVIDIA H200, 7.0 GiB) cannot hold the trainer: the weights alone take 7.5 GiB, and its part is 7.0 GiB; "
        "use more GPUs, a smaller trainer.micro_batch_tokens, or trainer.model.gradient_checkpointing = true.",
    )
    tight = allocate(config(), machine(140, 12), qwen4)
    assert tight.errors == ()
    assert "GPU 1 (NVIDIA H200, 12.0 GiB) may be too small for the trainer: about" in tight.warnings[0]
    engine = allocate(config(), machine(8, 140), qwen4)
    assert "cannot hold the engine: the weights alone take 7.5 GiB, and its part is 7.4 GiB" in engine.errors[0]
    assert "may be too small for the engine" in allocate(config(), machine(9, 140), qwen4).warnings[0]


def test_a_shared_gpu_is_split_and_the_split_is_told(small: ModelShape):
    asked = config(gpus={"trainer": [0], "share": True})
    allocation = allocate(asked, machine(140), small)
    assert allocation.config.gpus.inference_memory == 0.9
    assert [split.gpu for split in allocation.splits] == [0]
    assert allocation.lines() == [
        "GPU 0 (NVIDIA H200, 140.0 GiB) is shared: engine 126.0 GiB (90%), trainer at most 9.7 GiB, 4.3 GiB stay free; "
        "the trainer starts once the engine serves."
    ]


def test_a_split_that_the_user_gives_stands_but_is_checked(qwen4: ModelShape):
    asked = config(gpus={"trainer": [0], "share": True, "inference_memory": 0.92})
    (error,) = allocate(asked, machine(80), qwen4).errors
    assert "cannot hold the trainer: the weights alone take 7.5 GiB, and its part is 3.3 GiB" in error
    half = allocate(config(gpus={"trainer": [0], "share": True, "inference_memory": 0.5}), machine(80), qwen4)
    assert (half.errors, half.warnings, half.config.gpus.inference_memory) == ((), (), 0.5)
    passed = config(gpus={"trainer": [0], "share": True}, inference={"vllm": {"gpu_memory_utilization": 0.6}})
    kept = allocate(passed, machine(80), qwen4)
    assert (kept.config.gpus.inference_memory, kept.splits[0].engine) == (None, int(0.6 * 80 * GIB))


def test_an_impossible_split_is_refused(qwen4: ModelShape):
    (error,) = allocate(config(gpus={"trainer": [0], "share": True}), machine(16), qwen4).errors
    assert error.startswith("gpus.share: GPU 0 has 16.0 GiB, too little for both")


@pytest.mark.parametrize(
    ("present", "known", "words"),
    [
        (Machine((Gpu("0"),), None, CUDA), True, "the memory of GPU 0 is not known (nvidia-smi tells it)"),
        (machine(140), False, "config.json is not at hand"),
    ],
)
def test_a_split_without_numbers_asks_for_one(present: Machine, known: bool, words: str, small: ModelShape):
    asked = config(gpus={"trainer": [0], "share": True})
    shape = small if known else "config.json is not at hand"
    (error,) = allocate(asked, present, shape).errors
    assert error == f"gpus.share: no split can be computed, since {words}; set gpus.inference_memory, for example to 0.5."
    given = config(gpus={"trainer": [0], "share": True, "inference_memory": 0.5})
    assert allocate(given, present, shape).errors == ()


def test_another_order_of_devices_than_nvidia_smis_is_told(small: ModelShape, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    (warning,) = allocate(config(), machine(140, 140, offered="0,1"), small).warnings
    assert warning.startswith(
        "CUDA_DEVICE_ORDER = FASTEST_FIRST is ignored: CUDA_VISIBLE_DEVICES = 0,1 is read in nvidia-smi's order"
    )
    assert allocate(config(), machine(140, 140), small).warnings == ()


def test_a_gpu_is_called_by_what_is_known_of_it():
    assert label(machine(139.8), 0) == "GPU 0 (NVIDIA H200, 139.8 GiB)"
    assert label(Machine((Gpu("0"),)), 0) == "GPU 0"
    assert label(Machine(), 3) == "GPU 3"
