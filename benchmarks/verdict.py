"""How often the verdict on a run is wrong, and how soon it is right: simulated runs, judged as real ones are.

    python benchmarks/verdict.py --json verdict.json        # about ten minutes on one core; --runs 100 is quick and rough

The reward of a step is a level and AR(1) noise, in units of the noise's standard deviation; single rewards scatter three times as
much, as means over 32 rollouts of 8 tasks do about. Flat runs show false alarms, "ever" at any step and "at the end"; rising ones
show how many have been found by a step. Printed as the tables of docs/metrics.md.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from turnwise.monitor.learning import LearningWatch, State

Rewards = npt.NDArray[np.float64]
SPREAD = 3.0  # of single rewards, in the noise of a step's mean
MOST_LOOKS = 60  # at which a run of any length is judged: the later ones are further apart
RISES = (1.0, 2.0, 4.0, 8.0)  # over the whole run
LENGTHS = (24, 60, 200, 1000)  # steps
Row = dict[str, str | float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000, help="simulated runs of each kind")
    parser.add_argument("--json", type=Path, help="write the shares there")
    arguments = parser.parse_args()
    rng = np.random.default_rng(20261)
    found = {"false alarms": false_alarms(rng, arguments.runs), "found": detection(rng, max(1, arguments.runs // 5))}
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


def false_alarms(rng: np.random.Generator, runs: int) -> list[Row]:
    """Of flat runs."""
    print("| flat runs, noise | steps | learning at the end | collapsing at the end | learning ever | collapsing ever |")
    print("|---|---:|---:|---:|---:|---:|")
    rows: list[Row] = []
    for name, noise in NOISES.items():
        for steps in LENGTHS:
            seen = [states(noise(rng, steps)) for _ in range(runs)]
            row: Row = {"noise": name, "steps": steps}
            for state in (State.LEARNING, State.COLLAPSING):
                row[f"{state} at the end"] = sum(run[-1] is state for run in seen) / runs
                row[f"{state} ever"] = sum(state in run for run in seen) / runs
            rows.append(row)
            shares = [row[f"{state} {when}"] for when in ("at the end", "ever") for state in ("learning", "collapsing")]
            print(f"| {name} | {steps} | " + " | ".join(f"{share:.1%}" for share in shares) + " |", flush=True)
    return rows


def detection(rng: np.random.Generator, runs: int) -> list[Row]:
    """Of runs that learn, or collapse, with noise of φ = 0.3."""
    print("\n| verdict at the end is right | steps | " + " | ".join(f"by {rise:g}" for rise in RISES) + " |")
    print("|---|---:|" + "---:|" * len(RISES))
    rows: list[Row] = []
    for shape, level in SHAPES.items():
        wanted = State.COLLAPSING if "falls" in shape else State.LEARNING
        for steps in LENGTHS:
            row: Row = {"shape": shape, "steps": steps}
            for rise in RISES:
                curve = rise * level(np.arange(steps) / steps)
                ends = [verdict(curve + ar1(rng, steps, 0.3)) for _ in range(runs)]
                row[f"{rise:g}"] = ends.count(wanted) / runs
            rows.append(row)
            print(f"| {shape} | {steps} | " + " | ".join(f"{row[f'{rise:g}']:.0%}" for rise in RISES) + " |", flush=True)
    return rows


def ar1(rng: np.random.Generator, steps: int, memory: float) -> Rewards:
    """Noise of standard deviation 1 whose neighbours correlate by `memory`."""
    shocks = rng.standard_normal(steps) * np.sqrt(1 - memory**2)
    shocks[0] /= np.sqrt(1 - memory**2)
    for step in range(1, steps):
        shocks[step] += memory * shocks[step - 1]
    return shocks


def rare(rng: np.random.Generator, steps: int) -> Rewards:
    """Means over 32 rollouts of which one in a hundred is rewarded."""
    return rng.binomial(32, 0.01, steps) / 32 / np.sqrt(0.01 * 0.99 / 32)


NOISES: dict[str, Callable[[np.random.Generator, int], Rewards]] = {
    "white": lambda rng, steps: ar1(rng, steps, 0.0),
    "AR(1), φ = 0.3": lambda rng, steps: ar1(rng, steps, 0.3),
    "AR(1), φ = 0.5": lambda rng, steps: ar1(rng, steps, 0.5),
    "AR(1), φ = 0.7": lambda rng, steps: ar1(rng, steps, 0.7),
    "rare rewards": rare,
}
SHAPES: dict[str, Callable[[Rewards], Rewards]] = {
    "rises all the time": lambda x: x,
    "rises in the first sixth": lambda x: np.minimum(1, 6 * x),
    "rises in the last third": lambda x: np.maximum(0, 3 * x - 2),
    "rises, falls back": lambda x: 1 - np.abs(2 * x - 1),
}


def verdict(rewards: Rewards) -> State:
    """On the whole run."""
    return states(rewards, looks=[len(rewards)])[-1]


def states(rewards: Rewards, looks: Sequence[int] | None = None) -> list[State]:
    """Verdicts as the run goes on."""
    watch, seen = LearningWatch(), list[State]()
    wanted = set(look_steps(len(rewards)) if looks is None else looks)
    for step, reward in enumerate(rewards, start=1):
        watch.record(step, {"critic/reward/mean": float(reward), "critic/reward/std": SPREAD})
        if step in wanted:
            seen.append(watch.verdict.state)
    return seen


def look_steps(steps: int) -> Iterator[int]:
    """Every step of a short run; of a long one `MOST_LOOKS`, at even distances of the logarithm."""
    yield from np.unique(np.geomspace(min(14, steps), steps, MOST_LOOKS).round().astype(int)).tolist()


if __name__ == "__main__":
    main()
