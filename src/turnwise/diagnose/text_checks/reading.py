"""The model's own tokenizer and template, read beside the chat that a run uses, so that the one can be held against the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from turnwise.orchestrator.chat import Chat
from turnwise.orchestrator.jinja_template import ChatTemplate
from turnwise.orchestrator.tokenizer import ChatError, ModelText
from turnwise.orchestrator.types import Message


@dataclass(frozen=True)
class Reading:
    """A chat, and what it is judged by."""

    chat: Chat
    text: ModelText

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate(self.text)

    def encode(self, text: str) -> list[int]:
        return list(self.text.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return self.text.tokenizer.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def stops(self) -> tuple[str, ...]:
        """The texts of the ids that end a reply."""
        return tuple(self.text.tokenizer.id_to_token(stop) or "" for stop in self.chat.stop_ids)

    def rendered(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None, opening: bool = True
    ) -> str:
        """What the template itself writes, up to where the next reply begins with `opening`; empty where it refuses."""
        try:
            return self.template.render(messages, tools=tools, add_generation_prompt=opening)
        except ChatError:
            return ""

    def until_stop(self, text: str) -> str:
        """The text before the first of the ids that end a reply."""
        ends = [text.index(stop) for stop in self.stops if stop and stop in text]
        return text[: min(ends)] if ends else text


def first_difference(one: str, other: str, *, around: int = 24) -> str:
    """Where two texts part, with what each says there."""
    pairs = enumerate(zip(one, other, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
    begin = max(0, at - around // 2)
    return f"{one[begin : at + around]!r} instead of {other[begin : at + around]!r}"
