"""Text <-> tokens of a conversation. Token in, token out: what the model sampled is never decoded and encoded again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from turnwise.envs.messages import AssistantMessage, Tool
from turnwise.orchestrator.template_chat import TemplateChat
from turnwise.orchestrator.template_tools import ToolFormat
from turnwise.orchestrator.tokenizer import ChatError, load_model_text
from turnwise.orchestrator.types import Message

__all__ = ["Chat", "ChatError", "TemplateChat", "load_chat"]


class Chat(Protocol):
    """How a model reads conversations."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a reply."""
        ...

    def first_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of an opening conversation, up to where the policy's reply begins."""
        ...

    def next_prompt(
        self, prompt_ids: Sequence[int], sampled_ids: Sequence[int], history: Sequence[Message], new: Sequence[Message]
    ) -> list[int]:
        """Ids up to the next reply: `prompt_ids + sampled_ids + bridge` where the template only appends.

        Args:
            history: the conversation that `prompt_ids` and `sampled_ids` spell.
            new: the messages that answer it.
        """
        ...

    def text(self, sampled_ids: Sequence[int]) -> str:
        """The reply as an environment of plain text reads it, without its stop token."""
        ...

    def with_tools(self, tools: Sequence[Tool]) -> "Chat":
        """A chat whose prompts offer these tools; the same object for the same tools, this chat for none.

        Raises:
            ChatError: the model's way of calling tools is not understood.
        """
        ...

    def reply(self, sampled_ids: Sequence[int], prompt_ids: Sequence[int]) -> AssistantMessage:
        """What the reply to `prompt_ids` says and calls. Never raises: what cannot be read is a call with an error.

        Ids of calls are unique within the reply; `AssistantMessage.numbered` makes them so within an episode.
        """
        ...


def load_chat(name: str, *, chat_template: Path | None = None, tool_format: ToolFormat = "auto") -> Chat:
    """The chat of a model folder or hub id: by the library `renderers` where that knows the model, else by its template.

    Args:
        chat_template: Jinja file instead of the model's own template.
        tool_format: "described" tells the model of tools in the system prompt, whatever its template can do.

    Raises:
        ChatError: tokenizer or template are missing or unusable.
    """
    hub_id = _hub_id(name)
    if hub_id is not None and chat_template is None and tool_format == "auto":
        from turnwise.orchestrator.renderers_chat import load_renderers_chat  # late: the library takes 2.3 s to import

        known = load_renderers_chat(name, hub_id)
        if known is not None:
            return known
    return TemplateChat(load_model_text(name, chat_template=chat_template), tool_format=tool_format)


def _hub_id(name: str) -> str | None:
    """`owner/model` of a hub id or of its folder in the hub's cache; None for any other folder."""
    if not Path(name).is_dir():
        return name
    cached = next((part for part in Path(name).parts if part.startswith("models--")), None)
    return None if cached is None else "/".join(cached.split("--")[1:])
