"""Environments of verifiers 0.3 as their users write them, and some with a fault each."""

import asyncio

import verifiers as vf
from datasets import Dataset


def rows(count: int, *, first: int = 1) -> Dataset:
    numbers = range(first, first + count)
    return Dataset.from_list([{"question": f"Say {n}.", "answer": str(n), "id": f"theirs-{n}"} for n in numbers])


def exact(completion: vf.Messages, answer: str) -> float:
    return float((completion[-1].content or "").strip() == answer)


async def short(completion: vf.Messages) -> float:
    return 1.0 if len(completion[-1].content or "") < 4 else 0.0


def words(completion: vf.Messages) -> float:
    return float(len((completion[-1].content or "").split()))


def rubric() -> vf.Rubric:
    graded = vf.Rubric(funcs=[exact, short], weights=[1.0, 0.25])
    graded.add_metric(words)
    return graded


class Guess(vf.MultiTurnEnv):
    """Higher or lower, until the number is said."""

    async def env_response(self, messages, state, **kwargs):
        said = (messages[-1].content or "").strip()
        if said == state["answer"]:
            state["found"] = True
        return [{"role": "user", "content": "higher" if said < state["answer"] else "lower"}]

    @vf.stop
    async def found(self, state) -> bool:
        replies = [step["completion"][-1].content for step in state["trajectory"]]
        return bool(replies) and (replies[-1] or "").strip() == state["answer"]


class Rewrites(vf.MultiTurnEnv):
    """Forgets what was said before."""

    async def env_response(self, messages, state, **kwargs):
        return []

    async def get_prompt_messages(self, state):
        return [{"role": "user", "content": f"turn {len(state['trajectory'])}"}, {"role": "user", "content": "go"}]


class Parallel(vf.MultiTurnEnv):
    """Samples two replies at once."""

    async def env_response(self, messages, state, **kwargs):
        return []

    async def get_model_response(self, state, prompt, *args, **kwargs):
        one = super().get_model_response
        return (await asyncio.gather(one(state, prompt, *args, **kwargs), one(state, prompt, *args, **kwargs)))[0]


class Raises(Guess):
    async def env_response(self, messages, state, **kwargs):
        raise KeyError("the board")


class Fails(Guess):
    async def env_response(self, messages, state, **kwargs):
        raise vf.InfraError("the sandbox is gone")


class Hangs(Guess):
    async def env_response(self, messages, state, **kwargs):
        await asyncio.Event().wait()


class Image(Guess):
    async def env_response(self, messages, state, **kwargs):
        return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: one.
        b: the other.
    """
    return a + b


def bad(value):
    def bad_reward(completion):
        if value == "raise":
            raise ZeroDivisionError("no words")
        return {"none": None, "nan": float("nan"), "text": "0.5"}[value]

    return vf.Rubric(funcs=[bad_reward, exact])


def by_group(completions) -> list[float]:
    return [0.0 for _ in completions]


def load_environment(kind: str = "once", system_prompt: str | None = None, reward: str = "none", **kwargs) -> vf.Environment:
    common = {"dataset": rows(4), "eval_dataset": rows(2, first=7), "system_prompt": system_prompt, "rubric": rubric()}
    if kind == "once":
        return vf.SingleTurnEnv(**{**common, **kwargs})
    if kind == "few":
        shots = [{"role": "user", "content": "Say 0."}, {"role": "assistant", "content": "0"}]
        return vf.SingleTurnEnv(**common, few_shot=shots)
    if kind == "held":
        return vf.SingleTurnEnv(dataset=rows(4), rubric=rubric())
    if kind == "bad":
        return vf.SingleTurnEnv(dataset=rows(4), rubric=bad(reward))
    if kind == "grouped":
        return vf.SingleTurnEnv(dataset=rows(4), rubric=vf.Rubric(funcs=[by_group]))
    if kind == "judged":
        return vf.SingleTurnEnv(dataset=rows(4), rubric=vf.JudgeRubric())
    if kind == "tools":
        return vf.ToolEnv(tools=[add], max_turns=4, **common)
    several = {"guess": Guess, "rewrites": Rewrites, "parallel": Parallel, "raises": Raises, "fails": Fails}
    several |= {"hangs": Hangs, "image": Image}
    return several[kind](max_turns=3, **common)
