"""Models that the library `renderers` knows by hand: its templates, its parsing, its bridge between turns."""

import copy
from collections.abc import Sequence
from typing import Any

import msgspec

from turnwise.envs.messages import AssistantMessage, Tool
from turnwise.orchestrator.tokenizer import SafeEncoder
from turnwise.orchestrator.tool_formats import parsed_call
from turnwise.orchestrator.types import Message


class RenderersChat:
    """A `renderers.Renderer` behind the protocol of `Chat`.

    The library encodes text itself, so text in a message that looks like a special token is broken up by zero-width spaces,
    which the policy sees.
    """

    def __init__(self, renderer: Any, tokenizer: Any) -> None:
        self._renderer = renderer
        self._tools: list[dict[str, Any]] | None = None
        self._bound: dict[bytes, RenderersChat] = {}
        self._guard = SafeEncoder(tokenizer.backend_tokenizer)
        self._guard.exact = False
        self._stops = tuple(renderer.get_stop_token_ids())

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self._stops

    def with_tools(self, tools: Sequence[Tool]) -> "RenderersChat":
        if not tools:
            return self
        key = msgspec.json.encode(tools)
        if key not in self._bound:
            self._bound[key] = bound = copy.copy(self)
            bound._tools = [self._guard.guard_value(tool.spec(), SafeEncoder.VISIBLE_MARK) for tool in tools]
        return self._bound[key]

    def first_prompt(self, messages: Sequence[Message]) -> list[int]:
        return list(self._renderer.render_ids(self._guarded(messages), tools=self._tools, add_generation_prompt=True))

    def next_prompt(
        self, prompt_ids: Sequence[int], sampled_ids: Sequence[int], history: Sequence[Message], new: Sequence[Message]
    ) -> list[int]:
        bridged = self._renderer.bridge_to_next_turn(list(prompt_ids), list(sampled_ids), self._guarded(new), tools=self._tools)
        return self.first_prompt([*history, *new]) if bridged is None else list(bridged.token_ids)

    def text(self, sampled_ids: Sequence[int]) -> str:
        return self._renderer.parse_response(list(sampled_ids)).content

    def reply(self, sampled_ids: Sequence[int], prompt_ids: Sequence[int]) -> AssistantMessage:
        parsed = self._renderer.parse_response(list(sampled_ids), tools=self._tools, prompt_ids=list(prompt_ids))
        calls = [parsed_call(call) for call in parsed.tool_calls] if self._tools else []
        raw = self._guard.tokenizer.decode(list(sampled_ids), skip_special_tokens=False)
        return AssistantMessage(content=parsed.content, tool_calls=tuple(calls), raw=raw).numbered(())

    def _guarded(self, messages: Sequence[Message]) -> list[Message]:
        return [self._guard.guard(message, SafeEncoder.VISIBLE_MARK) for message in messages]


def load_renderers_chat(name: str, hub_id: str) -> RenderersChat | None:
    """The hand-written renderer of a model, or None when the library has none for `hub_id`."""
    from renderers.base import MODEL_RENDERER_MAP, create_renderer
    from renderers.configs import config_from_name
    from transformers import AutoTokenizer

    known = MODEL_RENDERER_MAP.get(hub_id)
    if known is None:
        return None
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.name_or_path = hub_id  # some renderers tell the sizes of a model family apart by it
    settings: Any = config_from_name(known)
    return RenderersChat(create_renderer(tokenizer, settings), tokenizer)
