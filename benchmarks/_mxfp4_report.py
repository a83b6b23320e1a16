"""What a run of benchmarks/mxfp4.py measured: rows, tables, and the lines that hold it against the goals for an H200."""

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

FEW_TOKENS, FEW_GOAL = 16, (8192, 8192, 2.2)
TRAINING_GOALS = {4096: 0.90, 8192: 0.93}
DEQUANTISE_GOAL = 0.90
LORA_GOALS = {"forward": 0.08, "forward + backward": 0.15}
AS_MANY = "copy of as many bytes"  # it starts and ends as slowly; `Results.bandwidth` is that of a copy of 1 GiB
ADAPTED = {"alone": 1, "shared by 3": 3}  # layers that read x together


@dataclass
class Results:
    """Rows of one run; `find` looks a time up."""

    shapes: list[tuple[int, int]]
    tokens: list[int]
    bandwidth: float = 0.0  # of a copy, bytes read and written a second
    rows: list[dict[str, Any]] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    left_out: int = 0

    def find(self, part: str, name: str, n: int, k: int, m: int) -> float | None:
        """Microseconds, None where it was not measured."""
        wanted = {"part": part, "name": name, "n": n, "k": k, "m": m}
        return next((row["microseconds"] for row in self.rows if wanted.items() <= row.items()), None)


def print_tables(results: Results) -> None:
    console = Console(width=160)
    for part in dict.fromkeys(row["part"] for row in results.rows):
        rows = [row for row in results.rows if row["part"] == part]
        names = list(dict.fromkeys(row["name"] for row in rows))
        table = Table("N x K", "M", *(f"{name}, us" for name in names), title=part)
        for n, k, m in dict.fromkeys((row["n"], row["k"], row["m"]) for row in rows):
            times = [results.find(part, name, n, k, m) for name in names]
            cells = [_cell(time, times[0] if i else None) for i, time in enumerate(times)]
            table.add_row(f"{n}x{k}", str(m) if m else "-", *cells)
        console.print(table)


def _cell(microseconds: float | None, base: float | None) -> str:
    if microseconds is None:
        return "-"
    return f"{microseconds:,.1f}" + (f" ({base / microseconds:.2f}x)" if base else "")


def lines(results: Results, uncaptured: set[str]) -> list[str]:
    """Results beside goals, and what was not measured and why."""
    found = [f"copy: {results.bandwidth / 1e12:.2f} TB/s"]
    for row in results.rows:
        if "of_copy" in row:
            what = f"dequantise {row['n']}x{row['k']}, {row['name']}"
            found.append(f"{what}: {row['of_copy']:.1%} of copy bandwidth (goal {DEQUANTISE_GOAL:.0%})")
            found.append(f"{what}: {row['of_copy_of_as_many']:.1%} of the speed of a {AS_MANY}")
    for n, k in results.shapes:
        found += _speeds(results, n, k) + _lora(results, n, k)
    found += [f"not measured: {name}: {why}" for name, why in results.problems.items()]
    if results.left_out:
        found.append(f"{results.left_out} measurements left out: the time limit was met")
    if uncaptured:
        found.append(f"timed without a CUDA graph, launches included: {', '.join(sorted(uncaptured))}")
    return found


def _speeds(results: Results, n: int, k: int) -> list[str]:
    goals = {("forward", m): FEW_GOAL[2] for m in results.tokens if m <= FEW_TOKENS and (n, k) == FEW_GOAL[:2]}
    goals |= {(part, m): goal for m, goal in TRAINING_GOALS.items() for part in ("forward", "dX")}
    found: list[str] = []
    for (part, m), goal in goals.items():
        base, ours = results.find(part, "bf16", n, k, m), results.find(part, "mxfp4", n, k, m)
        if base and ours:
            found.append(f"{part} {n}x{k}, M = {m}: {base / ours:.2f} times the speed of bf16 (goal {goal})")
    return found


def _lora(results: Results, n: int, k: int) -> list[str]:
    found: list[str] = []
    for m in results.tokens:
        for suffix, goal in LORA_GOALS.items():
            base = results.find("LoRA r32", f"none, {suffix}", n, k, m)
            for kind, layers in ADAPTED.items():
                ours = results.find("LoRA r32", f"{kind}, {suffix}", n, k, m)
                if base and ours:
                    line = f"LoRA {kind} {n}x{k}, M = {m}, {suffix}: {ours / base - 1:+.1%} (goal {goal:+.0%})"
                    extra = 2 * m * (k / layers + 2 * n) / results.bandwidth * 1e6 / base
                    found.append(line + (f", its bytes at the speed of a copy {extra:+.1%}" if suffix == "forward" else ""))
    return found
