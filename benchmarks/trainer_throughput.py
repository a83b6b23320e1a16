"""Tokens a second, MFU and memory of the trainer on a model's shape with random weights, on one or more GPUs.

    python benchmarks/trainer_throughput.py --shape qwen3-4b --gpus 1 2 4 --packs 1x16384 8x2048 [--json FILE]

Every step is the trainer's own (`Learner.step`): packing, forward and backward pass, gradient norm, clipping and AdamW on LoRA
adapters; every token but the first of a sample counts in the loss. One process a GPU, FSDP2 over all. Each rank gets
`--micro-batches` packs a step; a table row is the median step after `--warm-up` ones, over all ranks. Model FLOP utilisation:

    MFU = (4 N_frozen + 6 N_trained) tokens + 3 * 4 * layers * heads * head_dim * sum(L^2 / 2)  over  seconds * GPUs * 989e12

with N without the embedding's look-up, L the real segments, and no recomputation counted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from _shapes import SHAPES, write_model_folder

SIDE = Path(__file__).with_name("_trainer_side.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-4b")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1], help="numbers of GPUs; 0 runs one process on the CPU")
    parser.add_argument("--packs", nargs="+", default=["1x16384", "8x2048"], help="samples x tokens of one micro-batch")
    parser.add_argument("--micro-batches", type=int, default=2, help="packs of each rank in a step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank, on all linear layers")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings, such as trainer.model.compile=true"
    )
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds for each number of GPUs")
    parser.add_argument("--json", type=Path, help="write the results there too")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        model = write_model_folder(Path(scratch) / arguments.shape, arguments.shape)
        for gpus in arguments.gpus:
            rows += run(arguments, model, gpus, Path(scratch) / f"rows{gpus}.json")
    print_table(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2))


def run(arguments: argparse.Namespace, model: Path, gpus: int, output: Path) -> list[dict[str, Any]]:
    """All packs on so many GPUs, in one torchrun; what was measured before a failure is kept."""
    work = {
        "model": str(model),
        "gpus": gpus,
        "packs": [[int(n) for n in pack.split("x")] for pack in arguments.packs],
        "micro_batches": arguments.micro_batches,
        "steps": arguments.steps,
        "warm_up": arguments.warm_up,
        "rank": arguments.rank,
        "settings": arguments.set,
        "output": str(output),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(max(1, gpus)), "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", str(SIDE), json.dumps(work)]
    began = time.monotonic()
    offered = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
    process = subprocess.Popen(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(offered[:gpus])})
    try:
        code = process.wait(arguments.time_limit)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
        code = -1
    if code:
        print(f"{gpus} GPUs: ended with {code} after {time.monotonic() - began:.0f} s", file=sys.stderr)
    rows: list[dict[str, Any]] = json.loads(output.read_text()) if output.exists() else []
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("GPUs", "pack", "tokens/s", "a GPU", "of one", "MFU", "step s (min-max)", "peak GiB")
    alone = {row["pack"]: row["tokens_per_s"] for row in rows if row["gpus"] <= 1}
    for row in rows:
        each = row["tokens_per_s"] / max(1, row["gpus"])
        share = f"{each / alone[row['pack']]:.0%}" if row["pack"] in alone else "-"
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        seconds = f"{statistics.median(row['seconds']):.3f} ({min(row['seconds']):.3f}-{max(row['seconds']):.3f})"
        memory = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        table.add_row(str(row["gpus"]), row["pack"], f"{row['tokens_per_s']:,.0f}", f"{each:,.0f}", share, mfu, seconds, memory)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
