"""What the rollouts of a MuSiQue run did with the tools, and what paid, in thirds of the run.

    rl @ configs/musique/base.toml @ configs/musique/cpu.toml
    .venv/bin/python benchmarks/musique_run.py outputs/musique-cpu

"Samples a rollout" is 1 where every turn's prompt began with the prompt and the reply before it, token by token: a rollout that
was rendered anew would go on as a second sample.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

COMPONENTS = ("support_found", "citation", "answer_f1", "format", "useless_call")


def trained_on(run: Path) -> dict[int, list[dict[str, Any]]]:
    """Rollouts of the batches, by step."""
    found: dict[int, list[dict[str, Any]]] = {}
    for path in (run / "trajectories").glob("step_*.jsonl"):
        rollouts = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found[int(path.stem.removeprefix("step_"))] = [rollout for rollout in rollouts if rollout["in_batch"]]
    return dict(sorted(found.items()))


def with_error(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f} ± {stdev(values) / len(values) ** 0.5:.3f}"


def described(rollouts: Sequence[dict[str, Any]]) -> dict[str, str]:
    """One column of the table. Errors are over rollouts, as if those of a group were independent."""
    calls = [rollout["metrics"]["calls"] for rollout in rollouts]
    ran = [rollout["metrics"]["calls"] - rollout["metrics"]["invalid_calls"] for rollout in rollouts]
    rows = {
        "rollouts": str(len(rollouts)),
        "that call a tool": f"{fmean(count > 0 for count in calls):.2f}",
        "with a call that could be run": f"{fmean(count > 0 for count in ran):.2f}",
        "calls a rollout": with_error(calls),
        "of which could not be run": f"{1 - sum(ran) / max(1, sum(calls)):.2f}",
        "answered": with_error([rollout["metrics"]["answered"] for rollout in rollouts]),
        "**reward**": with_error([rollout["reward"] for rollout in rollouts]),
    }
    rows |= {f"`{name}`": with_error([rollout["components"].get(name, 0.0) for rollout in rollouts]) for name in COMPONENTS}
    return rows | {"samples a rollout": f"{fmean(len(rollout['samples']) for rollout in rollouts):.2f}"}


def table(steps: dict[int, list[dict[str, Any]]], parts: int = 3) -> str:
    numbers = list(steps)
    parts = min(parts, len(numbers))
    cuts = [round(part * len(numbers) / parts) for part in range(parts + 1)]
    blocks = [numbers[begin:end] for begin, end in pairwise(cuts)]
    columns = [described([rollout for step in block for rollout in steps[step]]) for block in blocks]
    lines = [["", *(f"steps {block[0]}-{block[-1]}" for block in blocks)], ["---", *("---:" for _ in blocks)]]
    lines += [[name, *(column[name] for column in columns)] for name in columns[0]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run of musique")
    print(table(trained_on(parser.parse_args().run)))


if __name__ == "__main__":
    main()
