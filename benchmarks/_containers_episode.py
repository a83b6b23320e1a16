"""The episode that `containers.py` plays many times."""

from collections.abc import Sequence
from contextlib import ExitStack

from turnwise.containers import Ending
from turnwise.envs.base import Step, Task, TextEnv

EPISODE = ("echo 6 > six; pwd", "expr $(cat six) '*' 7 > submission", "ls -l")


class Sums(TextEnv):
    """Three commands and a submission in a container of its own."""

    uses_containers = True
    max_turns = 4

    def __init__(self) -> None:
        super().__init__()
        self._resources = ExitStack()

    def tasks(self, split: str) -> Sequence[Task]:
        return [{"id": "six"}]

    def begin(self, task: Task) -> str:
        self.close()
        assert self.containers is not None
        self._box = self._resources.enter_context(self.containers.tasks.lease("busybox", files={"README": "Multiply."}))
        return "Six times seven?"

    def step(self, action: str) -> Step:
        self.turn += 1
        if action == "submit":
            return self.end("", components={"win": float(self._box.read("/home/agent/submission") == b"42\n")})
        done = self._box.run(action)
        if done.ending is not Ending.OK:
            raise RuntimeError(f"{action}: {done.ending} {done.output}")
        return self.answer(done.output)

    def close(self) -> None:
        self._resources.close()
