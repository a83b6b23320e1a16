"""Several seeds of the quickstart: the picture, the table, and whether later guesses follow the marks.

    for s in 0 1 2; do .venv/bin/rl @ configs/quickstart.toml --seed $s --output-dir outputs/quickstart-$s --clean; done
    .venv/bin/python benchmarks/quickstart_seeds.py outputs/quickstart-{0,1,2} --out docs/images

The control for "follows the marks": every guess from the second on is judged by the marks that its game showed, and by the
marks that the same earlier guesses would have got for each other word of the shortlist. A policy that does not look at the marks
fits both equally often.
"""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from turnwise.envs.wordle.parse import read_guess
from turnwise.envs.wordle.rules import feedback, fits
from turnwise.report import plot_seeds, seeds_table

CURVES = [
    "critic/reward/mean",
    "reward/format/mean",
    "reward/valid_word/mean",
    "reward/feedback/mean",
    "reward/win/mean",
    "env/win_rate/mean",
]


def judged_guesses(rollout: dict[str, Any]) -> Iterator[tuple[bool, float]]:
    """For each guess from the second on: whether it fits its own marks, and the share of other answers whose marks it fits."""
    answer = str(rollout["task_id"]).rpartition("/")[2]
    shortlist: list[str] = []
    tried: list[str] = []
    for message in rollout["messages"]:
        if message["role"] == "user" and not shortlist:
            shortlist = re.findall(r"[a-z]{5}(?=[,.])", message["content"].partition("one of:")[2])
        if message["role"] != "assistant":
            continue
        word = read_guess(message["content"], length=5, form="word").word
        if word is None or len(word) != 5:
            continue
        if tried:
            own = fits(word, [(guess, feedback(guess, answer)) for guess in tried])
            others = [other for other in shortlist if other != answer and other not in tried]
            shuffled = [fits(word, [(guess, feedback(guess, other)) for guess in tried]) for other in others]
            if shuffled:
                yield own, fmean(shuffled)
        tried.append(word)


def control(run: Path) -> list[dict[str, float]]:
    """Share of later guesses that fit, by own and by others' marks, at the first and the last evaluation."""
    rows: list[dict[str, float]] = []
    evaluations = sorted((run / "evals").glob("step_*.json"), key=lambda path: int(path.stem.removeprefix("step_")))
    for path in (evaluations[0], evaluations[-1]):
        content = json.loads(path.read_text())
        pairs = [pair for rollout in content["rollouts"] for pair in judged_guesses(rollout)]
        first = [rollout["messages"][2]["content"] for rollout in content["rollouts"] if len(rollout["messages"]) > 2]
        gains = [own - other for own, other in pairs]
        rows.append(
            {
                "step": content["step"],
                "later guesses": len(pairs),
                "fit own marks": fmean(own for own, _ in pairs) if pairs else float("nan"),
                "fit others' marks": fmean(other for _, other in pairs) if pairs else float("nan"),
                "standard errors": fmean(gains) / (stdev(gains) / len(gains) ** 0.5) if len(set(gains)) > 1 else float("nan"),
                "distinct first replies": len(set(first)) / len(first),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    names = list(rows[0])
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    lines += [
        " | ".join(f"{row[name]:.2f}" if isinstance(row[name], float) else str(row[name]) for name in names) for row in rows
    ]
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders, one a seed")
    parser.add_argument("--out", type=Path, required=True, help="folder for quickstart.png and quickstart.json")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    plot_seeds(arguments.runs, CURVES, arguments.out / "quickstart.png")
    rows = [{"run": run.name, **row} for run in arguments.runs for row in control(run)]
    (arguments.out / "quickstart.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(seeds_table(arguments.runs), end="\n\n")
    print(table(rows))


if __name__ == "__main__":
    main()
