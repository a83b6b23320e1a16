"""Small rollouts, groups and environments for tests of the orchestrator."""

from collections.abc import Mapping, Sequence
from typing import Any

from turnwise.config import EnvConfig, RLConfig
from turnwise.envs.base import Step, Task, TextEnv
from turnwise.orchestrator.buffer import GroupTask
from turnwise.orchestrator.environments import EnvSetup, load_setups
from turnwise.orchestrator.filters import FinishedGroup
from turnwise.orchestrator.types import Rollout, StopReason, Turn

ECHO = "support.rollouts:Echo"


class Echo(TextEnv):
    """Repeats each reply; pays its length in hundredths as `length`, and 1 as `win` for a reply with a z."""

    component_names = frozenset({"length", "win", "owed"})

    def __init__(self, turns: int = 3, tasks: int = 5) -> None:
        super().__init__()
        self.max_turns = turns
        self.number = tasks

    def tasks(self, split: str) -> Sequence[Task]:
        if split not in ("train", "validation"):
            raise ValueError(f"no split {split}")
        return [{"id": f"{split}-{i}"} for i in range(self.number)]

    def begin(self, task: Task) -> str:
        return f"task {task['id']}"

    def step(self, action: str) -> Step:
        self.turn += 1
        paid = {"length": len(action) / 100}
        if "z" in action:
            return self.win("won", components=paid)
        return self.answer(f"you said {action}", components=paid)

    def closing_components(self) -> dict[str, float]:
        return {"owed": -0.25}

    def episode_metrics(self) -> dict[str, float]:
        return {"turns_seen": float(self.turn)}


def echo_setup(**settings: Any) -> EnvSetup:
    return load_setups([EnvConfig(id=ECHO, **settings)], "train")[0]


def make_turn(
    prompt: Sequence[int],
    sampled: Sequence[int],
    *,
    version: int = 0,
    reward: float = 0.0,
    components: Mapping[str, float] | None = None,
) -> Turn:
    return Turn(
        prompt_ids=list(prompt),
        sampled_ids=list(sampled),
        logprobs=[-0.5] * len(sampled),
        spans=[(version, len(sampled))],
        finish_reason="stop",
        components=components if components is not None else {"length": reward},
        reward=reward,
    )


def make_rollout(
    reward: float = 0.0,
    *,
    group: int = 0,
    index: int = 0,
    version: int = 0,
    error: str | None = None,
    turn_rewards: Sequence[float] | None = None,
    task: str = "t0",
    reply: str = "word",
) -> Rollout:
    """A rollout of one turn with the reward, or of one turn for each of `turn_rewards`."""
    rewards = list(turn_rewards) if turn_rewards is not None else [reward]
    turns: list[Turn] = []
    prompt: list[int] = [1, 2, 3]
    messages: list[dict[str, str]] = [{"role": "user", "content": "guess"}]
    for value in rewards:
        turns.append(make_turn(prompt, [7, 8, 9], version=version, reward=value))
        prompt = [*prompt, 7, 8, 9, 4, 5]
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": "next"}]
    return Rollout(
        rollout_id=f"g{group}-{index}",
        group_id=group,
        env="echo",
        task_id=task,
        turns=tuple(turns),
        messages=tuple(messages),
        stop_reason=StopReason.ERROR if error else StopReason.TERMINATED,
        reward=sum(rewards),
        reward_dense=sum(rewards),
        reward_sparse=0.0,
        metrics={"turns_seen": float(len(rewards))},
        error=error,
        timing={"started": 0.0, "total_s": 2.0, "engine_s": 1.5, "env_s": 0.5},
    )


def make_group(
    rewards: Sequence[float | None], *, number: int = 0, version: int = 0, setup: EnvSetup | None = None
) -> FinishedGroup:
    """A finished group; None stands for an errored rollout."""
    env = setup or echo_setup()
    rollouts = [
        make_rollout(0.0 if r is None else r, group=number, index=i, version=version, error="boom" if r is None else None)
        for i, r in enumerate(rewards)
    ]
    return FinishedGroup(number, GroupTask(env, 0, env.tasks[0], 0), tuple(rollouts))


def make_config(**orchestrator: Any) -> RLConfig:
    """A config of groups of two, two groups a batch, unless told otherwise."""
    settings = {"batch_size": 4, "rollouts_per_example": 2, "env": [{"id": ECHO}], **orchestrator}
    return RLConfig.model_validate({"orchestrator": settings, "max_steps": 10})
