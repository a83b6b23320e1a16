"""Why a process ended, read from its log: the known ways in which GPUs and their memory fail, each with the key that helps.

What ends an engine stands far above its last lines, which only say that something went wrong further up.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

SHOWN = 240  # characters of the line that tells


@dataclass(frozen=True)
class Cause:
    """A way to fail."""

    pattern: re.Pattern[str]
    role: str | None  # of the process; None: any
    remedy: str


def _cause(pattern: str, remedy: str, role: str | None = None) -> Cause:
    return Cause(re.compile(pattern), role, remedy)


OUT_OF_MEMORY = r"CUDA out of memory|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED"

# the first that matches is told: what is said about one moment comes before running out of memory in general
CAUSES = (
    _cause(
        r"Free memory on device .* is less than desired GPU memory utilization",
        "other processes hold memory of that GPU (nvidia-smi lists them; a run that ended a moment ago may still be among them): "
        "end them, take another GPU in gpus.inference, or lower gpus.inference_memory.",
        "inference",
    ),
    _cause(
        r"Error in memory profiling\.",
        "another process gave back memory of that GPU while the engine measured it: start again, or take a GPU of your own.",
        "inference",
    ),
    _cause(
        r"No available memory for the cache blocks|larger than the available KV cache memory",
        "the engine's part of the GPU holds the model but not its cache: raise gpus.inference_memory, lower seq_len, "
        "or spread the engine over more GPUs with inference.tp.",
        "inference",
    ),
    _cause(
        OUT_OF_MEMORY,
        "while the model loads: the GPU is too small for it, or its part on a shared one is; spread it with inference.tp. Later: "
        "leave more memory free for what is not cache, by a lower gpus.inference_memory or inference.vllm.max_num_seqs.",
        "inference",
    ),
    _cause(
        r"CUDA out of memory.* allowed;",
        "the trainer came to the end of its part of a GPU that it shares: lower gpus.inference_memory, lower "
        "trainer.micro_batch_tokens (not below seq_len), or set trainer.model.gradient_checkpointing = true.",
        "trainer",
    ),
    _cause(
        OUT_OF_MEMORY,
        "lower trainer.micro_batch_tokens (not below seq_len), set trainer.model.gradient_checkpointing = true, "
        "or use more GPUs in gpus.trainer.",
        "trainer",
    ),
    _cause(
        r"exitcode\s*: -9",
        "something killed it, most likely the kernel for want of RAM (`dmesg` tells): lower trainer.micro_batch_tokens, "
        "use fewer trainer.processes, or a machine with more memory.",
        "trainer",
    ),
    _cause(
        r"Duplicate GPU detected",
        "NCCL does not join two processes on one GPU: send weights as files, or give engine and trainer GPUs of their own.",
    ),
    _cause(
        r"Torch not compiled with CUDA enabled|no kernel image is available for execution",
        "install a torch that is built for CUDA and for this GPU.",
    ),
    _cause(
        r"driver version is insufficient|NVIDIA driver on your system is too old",
        "install a torch built for the CUDA version that nvidia-smi names in its top line, or a newer driver.",
    ),
    _cause(
        r"busy or unavailable",
        "the GPU may be in exclusive mode, which admits one process: `nvidia-smi -q -d COMPUTE` tells, "
        "`nvidia-smi -c DEFAULT` ends it.",
    ),
    _cause(
        r"No CUDA GPUs are available|no CUDA-capable device is detected",
        "the driver shows this process no GPU: compare CUDA_VISIBLE_DEVICES in the plan (rl --dry-run) with `nvidia-smi -L`.",
    ),
)


def likely_cause(lines: Iterable[str], role: str) -> str | None:
    """The line of a log that tells why a process of this role ended, and what helps; None where none is known."""
    text = list(lines)
    for cause in CAUSES:
        if cause.role not in (None, role):
            continue
        for line in text:
            if found := cause.pattern.search(line):
                return f"{_around(line, found)}\nWhat helps: {cause.remedy}"
    return None


def _around(line: str, found: re.Match[str]) -> str:
    """The telling part of a line, from its exception's name or from the match on."""
    start = line.rfind("Error: ", 0, found.start())
    begin = found.start() if start < 0 else line.rfind(" ", 0, start) + 1
    return line[begin:].strip()[:SHOWN]
