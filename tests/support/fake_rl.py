"""A stand-in for `rl` without processes, models or torch: reads the same command line and leaves the same kind of run folder.

    python fake_rl.py SCRIPT @ run.toml [--resume | --clean] ...

SCRIPT is a JSON file: run name -> what its starts do, one after the other; the last one stands for all that follow.
    {"do": "finish"}                    all steps, the final evaluation, exit code 0
    {"do": "skip the evaluation"}       all steps, exit code 0
    {"do": "die", "at": 2, "code": 1}   after that step; a negative code is a signal
    {"do": "abort", "at": 2}            as `stop.abort_when` does
    {"do": "refuse"}                    as with a wrong configuration
Each may have "step_s", the seconds of a step, and "hold", a file: no step is made after "at" until that file is there.
What was called is appended to SCRIPT.calls, one JSON object a line.
"""

import fcntl
import json
import os
import shutil
import signal
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

METRIC = "val-core/openai/gsm8k/acc"
STOPS: list[int] = []  # signals that came


def main() -> int:
    script, args = Path(sys.argv[1]), sys.argv[2:]
    signal.signal(signal.SIGINT, lambda number, _frame: STOPS.append(number))
    config = tomllib.loads(Path(args[1]).read_text())
    name, root = config["run_name"], Path(config["output_dir"])
    act = _act(script, name, args)
    if act["do"] == "refuse":
        print("rl: One problem in the configuration:\n  - planted is wrong; mend it.")
        return 2
    root.mkdir(parents=True, exist_ok=True)
    lock = os.open(root / ".rl.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"rl: output_dir = {root} is in use by another run")
        return 2
    done = _prepare(root, config, args)
    return _work(root, config, act, done)


def _act(script: Path, name: str, args: list[str]) -> dict[str, Any]:
    calls = script.with_suffix(".calls")
    earlier = [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
    with calls.open("a") as file:
        file.write(json.dumps({"run": name, "args": args, "pid": os.getpid(), "time": time.time()}) + "\n")
    acts = json.loads(script.read_text()).get(name, [{"do": "finish"}])
    return acts[min(sum(call["run"] == name for call in earlier), len(acts) - 1)]


def _prepare(root: Path, config: dict[str, Any], args: list[str]) -> int:
    """Make room, and return the step that is done already."""
    held = [root / "config.toml", root / "metrics.jsonl"]
    if "--clean" in args:
        for path in (*held, root / "evals", root / "control"):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif "--resume" not in args and any(path.exists() for path in held):
        print(f"rl: output_dir = {root} holds a run already.")
        raise SystemExit(2)
    elif "--resume" in args and not held[0].exists():
        print(f"rl: {root} holds no run")
        raise SystemExit(2)
    (root / "control" / "stop.json").unlink(missing_ok=True)
    (root / "evals").mkdir(exist_ok=True)
    lines = [f'{key} = "{config[key]}"' for key in ("run_name", "output_dir")]
    held[0].write_text("\n".join([*lines, f"max_steps = {config['max_steps']}", f"seed = {config['seed']}"]) + "\n")
    if not held[1].exists():
        return -1
    records = [json.loads(line) for line in held[1].read_text().splitlines()]
    return max((record["step"] for record in records if "actor/entropy" in record), default=-1)


def _work(root: Path, config: dict[str, Any], act: dict[str, Any], done: int) -> int:
    last = config["max_steps"]
    for step in range(max(done + 1, 0), last + 1):
        time.sleep(act.get("step_s", 0.01))
        while act.get("hold") and step > act["at"] and not Path(act["hold"]).exists() and not STOPS:
            time.sleep(0.01)
        if STOPS:
            return 130 if len(STOPS) > 1 else _stop(root, "interrupted", "interrupted by the user", 3)
        if step:
            _record(root, step, _trained(config, step))
        if step in (0, 2) or (step == last and act["do"] != "skip the evaluation"):
            _evaluate(root, config, step)
        if act["do"] == "die" and step >= act["at"]:
            if act["code"] < 0:
                os.kill(os.getpid(), -act["code"])
            return act["code"]
        if act["do"] == "abort" and step >= act["at"]:
            return _stop(root, "abort", "planted: length explosion", 4)
    if act["do"] == "finish" and not (root / "evals" / f"step_{last}.json").exists():
        _evaluate(root, config, last)  # all that a resumed run had left to do
    return 0


def _trained(config: dict[str, Any], step: int) -> dict[str, float]:
    share = step / config["max_steps"]
    return {"critic/reward/mean": 0.4 + 0.3 * share, "actor/entropy": 1.0 - 0.5 * share, "response_length/mean": 200 + 50 * share}


def _evaluate(root: Path, config: dict[str, Any], step: int) -> None:
    """Accuracy 0.5 at the start, plus 0.1 over the run, plus a hundredth a seed."""
    value = 0.5 + 0.1 * step / config["max_steps"] + 0.01 * config["seed"]
    scores = {f"{METRIC}/mean": value, f"{METRIC}/stderr": 0.012}
    (root / "evals" / f"step_{step}.json").write_text(json.dumps({"step": step, "metrics": scores}))
    _record(root, step, scores)


def _record(root: Path, step: int, values: dict[str, float]) -> None:
    with (root / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "time": time.time(), **values}) + "\n")


def _stop(root: Path, kind: str, reason: str, code: int) -> int:
    (root / "control").mkdir(exist_ok=True)
    (root / "control" / "stop.json").write_text(json.dumps({"kind": kind, "reason": reason}))
    return code


if __name__ == "__main__":
    sys.exit(main())
