"""What `engine_client.py` prints and writes."""

import json
from pathlib import Path
from typing import Any

from turnwise.transport.files import write_atomic

GOAL = 0.95  # of the offline rate
Row = dict[str, Any]


def compare(served: Row, alone: Row, *, weights: str, lora: bool) -> Row:
    """A row of the results."""
    share = served["tokens_per_s"] / alone["tokens_per_s"]
    return {
        "weights": weights,
        "lora": lora,
        "concurrency": served["concurrency"],
        "share": share,
        "client": served,
        "offline": alone,
    }


def beside_bfloat16(rows: list[Row]) -> list[Row]:
    """Tokens a second through the client as a multiple of bfloat16's, for each row of other weights whose like was measured."""
    plain = {(row["lora"], row["concurrency"]): row for row in rows if row["weights"] == "bfloat16"}
    found: list[Row] = []
    for row in rows:
        like = plain.get((row["lora"], row["concurrency"]))
        if row["weights"] == "bfloat16" or like is None:
            continue
        ratio = row["client"]["tokens_per_s"] / like["client"]["tokens_per_s"]
        found.append({"weights": row["weights"], "lora": row["lora"], "concurrency": row["concurrency"], "ratio": ratio})
    return found


def table(rows: list[Row]) -> str:
    """All rows in Markdown; `beside bfloat16` is of the rates through the client."""
    columns = ["weights", "LoRA", "requests at a time", "offline tokens/s", "through the client", "share", "beside bfloat16"]
    lines = [f"| {' | '.join([*columns, 'server ms', 'server CPU'])} |", "|---|---|---:|---:|---:|---:|---:|---:|---:|"]
    ratios = {(found["weights"], found["lora"], found["concurrency"]): found["ratio"] for found in beside_bfloat16(rows)}
    for row in rows:
        client, alone = row["client"], row["offline"]
        ratio = ratios.get((row["weights"], row["lora"], row["concurrency"]))
        lines.append(
            f"| {row['weights']} | {'on' if row['lora'] else 'off'} | {row['concurrency']} | {alone['tokens_per_s']:,.0f} "
            f"| {client['tokens_per_s']:,.0f} | {row['share']:.1%} | {'' if ratio is None else f'{ratio:.2f} x'} "
            f"| {client['server_cpu_ms_per_request']:.2f} | {client['server_cpu_share']:.0%} |"
        )
    return "\n".join(lines)


def verdict(rows: list[Row]) -> str:
    """The goal, and whether it was met."""
    worst = min(row["share"] for row in rows)
    return f"worst: {worst:.1%} of the offline rate, goal {GOAL:.0%}: {'met' if worst >= GOAL else 'missed'}"


def write(path: Path, rows: list[Row], settings: dict[str, Any], about: dict[str, Any]) -> None:
    """Everything so far as JSON."""
    report = {
        "goal": GOAL,
        "worst": min(row["share"] for row in rows),
        "settings": {key: str(value) for key, value in settings.items()},
        **about,
        "results": rows,
        "beside_bfloat16": beside_bfloat16(rows),
    }
    write_atomic(path, json.dumps(report, indent=1).encode())
