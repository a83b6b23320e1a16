"""A policy by script for both sides of a comparison: as an OpenAI-compatible server, and as the engine of our rollouts.

The model's name says which script is played (`script-7`); which reply of it, the number of replies after the opening.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from support.rollouts import Echo
from turnwise.envs.base import Task
from turnwise.inference.client import Completion
from turnwise.orchestrator.chat import TemplateChat
from turnwise.orchestrator.rollout import Generate

OVERFLOW = "overflow"  # a reply that says this is the server's refusal of a prompt beyond its context
BREAK = "break"  # and this its failure


@dataclass(frozen=True)
class Said:
    """One reply: what it says, and what it calls, with arguments as the model writes them."""

    content: str
    calls: tuple[tuple[str, str], ...] = ()

    def text(self) -> str:
        """As the model samples it, in the form that our chats read calls in."""
        calls = [f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {given}}}\n</tool_call>' for name, given in self.calls]
        return "\n".join([*([self.content] if self.content else []), *calls])

    def message(self, number: int) -> dict[str, Any]:
        """As a server with a tool parser answers."""
        calls = [
            {"id": f"call_{number}_{i}", "type": "function", "function": {"name": name, "arguments": given}}
            for i, (name, given) in enumerate(self.calls)
        ]
        return {"role": "assistant", "content": self.content or None, **({"tool_calls": calls} if calls else {})}


@dataclass
class ChatServer:
    """Serves `/v1/chat/completions` on a free port of 127.0.0.1 inside the running event loop."""

    scripts: Sequence[Sequence[Said]]
    requests: list[dict[str, Any]] = field(default_factory=list)
    given: int = 0  # messages of the assistant in every opening

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=2**26)
        app.add_routes([web.post("/v1/chat/completions", self._complete)])
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, backlog=4096).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._runner.cleanup()

    async def _complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        script = self.scripts[int(body["model"].rpartition("-")[2])]
        number = sum(message["role"] == "assistant" for message in body["messages"]) - self.given
        said = script[min(number, len(script) - 1)]
        if said.content == OVERFLOW:
            words = {"message": "This model's maximum context length is 8 tokens.", "type": "BadRequestError", "code": 400}
            return web.json_response({"error": words}, status=400)
        if said.content == BREAK:
            return web.json_response({"error": {"message": "planted", "type": "BadRequestError", "code": 400}}, status=400)
        choice = {"index": 0, "message": said.message(number), "finish_reason": "tool_calls" if said.calls else "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        answer = {"id": "chat-0", "object": "chat.completion", "created": 0, "model": body["model"]}
        return web.json_response({**answer, "choices": [choice], "usage": usage})


def engine_of(chat: TemplateChat, script: Sequence[Said]) -> Generate:
    """The same script as the engine of one rollout of ours."""
    replies = iter([*script, *[script[-1]] * 100])

    async def generate(prompt: Sequence[int], max_tokens: int, seed: int) -> Completion:
        ids = (*chat.encoder.encode(next(replies).text(), "\ufdef"), chat.stop_ids[0])
        return Completion(ids, (-0.5,) * len(ids), "stop", ((0, len(ids)),))

    return generate


class Undeclared(Echo):
    """Says nothing of the components that it pays."""

    component_names = frozenset[str]()


Scripted = Callable[[Task, int], list[Said]]


def wordle_script(task: Task, number: int) -> list[Said]:
    """Words right and wrong, none at all, and at times the answer."""
    rng = random.Random(number)
    choices = [
        "crane",
        "slate",
        "pious",
        "zzzzz",
        "I do not know.",
        "two words",
        "crane!",
        "The answer is SLATE",
        str(task["answer"]),
    ]
    return [Said(rng.choice(choices)) for _ in range(6)]


def gsm8k_script(task: Task, number: int) -> list[Said]:
    """The true answer, marked or not, another, or none."""
    truth = str(task["answer"]).rpartition("####")[2].strip()
    return [Said(random.Random(number).choice([f"So #### {truth}", f"It is {truth}.", "#### -1", "No idea.", "####"]))]


def musique_script(task: Task, number: int) -> list[Said]:
    """Calls good, useless, unknown, malformed and several at a time, words alone, and answers right and wrong."""
    rng = random.Random(number)

    def call() -> tuple[str, str]:
        return rng.choice(
            [
                ("search", json.dumps({"query": rng.choice(["architect bridge", "Norway", "river", ""])})),
                ("read", json.dumps({"paragraph": rng.randrange(7)})),
                ("search", '{"query": '),
                ("search", "[1]"),
                ("search", '{"quest": "typo"}'),
                ("fetch", '{"url": "x"}'),
                ("answer", json.dumps({"text": rng.choice(["Norway", "seven", "nobody knows"]), "paragraphs": [1, 3]})),
            ]
        )

    def reply() -> Said:
        if rng.random() < 0.15:
            return Said("Let me think.")
        return Said(rng.choice(["", "I look."]), tuple(call() for _ in range(rng.choice([1, 1, 1, 2, 6]))))

    return [reply() for _ in range(8)]
