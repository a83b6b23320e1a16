"""Causes of an ended process, from logs as engines and trainers write them."""

import re
from pathlib import Path

import pytest

from turnwise.config.problems import all_keys
from turnwise.launch.causes import CAUSES, Cause, likely_cause

NOISE = [f"(EngineCore pid=7) INFO 11-20 10:00:{i:02d} loading weights" for i in range(50)]
AFTER = ["(APIServer pid=3) Traceback (most recent call last):", *["  File somewhere"] * 60]
ENGINE_END = "(APIServer pid=3) RuntimeError: Engine core initialization failed. See root cause above."
OOM = (
    "(EngineCore pid=7) ERROR 11-20 [core.py:1] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 594.00 MiB. "
    "GPU 0 has a total capacity of 21.96 GiB of which 210.06 MiB is free."
)
FREE = (
    "(EngineCore pid=7) ValueError: Free memory on device cuda:0 (30.1/139.8 GiB) on startup is less than desired GPU memory "
    "utilization (0.92, 128.6 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
)
PROFILING = (
    "(EngineCore pid=7) AssertionError: Error in memory profiling. Initial free memory 90.1 GiB, current free memory 101.2 GiB. "
)
CACHE = "(EngineCore pid=7) ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"
LONG = (
    "ValueError: To serve at least one request with the model's max seq len (40960), (5.62 GiB KV cache is needed, which is "
    "larger than the available KV cache memory (2.10 GiB)."
)
SHARED = (
    "[rank 0] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 139.80 GiB "
    "of which 12.00 GiB is free. 9.50 GiB allowed; Of the allocated memory 9.40 GiB is allocated by PyTorch"
)
PLAIN = SHARED.replace("9.50 GiB allowed; ", "")


@pytest.mark.parametrize(
    ("line", "role", "told", "remedy"),
    [
        (OOM, "inference", "torch.OutOfMemoryError: CUDA out of memory. Tried", "gpus.inference_memory"),
        (FREE, "inference", "ValueError: Free memory on device cuda:0 (30.1/139.8 GiB)", "nvidia-smi"),
        (PROFILING, "inference", "AssertionError: Error in memory profiling.", "start again"),
        (CACHE, "inference", "ValueError: No available memory for the cache blocks.", "raise gpus.inference_memory"),
        (LONG, "inference", "ValueError: To serve at least one request", "lower seq_len"),
        (SHARED, "trainer", "torch.OutOfMemoryError: CUDA out of memory.", "its part of a GPU that it shares"),
        (PLAIN, "trainer", "torch.OutOfMemoryError: CUDA out of memory.", "trainer.micro_batch_tokens"),
        (
            "[rank 1] AssertionError: Torch not compiled with CUDA enabled",
            "trainer",
            "AssertionError: Torch not",
            "install a torch",
        ),
        ("RuntimeError: No CUDA GPUs are available", "trainer", "RuntimeError: No CUDA", "CUDA_VISIBLE_DEVICES"),
        ("  exitcode  : -9 (pid: 4711)", "trainer", "exitcode  : -9", "RAM"),
        ("ncclInvalidUsage: Duplicate GPU detected : rank 1", "trainer", "Duplicate GPU", "NCCL does not join"),
        ("CUDA error: all CUDA-capable devices are busy or unavailable", "inference", "busy", "nvidia-smi -c DEFAULT"),
        ("The NVIDIA driver on your system is too old (found version 11040)", "trainer", "NVIDIA driver", "newer driver"),
    ],
)
def test_the_cause_is_found_far_above_the_last_lines(line: str, role: str, told: str, remedy: str):
    cause = likely_cause([*NOISE, line, *AFTER, ENGINE_END], role)
    assert cause is not None
    shown, helps = cause.split("\nWhat helps: ")
    assert shown.startswith(told)
    assert remedy in helps
    assert not shown.startswith("(EngineCore")


@pytest.mark.parametrize(
    "lines",
    [[], [*NOISE, ENGINE_END], ["INFO gpu memory utilization is 0.92", "KeyError: 'x'"]],
    ids=["an empty log", "nothing known", "words alone"],
)
@pytest.mark.parametrize("role", ["inference", "trainer"])
def test_nothing_is_made_up(lines: list[str], role: str):
    assert likely_cause(lines, role) is None


def test_a_failed_start_is_told_before_the_memory_that_ran_out_because_of_it():
    assert "less than desired" in str(likely_cause([OOM, FREE], "inference"))


def test_an_engine_is_not_told_to_change_the_trainer():
    assert "trainer.micro_batch_tokens" not in str(likely_cause([PLAIN], "inference"))


@pytest.mark.parametrize("cause", CAUSES, ids=lambda cause: cause.pattern.pattern[:40])
def test_keys_named_in_remedies_exist(cause: Cause):
    known = set(all_keys())
    for key in re.findall(r"\b(?:gpus|trainer|inference)\.[a-z_.]*[a-z]", cause.remedy):
        assert key in known or key.startswith("inference.vllm."), key


def test_the_messages_are_those_that_vllm_writes():
    """Against the installed vLLM, where there is one beside this environment."""
    found = list((Path(__file__).parents[3] / ".venv-vllm").glob("lib/python3*/site-packages/vllm/v1"))
    if not found:
        pytest.skip("no vLLM to read")
    worker = (found[0] / "worker" / "utils.py").read_text()
    assert "is less than desired GPU memory utilization" in worker
    assert "No available memory for the cache blocks" in (found[0] / "core" / "kv_cache_utils.py").read_text()
    assert "Error in memory profiling" in (found[0] / "worker" / "gpu_worker.py").read_text()
