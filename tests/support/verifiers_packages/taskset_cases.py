"""A taskset of verifiers 0.4 as its users write them, with faults to order, and an environment that answers its player."""

import asyncio

import verifiers.v1 as vf


class NumbersConfig(vf.TasksetConfig):
    count: int = 4
    first: int = 1
    fault: str = ""
    system: str | None = None


class NumberData(vf.TaskData):
    answer: str
    fault: str = ""


class NumberTask(vf.Task[NumberData, vf.State, vf.TaskConfig]):
    @vf.stop
    async def gave_up(self, trace: vf.Trace) -> bool:
        return "give up" in _last(trace)

    @vf.reward(weight=1.0)
    async def exact(self, trace: vf.Trace) -> float:
        if self.data.fault == "raise":
            raise ZeroDivisionError("no words")
        if self.data.fault in ("none", "nan"):
            return {"none": None, "nan": float("nan")}[self.data.fault]
        return float(_last(trace).strip() == self.data.answer)

    @vf.reward(weight=0.25)
    async def short(self, trace: vf.Trace) -> float:
        return float(len(_last(trace)) < 4)

    @vf.metric
    async def words(self, trace: vf.Trace) -> float:
        return float(len(_last(trace).split()))


def _last(trace: vf.Trace) -> str:
    said = [node.message.content or "" for node in trace.nodes if node.sampled]
    return said[-1] if said else ""


class Numbers(vf.Taskset[NumberTask, NumbersConfig]):
    def load(self):
        config = self.config
        for number in range(config.first, config.first + config.count):
            yield NumberTask(
                NumberData(prompt=f"Say {number}.", system_prompt=config.system, answer=str(number), fault=config.fault),
                config.task,
            )


class GuessConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig(max_turns=3)


class Guess(vf.Env[GuessConfig]):
    """Higher or lower, until the number is said."""

    async def run(self, task, agents):
        if task.data.fault == "twice":
            await agents.player.run(task)
            await agents.player.run(task)
            return
        if task.data.fault == "parallel":
            await asyncio.gather(agents.player.run(task), agents.player.run(task))
            return
        async with agents.player.interaction(task) as talk:
            segment = await talk.turn()
            while not segment.terminated and segment.last_reply != task.data.answer:
                if task.data.fault == "env":
                    raise KeyError("the board")
                if task.data.fault == "hang":
                    await asyncio.Event().wait()
                segment = await talk.turn("higher" if segment.last_reply < task.data.answer else "lower")


__all__ = ["Guess", "Numbers"]
