"""Any model with a tokenizer.json and a Jinja chat template."""

import copy
from collections.abc import Sequence
from typing import Any

import msgspec

from turnwise.envs.messages import AssistantMessage, Tool
from turnwise.orchestrator import described_tools
from turnwise.orchestrator.jinja_template import ChatTemplate
from turnwise.orchestrator.library_calls import library_format
from turnwise.orchestrator.template_tools import QUESTION, TOOL, ToolFormat, ToolStyle, find_style
from turnwise.orchestrator.tokenizer import ChatError, ModelText, SafeEncoder
from turnwise.orchestrator.tool_formats import CallFormat
from turnwise.orchestrator.types import Message

PROBES = ("turnwise probe reply one", "turnwise probe reply two")
THOUGHT = "<think>\nturnwise probe thought\n</think>\n\n"


class TemplateChat:
    """Any model with a tokenizer.json and a Jinja chat template.

    The bridge to the next turn is derived from the template: a probe conversation with a placeholder reply is rendered, and
    what follows the placeholder is encoded. A reply cut by the token limit thereby gets the end token that the template needs.
    """

    def __init__(self, model: ModelText, *, tool_format: ToolFormat = "auto") -> None:
        self.model = model
        self.encoder = SafeEncoder(model.tokenizer)
        self.style: ToolStyle | None = None  # of a chat with tools
        self._specs: list[dict[str, Any]] = []
        self._template = ChatTemplate(model)
        self._tool_format: ToolFormat = tool_format
        self._bound: dict[bytes, TemplateChat] = {}
        self._thinking = self._prompts_a_thought()
        self.encoder.exact = self._encodes_like_the_tokenizer()
        self._grows = self._growth(("user",))
        self._close = self._closing_ids() if self.append_only else []
        self._stops = tuple(dict.fromkeys([*self._close[-1:], *model.eos_ids]))
        if not self._stops:
            raise ChatError(f"{model.folder}: neither eos_token nor an end token in the chat template; replies would never end")

    @property
    def append_only(self) -> bool:
        """Whether a conversation of plain replies is, turn by turn, the one before it and something at the end."""
        return self._grows["user", False]

    @property
    def keeps_thoughts(self) -> bool:
        """The same of replies with thoughts, which many templates take out once they are answered by a user."""
        return self._grows["user", True]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self._stops

    def with_tools(self, tools: Sequence[Tool]) -> "TemplateChat":
        if not tools:
            return self
        key = msgspec.json.encode(tools)
        if key not in self._bound:
            self._bound[key] = self._offering(tools)
        return self._bound[key]

    def _offering(self, tools: Sequence[Tool]) -> "TemplateChat":
        bound = copy.copy(self)
        bound._specs = [tool.spec() for tool in tools]
        bound.style = self._find_style(tools)
        bound._grows = bound._growth(("user", "tool"))
        return bound

    def _find_style(self, tools: Sequence[Tool]) -> ToolStyle:
        def render(messages: Sequence[Message], prompt: bool) -> str:
            try:
                return self._template.render(messages, tools=[TOOL.spec()], add_generation_prompt=prompt)
            except ChatError:
                return ""

        def library(rendered: str) -> CallFormat | None:
            return library_format(rendered, self.model.tokenizer, tools)

        system_role = self._takes_system_messages()
        if self._tool_format == "described":
            return ToolStyle(described_tools.FORMAT, system_role=system_role)
        return find_style(render, library, system_role=system_role)

    def first_prompt(self, messages: Sequence[Message]) -> list[int]:
        mark = self.encoder.mark_for(messages)
        return self.encoder.encode(self._render(messages, mark), mark)

    def next_prompt(
        self, prompt_ids: Sequence[int], sampled_ids: Sequence[int], history: Sequence[Message], new: Sequence[Message]
    ) -> list[int]:
        roles = {message["role"] for message in new}
        always = all(self._grows[role, True] for role in roles)
        thought = not always and any("</think>" in message["content"] for message in history)
        if not all(self._grows[role, thought] for role in roles):
            return self.first_prompt([*history, *new])
        tail = self._tail(new)
        stopped = bool(sampled_ids) and sampled_ids[-1] in self._stops
        return [*prompt_ids, *sampled_ids, *(tail[len(self._close) :] if stopped else tail)]

    def text(self, sampled_ids: Sequence[int]) -> str:
        ids = sampled_ids[:-1] if sampled_ids and sampled_ids[-1] in self._stops else sampled_ids
        return self.model.tokenizer.decode(list(ids), skip_special_tokens=False)

    def reply(self, sampled_ids: Sequence[int], prompt_ids: Sequence[int]) -> AssistantMessage:
        text = self.text(sampled_ids)
        return (
            AssistantMessage(content=text) if self.style is None else self.style.read(text, thinking=self._thinking).numbered(())
        )

    def _tail(self, new: Sequence[Message]) -> list[int]:
        """Ids from the end of a reply to the beginning of the next."""
        mark = self.encoder.mark_for(new)
        return self.encoder.encode(self._after(self._spoken(PROBES[0], new, mark), new, mark), mark)

    def _after(self, spoken: Message, new: Sequence[Message], mark: str) -> str:
        """What the template writes after a reply that holds the first of `PROBES`, up to the next reply."""
        text = self._render([QUESTION, spoken, *new], mark, opening=False)
        begin = text.index(PROBES[0]) + len(PROBES[0])
        if "tool_calls" in spoken:  # the probe is inside a call, whose own end comes before that of the reply
            begin = text.index(self.model.tokenizer.decode(self._close, skip_special_tokens=False), begin)
        return text[begin:]

    def _spoken(self, text: str, new: Sequence[Message], mark: str = "", *, thought: str = "") -> Message:
        if self.style is None:
            return {"role": "assistant", "content": thought + text}
        return self.style.placeholder(text, [self.encoder.guard(message, mark) for message in new], thought=thought)

    def _render(self, messages: Sequence[Message], mark: str, *, opening: bool = True) -> str:
        guarded = [self.encoder.guard(message, mark) for message in messages]
        if self.style is None:
            return self._template.render(guarded)
        specs = self.encoder.guard_value(self._specs, mark)
        if self.style.native:
            return self._template.render(self.style.shown(guarded, specs), tools=specs)
        return self._template.render(self.style.shown(guarded, specs if opening else ()))

    def _takes_system_messages(self) -> bool:
        try:
            return PROBES[0] in self._template.render([{"role": "system", "content": PROBES[0]}, QUESTION])
        except ChatError:
            return False

    def _prompts_a_thought(self) -> bool:
        """Whether the generation prompt opens a thought, so that replies begin inside it."""
        prompt = self._template.render([QUESTION])
        return prompt.rfind("<think>") > prompt.rfind("</think>")

    def _encodes_like_the_tokenizer(self) -> bool:
        probe = [{"role": "user", "content": "One,  two\n3 4!"}, {"role": "assistant", "content": PROBES[0]}]
        messages = [*probe, {"role": "user", "content": " And?\n"}]
        whole = self.model.tokenizer.encode(self._render(messages, ""), add_special_tokens=False)
        return self.first_prompt(messages) == whole.ids

    def _closing_ids(self) -> list[int]:
        """Ids with which the template ends a reply: up to the first special token, if that comes before the next message."""
        first, second = (self._tail([{"role": "user", "content": text}]) for text in ("yes", "no"))
        shared = next((i for i, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), 0)
        special = set(self.encoder.ids.values())
        end = next((i for i, token in enumerate(first[:shared]) if token in special), None)
        return [] if end is None else first[: end + 1]

    def _growth(self, roles: Sequence[str]) -> dict[tuple[str, bool], bool]:
        """Whether conversations only grow at their end: (role of what answers replies, replies have thoughts) -> so it is."""
        return {(role, bool(thought)): self._appends(role, thought) for role in roles for thought in ("", THOUGHT)}

    def _appends(self, role: str, thought: str) -> bool:
        """Whether a conversation of such replies and answers is, turn by turn, the one before it and something at the end."""
        messages: list[Message] = [{"role": "user", "content": "One"}]
        grown = self._render(messages, "")
        for number, reply in enumerate(PROBES):
            answer = _answer(role, number)
            spoken = self._spoken(reply, [answer], thought=thought)
            _, found, tail = self._render([messages[0], spoken, answer], "").partition(reply)
            messages += [spoken, answer]
            whole = self._render(messages, "")
            added = whole.removeprefix(grown).removesuffix(reply + tail)
            if not found or grown + added + reply + tail != whole:
                return False
            if added != thought and not ("tool_calls" in spoken and thought.strip() in added):
                return False
            grown = whole
        return True


def _answer(role: str, number: int) -> Message:
    if role == "user":
        return {"role": "user", "content": f"answer {number}"}
    return {"role": "tool", "tool_call_id": f"call{number:05d}", "name": TOOL.name, "content": f"answer {number}"}
