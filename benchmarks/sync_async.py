"""Time per step of the same run, synchronous and asynchronous: `rl` with `max_staleness` 0, 1 and 2, one after the other.

    python benchmarks/sync_async.py @ configs/wordle/two_gpus.toml --steps 30 --json sync_async.json
    python benchmarks/sync_async.py @ configs/quickstart.toml @ configs/cpu.toml --steps 8 --set --orchestrator.batch-size 16

Everything but `max_staleness` is the same: model, tasks, rollouts a batch, steps. The first `--skip` steps are left out (start-
up, compilation), and the last as many as batches may be ahead, where engines have nothing left to do. Seconds are medians over
steps of what `metrics.jsonl` says, shares are means; time per step is also taken from the clock of the first and the last line,
which no process can flatter.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

from turnwise.monitor import read_metrics

METRICS = {
    "step_s": "timing/step_s",
    "train_s": "timing/train_s",
    "batch_s": "timing/batch_s",
    "rollout_s": "timing/rollout_s",
    "trainer_idle": "perf/trainer_idle/share",
    "engine_idle": "perf/engine_idle/share",
    "held_by_staleness": "perf/held_by_staleness/share",
    "tokens_per_s": "throughput/tokens_per_s",
    "staleness": "staleness/mean",
    "mismatch_kl": "mismatch/kl/mean",
    "reward": "critic/reward/mean",
}


def main() -> int:
    arguments = parse()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for staleness in arguments.staleness:
            folder = (arguments.keep or Path(scratch)) / f"staleness_{staleness}"
            run(arguments, staleness, folder)
            results.append(row(folder / "metrics.jsonl", staleness, arguments.skip))
            print(table(results), flush=True)
    if arguments.json:
        command = {"files": arguments.files, "steps": arguments.steps, "skip": arguments.skip, "set": arguments.set}
        arguments.json.write_text(json.dumps({**command, "results": results}, indent=1))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="@ FILE", help="configurations, as `rl` takes them")
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--skip", type=int, default=5, help="steps at the start that are not counted")
    parser.add_argument("--time-limit", type=float, default=900.0, help="seconds for each run")
    parser.add_argument("--keep", type=Path, help="folder for the runs; removed at the end when not given")
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--set", nargs=argparse.REMAINDER, default=[], help="all that follows goes to `rl`")
    arguments = parser.parse_args()
    if arguments.steps <= arguments.skip + max(arguments.staleness) + 2:
        parser.error(f"--steps {arguments.steps} leaves too few after --skip {arguments.skip} and the last ones; use more steps")
    return arguments


def run(arguments: argparse.Namespace, staleness: int, folder: Path) -> None:
    """One `rl`, without the evaluation at the start."""
    argv = [sys.executable, "-m", "turnwise.cli.rl", *arguments.files, "--output-dir", str(folder), "--clean"]
    argv += ["--max-steps", str(arguments.steps), "--orchestrator.max-staleness", str(staleness)]
    argv += ["--orchestrator.eval.at-start", "false", "--orchestrator.eval.num-examples", "1"]
    argv += ["--inference.embedded.deterministic", "false", *arguments.set]  # else slower without staleness, and only there
    log = folder.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        try:
            code = process.wait(arguments.time_limit)
        except BaseException:
            process.send_signal(signal.SIGINT)  # `rl` ends what it has started
            time.sleep(1.0)
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
    if code:
        print("\n".join(log.read_text(errors="replace").splitlines()[-40:]), file=sys.stderr)
        raise SystemExit(f"rl ended with {code} at max_staleness = {staleness}")


def row(path: Path, staleness: int, skip: int) -> dict[str, Any]:
    """What the steps that count were like, and the time per step by the clock."""
    steps: dict[int, dict[str, float]] = {}
    for line in read_metrics(path):
        if "timing/step_s" in line:
            steps[line["step"]] = line
    numbers = sorted(steps)[skip : len(steps) - staleness - 1]
    counted = [steps[number] for number in numbers]
    found: dict[str, Any] = {"max_staleness": staleness, "steps": len(counted)}
    for key, name in METRICS.items():
        values = [line[name] for line in counted if line.get(name) is not None]
        if values:
            found[key] = fmean(values) if name.endswith("/share") else median(values)
    before = steps[numbers[0] - 1]["time"] if numbers[0] - 1 in steps else None
    if before is not None:
        found["clock_s"] = (counted[-1]["time"] - before) / len(counted)
    return found


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| max_staleness | s a step | by the clock | faster | training s | trainer idle | engines idle | tokens/s | staleness |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    first = results[0].get("clock_s") or results[0]["step_s"]
    for one in results:
        clock = one.get("clock_s") or one["step_s"]
        shares = [f"{one[key]:.0%}" if key in one else "?" for key in ("trainer_idle", "engine_idle")]
        lines.append(
            f"| {one['max_staleness']} | {one['step_s']:.3f} | {clock:.3f} | {first / clock:.2f} x | {one['train_s']:.3f} "
            f"| {shares[0]} | {shares[1]} | {one['tokens_per_s']:,.0f} | {one['staleness']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
