"""Text <-> tokens of a conversation. Token in, token out: what the model sampled is never decoded and encoded again."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Protocol

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from turnwise.orchestrator.tokenizer import ChatError, ModelText, SafeEncoder, load_model_text
from turnwise.orchestrator.types import Message

__all__ = ["Chat", "ChatError", "TemplateChat", "load_chat"]

PROBES = ("turnwise probe reply one", "turnwise probe reply two")
THOUGHT = "<think>\nturnwise probe thought\n</think>\n\n"


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
        """The reply as the environment reads it, without its stop token."""
        ...


class TemplateChat:
    """Any model with a tokenizer.json and a Jinja chat template.

    The bridge to the next turn is derived from the template: a probe conversation with a placeholder reply is rendered, and
    what follows the placeholder is encoded. A reply cut by the token limit thereby gets the end token that the template needs.
    """

    def __init__(self, model: ModelText) -> None:
        self.model = model
        self.encoder = SafeEncoder(model.tokenizer)
        self._template = _compile(model.template)
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

    def _tail(self, new: Sequence[Message]) -> list[int]:
        """Ids from the end of a reply to the beginning of the next."""
        mark = self.encoder.mark_for(new)
        text = self._render([{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBES[0]}, *new], mark)
        return self.encoder.encode(text[text.index(PROBES[0]) + len(PROBES[0]) :], mark)

    def _render(self, messages: Sequence[Message], mark: str) -> str:
        guarded = [self.encoder.guard(message, mark) for message in messages]
        try:
            return self._template.render(messages=guarded, add_generation_prompt=True, **self.model.special_tokens)
        except jinja2.TemplateError as error:
            roles = [message["role"] for message in messages]
            raise ChatError(f"{self.model.folder}: the chat template refuses messages with the roles {roles}: {error}") from error

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


def load_chat(name: str, *, chat_template: Path | None = None) -> Chat:
    """The chat of a model folder or hub id: by the library `renderers` where that knows the model, else by its template.

    Raises:
        ChatError: tokenizer or template are missing or unusable.
    """
    hub_id = _hub_id(name)
    if hub_id is not None and chat_template is None:
        from turnwise.orchestrator.renderers_chat import load_renderers_chat  # late: the library takes 2.3 s to import

        known = load_renderers_chat(name, hub_id)
        if known is not None:
            return known
    return TemplateChat(load_model_text(name, chat_template=chat_template))


def _hub_id(name: str) -> str | None:
    """`owner/model` of a hub id or of its folder in the hub's cache; None for any other folder."""
    if not Path(name).is_dir():
        return name
    cached = next((part for part in Path(name).parts if part.startswith("models--")), None)
    return None if cached is None else "/".join(cached.split("--")[1:])


def _compile(template: str) -> jinja2.Template:
    """Compile a chat template with the names that Hugging Face promises to templates."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    offered: dict[str, Any] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals = {**environment.globals, **offered}
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ChatError(f"the chat template is not valid Jinja, line {error.lineno}: {error.message}") from error


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
