"""A stand-in for `rl` that writes what the check `overfit` reads, and then waits to be interrupted twice.

    python fake_short_rl.py ENDING @ overfit.toml --plain

ENDING: "goes on" makes five steps; "fails" after one; "has no signal" makes two and a third without signal.
"""

import json
import os
import signal
import sys
import time
import tomllib
from pathlib import Path

INTERRUPTS: list[int] = []
GROUPS = (3, 7)
DROPPED = [("stale", None), ("errored", None), ("signal", "an error of the environment")]  # fate, error


def main() -> int:
    signal.signal(signal.SIGINT, lambda number, _frame: INTERRUPTS.append(number))
    ending, at, file, plain = sys.argv[1:]
    assert (at, plain) == ("@", "--plain")
    assert os.environ["TURNWISE_RUN_ID"]
    root = Path(tomllib.loads(Path(file).read_text())["output_dir"])
    for number in range(1, {"goes on": 5, "fails": 1, "has no signal": 2}[ending] + 1):
        step(root, number)
    if ending == "fails":
        print("Failed at step 1 of 8: planted\nLikely cause: the moon")
        return 1
    if ending == "has no signal":
        reason = {"kind": "failed", "reason": "orchestrator: NoSignal: 0 groups of 20 carried signal"}
        write(root / "control" / "stop.json", json.dumps(reason))
    while len(INTERRUPTS) < 2:
        time.sleep(0.01)
    (root / "interrupted").write_text("twice")
    return 130


def step(root: Path, number: int) -> None:
    """Rewards of `number` and one more in each group; the norm of the first gradient is not finite."""
    rollouts = [
        {"group_id": group, "reward": number + more, "fate": "signal", "error": None, "messages": []}
        for group in GROUPS
        for more in (0.0, 1.0)
    ]
    rollouts += [{"group_id": 9, "reward": 99.0, "fate": fate, "error": error} for fate, error in DROPPED]
    line = {"step": number, "actor/update_norm": 0.5, "actor/grad_norm": None if number == 1 else 2.0}
    with (root / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps(line) + "\n")
    write(root / "trajectories" / f"step_{number}.jsonl", "".join(json.dumps(rollout) + "\n" for rollout in rollouts))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(text)
    draft.rename(path)


if __name__ == "__main__":
    sys.exit(main())
