"""A few steps on one task through `rl` itself, in a folder of its own, broken off as soon as enough is known."""

import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import msgspec

from turnwise.config import RLConfig
from turnwise.config.files import dump_toml
from turnwise.launch.child import Child
from turnwise.launch.models import Progress
from turnwise.launch.plan import ProcessSpec, shared_environment
from turnwise.launch.supervise import ECHO_S
from turnwise.launch.survivors import end_all
from turnwise.launch.sweep.process import RL
from turnwise.launch.warden import Warden
from turnwise.monitor.history import read_metrics
from turnwise.orchestrator.filters import Fate, NoSignal
from turnwise.transport import Control, RunDir, write_atomic

POLL_S = 0.1
GRACE_S = 20.0  # for `rl` to end everything that it started, once it was told to
TAIL_LINES = 30
JUDGED = (Fate.SIGNAL, Fate.EQUAL)
GRADIENT, UPDATE = "actor/grad_norm", "actor/update_norm"
REASONS = ("Failed at", "Likely cause:", "rl:")  # how `rl` begins a line that says why it ended

Rewards = Sequence[Sequence[float]]  # mean reward of each group of each step


@dataclass(frozen=True)
class ShortRun:
    """What a short run left behind."""

    rewards: Rewards
    gradients: Sequence[float]  # norm at each step that was trained; NaN where it was not finite
    updates: Sequence[float]  # norm of what each of these steps changed
    seconds: float
    failure: str = ""  # why it failed; empty when it was broken off, or came to its last step
    no_signal: bool = False  # it ended since group after group had equal rewards
    log: Sequence[str] = ()  # last lines of a run that failed

    @property
    def curve(self) -> list[float]:
        """Mean reward of each step."""
        return [fmean(groups) for groups in self.rewards]


def play(
    config: RLConfig,
    *,
    run_id: str,
    enough: Callable[[Rewards], bool],
    limit_s: float,
    say: Progress,
    rl: Sequence[str] = RL,
) -> ShortRun:
    """Do a run until its last batch is there, `enough` holds, it fails, or `limit_s` seconds have passed.

    The last step is not waited for, nor are its checkpoint and its evaluation: the rewards of a batch are those of the policy
    before its step. Nothing is left running, also when this process is killed.

    Args:
        config: resolved, with a folder that no other run has.
        run_id: which `rl` carries in its environment.
        enough: whether the rewards so far settle what is to be known.
        say: told the reward of each step.
        rl: the program.
    """
    root = config.output_dir
    begun = time.monotonic()
    write_atomic(root / "overfit.toml", dump_toml(config).encode())
    argv = (*rl, "@", str(root / "overfit.toml"), "--plain")
    warden = Warden(run_id, root / "logs" / "warden-of-check.stdout", grace_s=GRACE_S)
    try:
        child = Child(ProcessSpec("rl", argv, shared_environment(run_id), Path.cwd(), root / "logs" / "rl.stdout"))
        try:
            rewards = _follow(config, child, enough, begun + limit_s, say)
            failed = child.exit_code() not in (None, 0)
        finally:
            _end(child, run_id)
    finally:
        warden.dismiss()
    return _left(root, rewards, child if failed else None, time.monotonic() - begun)


def read_rewards(file: Path) -> list[float]:
    """Mean reward of each group of a step whose rollouts were judged, from its trajectories; in the order of the groups."""
    groups: dict[int, list[float]] = {}
    decoder = msgspec.json.Decoder(_Line)
    for line in file.read_bytes().splitlines():
        rollout = decoder.decode(line)
        if rollout.error is None and rollout.fate in JUDGED:
            groups.setdefault(rollout.group_id, []).append(rollout.reward)
    return [fmean(groups[number]) for number in sorted(groups)]


class _Line(msgspec.Struct):
    """What is read of a line of trajectories/step_N.jsonl."""

    group_id: int
    reward: float
    fate: str
    error: str | None


def _follow(config: RLConfig, child: Child, enough: Callable[[Rewards], bool], deadline: float, say: Progress) -> Rewards:
    """The rewards of all batches until there is a reason to end."""
    root, steps = config.output_dir, config.max_steps or 1
    rewards: list[list[float]] = []
    while len(rewards) < steps and not enough(rewards) and time.monotonic() < deadline:
        file = root / "trajectories" / f"step_{len(rewards) + 1}.jsonl"
        ended = child.exit_code() is not None or _no_signal(root)
        if file.exists():
            rewards.append(read_rewards(file))
            say(f"overfit: step {len(rewards)} of at most {steps}, reward {fmean(rewards[-1]):.3f}")
        elif ended:
            break
        else:
            time.sleep(POLL_S)
    return rewards


def _no_signal(root: Path) -> bool:
    """Whether the run ends since group after group had equal rewards."""
    request = Control(root).stop_request()
    return request is not None and NoSignal.__name__ in request.reason


def _end(child: Child, run_id: str) -> None:
    """Interrupt `rl` twice, which ends everything at once; what does not heed that is killed."""
    for _ in range(2):
        if child.exit_code() is None:
            os.kill(child.pid, signal.SIGINT)
            time.sleep(2 * ECHO_S)
    deadline = time.monotonic() + GRACE_S
    while child.exit_code() is None and time.monotonic() < deadline:
        time.sleep(POLL_S)
    end_all(run_id, GRACE_S)
    child.reap()


def _left(root: Path, rewards: Rewards, failed: Child | None, seconds: float) -> ShortRun:
    """What there is to read once nothing writes any more."""
    steps = [line for line in read_metrics(RunDir(root).metrics) if UPDATE in line]
    gradients, updates = ([_number(line[name]) for line in steps] for name in (GRADIENT, UPDATE))
    if _no_signal(root):
        return ShortRun(rewards, gradients, updates, seconds, no_signal=True)
    log = failed.last_lines(TAIL_LINES) if failed is not None else []
    why = [line for line in log if line.startswith(REASONS)] or log[-1:]
    return ShortRun(rewards, gradients, updates, seconds, failure=" ".join(why), log=log)


def _number(value: float | None) -> float:
    """metrics.jsonl holds null for what is not finite."""
    return math.nan if value is None else value
