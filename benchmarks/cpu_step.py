"""One GRPO step on a CPU: TRL's and turnwise's, of the same work, measured in turn.

The work: a Llama of SmolLM2-135M's shape with random weights in float32, LoRA of rank 16 on all linear layers, 8 completions
of 64 new tokens over one prompt of 64 tokens, a reward that differs between them, one update. TRL runs in an environment of
its own, which is made when it is not there. turnwise runs the processes of a real run, its engine and its trainer; a step ends
when the engine serves the new weights, and that was proven. Both have the same number of threads, each with the OpenMP settings
that it comes with, and wait without using the processor while it is the other's turn.

    python benchmarks/cpu_step.py --repeats 3 --json cpu_step.json --max-ratio 0.5

TRL's threads spin while they wait, which is fastest on quiet cores and ten times slower on busy ones. Where other processes are
at work, `--trl-waits PASSIVE` is the fair comparison; a line under the table says so.
"""

import argparse
import asyncio
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from _cpu_step_work import COMPLETIONS, NEW_TOKENS, PROMPT_TOKENS, RANK
from _turnwise_side import TurnwiseSide

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE.parent / ".venv-trl"
TRL = ("trl==1.16.*", "peft", "datasets", "transformers")
SHOWN_VERSIONS = ("torch", "transformers", "peft", "trl")
ASK_VERSIONS = (
    "import json, sys; from importlib.metadata import version; print(json.dumps({n: version(n) for n in sys.argv[1:]}))"
)
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
QUIET = 0.25  # cores kept busy by others, up to which wall times count
Row = dict[str, Any]


def ensure_environment(folder: Path) -> dict[str, str]:
    """Make TRL's environment where it is missing; returns the versions in it.

    Raises:
        SystemExit: it has another build of torch than this one, so that the two sides would not compare.
    """
    python, torch = folder / "bin" / "python", f"torch=={version('torch').partition('+')[0]}"
    if not (folder / ".ready").exists():
        print(f"making {folder} with {torch} and {', '.join(TRL)} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", torch], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", torch, *TRL], check=True)
        (folder / ".ready").touch()
    asked = subprocess.run([python, "-c", ASK_VERSIONS, *SHOWN_VERSIONS], check=True, capture_output=True, text=True)
    found: dict[str, str] = json.loads(asked.stdout)
    if found["torch"] != version("torch"):
        raise SystemExit(f"{folder} has torch {found['torch']}, this environment {version('torch')}; remove it, to be made anew")
    return found


