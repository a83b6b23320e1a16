"""Chat templates: Jinja in a sandbox, with the names that Hugging Face promises to templates."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from turnwise.orchestrator.tokenizer import ChatError, ModelText
from turnwise.orchestrator.types import Message


class ChatTemplate:
    """The template of a model, compiled.

    Raises:
        ChatError: it is not Jinja; from `render`: it refuses the messages, or breaks on them.
    """

    def __init__(self, model: ModelText) -> None:
        self._model = model
        self._plain = _compile(model.template)
        self._with_tools = self._plain if model.tool_template is None else _compile(model.tool_template)

    def render(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None, add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text; `tools` as `Tool.spec` gives them."""
        template, offered = (self._plain, {}) if tools is None else (self._with_tools, {"tools": tools})
        try:
            return template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **offered, **self._model.special_tokens
            )
        except Exception as error:  # a template is somebody else's program: it may raise anything
            roles = [message["role"] for message in messages]
            words = f"the chat template refuses messages with the roles {roles}: {error}"
            raise ChatError(f"{self._model.folder}: {words}") from error


def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    offered: dict[str, Any] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals = {**environment.globals, **offered}
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ChatError(f"the chat template is not valid Jinja, line {error.lineno}: {error.message}") from error


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
