"""A taskset with a tool server, which verifiers starts as a process."""

import verifiers.v1 as vf


class AddToolset(vf.Toolset[vf.ToolsetConfig, vf.State]):
    TOOL_PREFIX = None

    @vf.tool
    async def add(self, a: int, b: int) -> str:
        """Add two numbers."""
        return str(a + b)


class SumData(vf.TaskData):
    answer: str


class SumTask(vf.Task[SumData, vf.State, vf.TaskConfig]):
    @classmethod
    def toolsets(cls, config):
        return [AddToolset(vf.ToolsetConfig())]

    @vf.reward
    async def exact(self, trace: vf.Trace) -> float:
        return float((trace.nodes[-1].message.content or "") == self.data.answer)


class Sums(vf.Taskset[SumTask, vf.TasksetConfig]):
    def load(self):
        yield SumTask(SumData(prompt="What is 2 + 3?", answer="5"), self.config.task)


__all__ = ["Sums"]

if __name__ == "__main__":
    AddToolset.run()