class TrlSide:
    """TRL's process: it takes a step when told to."""

    def __init__(self, python: Path, model: Path, output: Path, *, steps: int, threads: int, environment: dict[str, str]) -> None:
        output.mkdir(parents=True)
        self.log = output / "trl.stdout"
        read, write = os.pipe()
        command = [python, HERE / "_trl_side.py", str(write), model, output, str(steps), str(threads)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[write], env=environment, text=True
            )
        os.close(write)
        self.reports = os.fdopen(read)
        self._report()

    @property
    def pids(self) -> list[int]:
        return [self.process.pid]

    async def step(self) -> dict[str, float]:
        """One step; its parts in seconds. From one `on_step_begin` to the next: all that the training loop does is inside."""
        began = time.perf_counter()
        assert self.process.stdin is not None
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        report = self._report()
        return {**report, "train_s": time.perf_counter() - began - report["generate_s"]}

    def close(self) -> None:
        self.process.terminate()
        self.process.communicate()
        self.reports.close()

    def _report(self) -> dict[str, float]:
        line = self.reports.readline()
        if not line:
            raise RuntimeError(f"TRL ended with {self.process.wait()}:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)


def family(pids: Sequence[int]) -> list[psutil.Process]:
    parents = [psutil.Process(pid) for pid in pids]
    return [*parents, *(child for parent in parents for child in parent.children(recursive=True))]


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(entry.user + entry.system for entry in times)


def peak_bytes(processes: Sequence[psutil.Process]) -> int:
    """Sum of the largest resident sizes that the processes ever had; pages that they share count in each."""
    statuses = [Path(f"/proc/{process.pid}/status").read_text() for process in processes]
    return sum(int(line.split()[1]) * 1024 for status in statuses for line in status.splitlines() if line.startswith("VmHWM:"))


def busy_seconds() -> float:
    """Of all cores together, since the start of the machine."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


async def measure(name: str, side: TrlSide | TurnwiseSide) -> Row:
    """One step of one side, with the processor time of its processes, this one's too, and of everybody else."""
    processes = [*family(side.pids), psutil.Process()]
    cpu, busy, began = cpu_seconds(processes), busy_seconds(), time.perf_counter()
    parts = await side.step()
    wall = time.perf_counter() - began
    cpu, busy = cpu_seconds(processes) - cpu, busy_seconds() - busy
    if parts["new_tokens"] != COMPLETIONS * NEW_TOKENS:
        raise RuntimeError(f"{name} sampled {parts['new_tokens']:.0f} tokens, not {COMPLETIONS * NEW_TOKENS}")
    others = max(0.0, busy - cpu) / wall
    row: Row = {"side": name, "wall_s": wall, "cpu_s": cpu, **parts, "peak_rss_bytes": peak_bytes(processes)}
    print(f"{name:>9}: {wall:6.1f} s, {cpu:6.1f} s of CPU, others kept {others:.1f} cores busy", flush=True)
    return {**row, "other_cores_busy": others, "load_1min": os.getloadavg()[0]}


async def alternate(trl: TrlSide, turnwise: TurnwiseSide, repeats: int) -> list[Row]:
    """A warm-up step of each, which is not counted, then `repeats` of each in turn."""
    rows: list[Row] = []
    for repeat in range(repeats + 1):
        for name, side in (("TRL", trl), ("turnwise", turnwise)):
            rows.append({**await measure(name, side), "repeat": repeat})
    return [row for row in rows if row["repeat"] > 0]


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Medians of each side, and turnwise's part of TRL's time: over the medians, and of each pair of neighbouring steps."""
    keys = [key for key, value in rows[0].items() if isinstance(value, float | int) and key != "repeat"]
    sides = {name: [row for row in rows if row["side"] == name] for name in ("TRL", "turnwise")}
    medians = {name: {key: median(row[key] for row in own) for key in keys} for name, own in sides.items()}
    extra = ("publish_s", "swap_s", "logprob_difference")
    medians["turnwise"] |= {key: median(row[key] for row in sides["turnwise"]) for key in extra}
    ratios = {key: medians["turnwise"][key] / medians["TRL"][key] for key in ("wall_s", "cpu_s", "generate_s", "train_s")}
    pairs = [ours["wall_s"] / theirs["wall_s"] for theirs, ours in zip(sides["TRL"], sides["turnwise"], strict=True)]
    return {"medians": medians, "ratios": ratios, "wall_ratio_of_pairs": pairs}


def table(summary: dict[str, Any]) -> str:
    theirs, ours, ratios = summary["medians"]["TRL"], summary["medians"]["turnwise"], summary["ratios"]
    lines = ["| median of a step | TRL | turnwise | ratio |", "|---|---|---|---|"]
    for label, key in (("wall", "wall_s"), ("CPU", "cpu_s"), ("generating", "generate_s"), ("training", "train_s")):
        lines.append(f"| {label}, s | {theirs[key]:.2f} | {ours[key]:.2f} | {ratios[key]:.3f} |")
    lines.append(f"| publishing and waiting for it, s | - | {ours['publish_s']:.2f} | |")
    lines.append(f"| loading and proving in the engine, s | - | {ours['swap_s']:.2f} | |")
    lines.append(f"| peak RSS, GB | {theirs['peak_rss_bytes'] / 1e9:.2f} | {ours['peak_rss_bytes'] / 1e9:.2f} | |")
    lines.append(f"| other processes, cores busy | {theirs['other_cores_busy']:.1f} | {ours['other_cores_busy']:.1f} | |")
    return "\n".join(lines)


def hardware(threads: int) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "cpu": name,
        "cores": CORES,
        "threads": threads,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
    }


async def run(folder: Path, arguments: argparse.Namespace) -> list[Row]:
    steps, threads = arguments.repeats + 1, arguments.threads
    settings = {
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | settings
    theirs = {} if arguments.trl_waits == "default" else {"OMP_WAIT_POLICY": arguments.trl_waits}
    model = folder / "model"
    python = arguments.environment / "bin" / "python"
    trl = TrlSide(python, model, folder / "trl", steps=steps, threads=threads, environment={**environment, **theirs})
    try:
        async with TurnwiseSide(model, folder / "turnwise", steps=steps, threads=threads, environment=environment) as turnwise:
            return await alternate(trl, turnwise, arguments.repeats)
    finally:
        trl.close()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="measured steps of each side, after one that warms up")
    parser.add_argument("--threads", type=int, default=CORES, help="CPU threads of each process; all cores by default")
    parser.add_argument(
        "--trl-waits",
        choices=["default", "PASSIVE", "ACTIVE"],
        default="default",
        help="OMP_WAIT_POLICY of TRL; turnwise sets its own",
    )
    parser.add_argument("--max-ratio", type=float, help="exit with 1 where turnwise takes a larger part of TRL's wall time")
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, help="TRL's environment, made when it is not there")
    parser.add_argument("--folder", type=Path, help="keep model, logs and run there; a temporary folder when unset")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    return arguments


def main() -> int:
    arguments = parse()
    versions = {"trl_environment": ensure_environment(arguments.environment.absolute())}
    versions["turnwise_environment"] = {name: version(name) for name in ("torch", "transformers", "turnwise")}
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="cpu_step_"))
    try:
        subprocess.run([sys.executable, HERE / "_cpu_step_work.py", folder / "model"], check=True, capture_output=True)
        rows = asyncio.run(run(folder.absolute(), arguments))
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    summary, ratio_limit = summarise(rows), arguments.max_ratio
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(arguments.threads),
        "versions": versions,
    }
    work = {"completions": COMPLETIONS, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "lora_rank": RANK}
    work |= {"dtype": "float32", "trl_waits": arguments.trl_waits}
    ratio = summary["ratios"]["wall_s"]
    pairs = ", ".join(f"{pair:.3f}" for pair in summary["wall_ratio_of_pairs"])
    print(f"\n{json.dumps(about)}\n\n{table(summary)}\n\nturnwise takes {ratio:.3f} of TRL's time; pair by pair: {pairs}")
    if median(row["other_cores_busy"] for row in rows) > QUIET and arguments.trl_waits == "default":
        print("other processes were at work, which spinning threads do not stand: wait for quiet, or give --trl-waits PASSIVE")
    if arguments.json:
        arguments.json.write_text(json.dumps({**about, "work": work, **summary, "steps": rows}, indent=1) + "\n")
    if ratio_limit is not None and ratio > ratio_limit:
        print(f"that is more than {ratio_limit:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
