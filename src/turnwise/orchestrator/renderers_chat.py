"""Models that the library `renderers` knows by hand: its templates, its parsing, its bridge between turns."""

import copy
from collections.abc import Sequence
from typing import Any

import msgspec

from turnwise.envs.messages import AssistantMessage, Tool, ToolCall
from turnwise.orchestrator.described_tools import as_said
from turnwise.orchestrator.template_tools import PROBE, QUESTION, TOOL, carries_several, json_format
from turnwise.orchestrator.tokenizer import SafeEncoder
from turnwise.orchestrator.tool_formats import JsonCalls, first_only, parsed_call
from turnwise.orchestrator.types import Message

UNREADABLE = "the calls in this reply cannot be read"


class RenderersChat:
    """A `renderers.Renderer` behind the protocol of `Chat`.

    The library encodes text itself, so text in a message that looks like a special token is broken up by zero-width spaces,
    which the policy sees.

    Args:
        renderer: the library's.
        keeping: the same one with `thinking_retention="all"`, which bridges over every message of a user. It is used as long as
            no reply had thoughts: there is nothing that the template would take out of the history then.
        tokenizer: of transformers, with a fast backend.
    """

    def __init__(self, renderer: Any, keeping: Any, tokenizer: Any) -> None:
        self._renderer = renderer
        self._guard = SafeEncoder(tokenizer.backend_tokenizer)
        self._guard.exact = False
        self._stops = tuple(renderer.get_stop_token_ids())
        self._tools: list[dict[str, Any]] | None = None
        self._several = True
        self._bare: JsonCalls | None = None  # reads calls that are JSON without marks, which the library reads only when sound
        self._bound: dict[bytes, RenderersChat] = {}
        self._keeping = keeping if self._bridges_like_the_template(keeping) else renderer

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self._stops

    def with_tools(self, tools: Sequence[Tool]) -> "RenderersChat":
        if not tools:
            return self
        key = msgspec.json.encode(tools)
        if key not in self._bound:
            bound = copy.copy(self)
            bound._tools = [self._guard.guard_value(tool.spec(), SafeEncoder.VISIBLE_MARK) for tool in tools]
            bound._several = carries_several(self._probe)
            found = json_format(self._probe)
            bound._bare = found if isinstance(found, JsonCalls) and not found.opening else None
            self._bound[key] = bound
        return self._bound[key]

    def first_prompt(self, messages: Sequence[Message]) -> list[int]:
        return list(self._renderer.render_ids(self._shown(messages), tools=self._tools, add_generation_prompt=True))

    def next_prompt(
        self, prompt_ids: Sequence[int], sampled_ids: Sequence[int], history: Sequence[Message], new: Sequence[Message]
    ) -> list[int]:
        thought = any(message.get("reasoning_content") for message in history)
        renderer = self._renderer if thought else self._keeping
        bridged = renderer.bridge_to_next_turn(list(prompt_ids), list(sampled_ids), self._shown(new), tools=self._tools)
        return self.first_prompt([*history, *new]) if bridged is None else list(bridged.token_ids)

    def text(self, sampled_ids: Sequence[int]) -> str:
        return self.reply(sampled_ids, ()).content

    def reply(self, sampled_ids: Sequence[int], prompt_ids: Sequence[int]) -> AssistantMessage:
        raw = self._decode(sampled_ids[:-1] if sampled_ids and sampled_ids[-1] in self._stops else sampled_ids)
        if self._tools is not None and self._bare is not None:
            message = self._bare.read(raw)
        else:
            message = self._parsed(sampled_ids, prompt_ids, raw)
        return (message if self._several else first_only(message)).numbered(())

    def _parsed(self, sampled_ids: Sequence[int], prompt_ids: Sequence[int], raw: str) -> AssistantMessage:
        try:
            parsed = self._renderer.parse_response(list(sampled_ids), tools=self._tools, prompt_ids=list(prompt_ids))
        except Exception as error:  # what a policy samples has no limits, and JSON of a thousand brackets ends its recursion
            if self._tools is None:
                return AssistantMessage(content=raw)
            call = ToolCall(id="", raw=raw, error=f"{UNREADABLE} ({type(error).__name__})")
            return AssistantMessage(content="", tool_calls=(call,), raw=raw)
        calls = tuple(parsed_call(call) for call in parsed.tool_calls) if self._tools is not None else ()
        raw = raw if calls or parsed.reasoning_content else ""
        return AssistantMessage(content=parsed.content, tool_calls=calls, thoughts=parsed.reasoning_content or "", raw=raw)

    def _shown(self, messages: Sequence[Message]) -> list[Message]:
        """Messages as the library takes them: guarded, calls as calls where they are sound, else as what was sampled."""
        return [self._guard.guard(self._sound(message), SafeEncoder.VISIBLE_MARK) for message in messages]

    def _sound(self, message: Message) -> Message:
        calls = message.get("tool_calls", ())
        if any("error" in call for call in calls) or (len(calls) > 1 and not self._several):
            return as_said(message)
        return {key: value for key, value in message.items() if key != "raw"}

    def _probe(self, messages: Sequence[Message], prompt: bool) -> str:
        try:
            return self._decode(self._renderer.render_ids(list(messages), tools=[TOOL.spec()], add_generation_prompt=prompt))
        except Exception:  # the library raises what it likes about messages that a model's format cannot hold
            return ""

    def _bridges_like_the_template(self, keeping: Any) -> bool:
        """Whether bridging over a message of a user gives what rendering the whole conversation gives."""
        said, answer = {"role": "assistant", "content": PROBE}, {"role": "user", "content": "And?"}
        prompt = list(self._renderer.render_ids([QUESTION], add_generation_prompt=True))
        whole = list(self._renderer.render_ids([QUESTION, said, answer], add_generation_prompt=True))
        spelled = self._guard.tokenizer.encode(PROBE, add_special_tokens=False).ids
        bridged = keeping.bridge_to_next_turn(prompt, [*spelled, self._stops[0]], [answer])
        return bridged is not None and list(bridged.token_ids) == whole

    def _decode(self, ids: Sequence[int]) -> str:
        return self._guard.tokenizer.decode(list(ids), skip_special_tokens=False)


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
    keeping = settings.model_copy(update={"thinking_retention": "all"})
    return RenderersChat(create_renderer(tokenizer, settings), create_renderer(tokenizer, keeping), tokenizer)
