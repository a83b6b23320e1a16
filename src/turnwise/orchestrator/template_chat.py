"""Any model with a tokenizer.json and a Jinja chat template."""

import copy
from collections.abc import Sequence
from typing import Any

import msgspec

from turnwise.envs.messages import AssistantMessage, Tool
from turnwise.orchestrator.jinja_template import ChatTemplate
from turnwise.orchestrator.template_tools import ToolFormat, ToolStyle, find_style
from turnwise.orchestrator.tokenizer import ChatError, ModelText, SafeEncoder
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
        self.encoder.exact = self._encodes_like_the_tokenizer()
        self.append_only = self._appends(PROBES)
        self.keeps_thoughts = self._appends(tuple(THOUGHT + reply for reply in PROBES))
        self._close = self._closing_ids() if self.append_only else []
        self._stops = tuple(dict.fromkeys([*self._close[-1:], *model.eos_ids]))
        if not self._stops:
            raise ChatError(f"{model.folder}: neither eos_token nor an end token in the chat template; replies would never end")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self._stops

    def with_tools(self, tools: Sequence[Tool]) -> "TemplateChat":
        if not tools:
            return self
        key = msgspec.json.encode(tools)
        if key not in self._bound:
            self._bound[key] = self._offering([tool.spec() for tool in tools])
        return self._bound[key]

    def _offering(self, specs: list[dict[str, Any]]) -> "TemplateChat":
        bound = copy.copy(self)
        bound._specs, bound.style = specs, find_style(self._template, self._tool_format)
        return bound

    def first_prompt(self, messages: Sequence[Message]) -> list[int]:
        mark = self.encoder.mark_for(messages)
        return self.encoder.encode(self._render(messages, mark), mark)

    def next_prompt(
        self, prompt_ids: Sequence[int], sampled_ids: Sequence[int], history: Sequence[Message], new: Sequence[Message]
    ) -> list[int]:
        thought = not self.keeps_thoughts and any("</think>" in message["content"] for message in history)
        if thought or not self.append_only:
            return self.first_prompt([*history, *new])
        tail = self._tail(new)
        stopped = bool(sampled_ids) and bool(self._close) and sampled_ids[-1] == self._close[-1]
        return [*prompt_ids, *sampled_ids, *(tail[len(self._close) :] if stopped else tail)]

    def text(self, sampled_ids: Sequence[int]) -> str:
        ids = sampled_ids[:-1] if sampled_ids and sampled_ids[-1] in self._stops else sampled_ids
        return self.model.tokenizer.decode(list(ids), skip_special_tokens=False)

    def reply(self, sampled_ids: Sequence[int], prompt_ids: Sequence[int]) -> AssistantMessage:
        text = self.text(sampled_ids)
        return AssistantMessage(content=text) if self.style is None else self.style.read(text).numbered(())

    def _tail(self, new: Sequence[Message]) -> list[int]:
        """Ids from the end of a reply to the beginning of the next."""
        mark = self.encoder.mark_for(new)
        said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBES[0]}, *new]
        text = self._render(said, mark, opening=False)
        return self.encoder.encode(text[text.index(PROBES[0]) + len(PROBES[0]) :], mark)

    def _render(self, messages: Sequence[Message], mark: str, *, opening: bool = True) -> str:
        guarded = [self.encoder.guard(message, mark) for message in messages]
        if self.style is None:
            return self._template.render(guarded)
        specs = self.encoder.guard_value(self._specs, mark)
        shown = self.style.shown(guarded, specs, opening=opening)
        return self._template.render(shown, tools=specs if self.style.native else None)

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

    def _appends(self, replies: Sequence[str]) -> bool:
        """Whether a conversation with these replies is the one before it plus something at the end."""
        opening, *answers = ({"role": "user", "content": text} for text in ("One", "Two", "Three"))
        messages = [opening]
        grown = self._render(messages, "")
        for reply, answer in zip(replies, answers, strict=True):
            spoken: Message = {"role": "assistant", "content": reply}
            before, found, tail = self._render([opening, spoken, answer], "").partition(reply)
            if not (before and found):
                return False
            grown += reply + tail
            messages += [spoken, answer]
        return grown == self._render(messages, "")
