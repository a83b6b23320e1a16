"""Speed of packed causal attention on a GPU: torch's varlen flash kernel, cuDNN's dense one, and what the trainer chooses.

    python benchmarks/attention_kernels.py [--packs 1x16384 8x2048] [--json FILE]

bf16, 32 query heads over 8 key heads of 128, as in Qwen3-4B and 8B. Operations: 4 * heads * head_dim * L^2 / 2 for a forward pass
over a segment of L tokens, 3.5 times that with the backward pass, whose kernels compute the scores again.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from turnwise.trainer.attention_kernels import NO_PARENT, plan_kernels, run_kernels

HEADS, KV_HEADS, WIDTH = 32, 8, 128
BACKWARD_TOO = 3.5
KERNELS = {"flash varlen": 1 << 40, "cuDNN": 1, "as the trainer chooses": None}  # tokens from which a segment goes to cuDNN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--packs", nargs="+", default=["1x16384", "2x8192", "4x4096", "8x2048", "32x512"], help="segments x tokens"
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write the results there too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this measures CUDA kernels, and there is no CUDA device")
    rows = [measure(pack, name, long, arguments.repeats) for pack in arguments.packs for name, long in KERNELS.items()]
    table = Table("pack", "kernel", "forward ms", "TFLOP/s", "and backward ms", "TFLOP/s")
    for row in rows:
        numbers = (row[key] for key in ("forward_ms", "forward_tflops", "both_ms", "both_tflops"))
        table.add_row(row["pack"], row["kernel"], *(f"{number:.2f}" if number < 100 else f"{number:.0f}" for number in numbers))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


def measure(pack: str, name: str, long: int | None, repeats: int) -> dict[str, Any]:
    segments, tokens = (int(part) for part in pack.split("x"))
    device = torch.device("cuda")
    kernels = plan_kernels((tokens,) * segments, (NO_PARENT,) * segments, device, long=long)
    query, key, value = (_random(heads, segments * tokens) for heads in (HEADS, KV_HEADS, KV_HEADS))
    upstream = torch.randn(1, segments * tokens, HEADS, WIDTH, device=device, dtype=torch.bfloat16)
    inputs = [x.transpose(1, 2).requires_grad_() for x in (query, key, value)]  # as a projection leaves them

    def forward() -> Tensor:
        return run_kernels(inputs[0], inputs[1], inputs[2], kernels, None)

    one = milliseconds(forward, repeats)
    both = milliseconds(lambda: torch.autograd.grad(forward(), inputs, upstream), repeats)
    operations = 4 * HEADS * WIDTH * segments * tokens**2 / 2
    return {
        "pack": f"{segments} x {tokens:,}",
        "kernel": name,
        "forward_ms": one,
        "forward_tflops": operations / one / 1e9,
        "both_ms": both,
        "both_tflops": BACKWARD_TOO * operations / both / 1e9,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }


def _random(heads: int, tokens: int) -> Tensor:
    return torch.randn(1, tokens, heads, WIDTH, device="cuda", dtype=torch.bfloat16)


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    for _ in range(3):
        work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


if __name__ == "__main__":
    main()
