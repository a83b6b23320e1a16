"""An environment with tools, and one that breaks the contract of answers to calls in every way."""

from collections.abc import Callable, Sequence
from typing import Any

from turnwise.envs.base import Step, Task, TextEnv
from turnwise.envs.messages import AssistantMessage, Tool, ToolCall, tool_message

LIBRARY = "support.tool_envs:Library"
CARELESS = "support.tool_envs:Careless"

LOOKUP = Tool(
    name="lookup",
    description="Look up a page.",
    parameters={"type": "object", "properties": {"page": {"type": "string"}}, "required": ["page"]},
)
ANSWER = Tool(name="answer", description="Answer.", parameters={"type": "object", "properties": {"text": {"type": "string"}}})


class Library(TextEnv):
    """`lookup` repeats the page it is asked for, `answer` ends the episode; each call that was run pays 0.1 as `used`."""

    component_names = frozenset({"used", "win"})
    max_turns = 4
    system_prompt = "Look up, then answer."

    def __init__(self, contents: str = "page {page}") -> None:
        super().__init__()
        self.contents = contents
        self.tools = (LOOKUP, ANSWER)

    def tasks(self, split: str) -> Sequence[Task]:
        return [{"id": f"{split}-{i}"} for i in range(3)]

    def begin(self, task: Task) -> str:
        return f"task {task['id']}"

    def step(self, action: str) -> Step:
        self.turn += 1
        message = AssistantMessage.from_action(action)
        told = [tool_message(call, self._run(call)) for call in message.tool_calls] or [
            {"role": "user", "content": "Call a tool."}
        ]
        used = {"used": 0.1 * sum(call.error is None for call in message.tool_calls)}
        done = any(call.name == "answer" and call.error is None for call in message.tool_calls)
        text = "\n".join(message["content"] for message in told)
        observation, reward, terminated, truncated, info = (
            self.win(text, components=used) if done else self.answer(text, components=used)
        )
        return observation, reward, terminated, truncated, {**info, "messages": told}

    def _run(self, call: ToolCall) -> str:
        if call.error is not None:
            return f"error: {call.error}"
        return self.contents.format(page=(call.arguments or {}).get("page")) if call.name == "lookup" else f"no tool {call.name}"


def _message(**changes: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "call00000", "name": "lookup", "content": "page", **changes}


BREACHES: dict[str, Callable[[], Any]] = {
    "no list": lambda: "page",
    "empty": list,
    "no message": lambda: ["page"],
    "role": lambda: [_message(role="assistant")],
    "content": lambda: [_message(content=None)],
    "id type": lambda: [_message(tool_call_id=3)],
    "unknown id": lambda: [_message(tool_call_id="call00009")],
    "twice": lambda: [_message(), _message()],
    "unanswered": lambda: [{"role": "user", "content": "so?"}],
    "user first": lambda: [{"role": "user", "content": "so?"}, _message()],
}


class Careless(Library):
    """Answers one call as `BREACHES[what]` does."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def step(self, action: str) -> Step:
        *rest, info = super().step(action)
        observation, reward, terminated, truncated = rest
        return observation, reward, terminated, truncated, {**info, "messages": BREACHES[self.what]()}
