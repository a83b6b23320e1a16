"""Conversations with tools over real vocabularies: tokens only grow, calls come back, and content makes no special token.

The tokenizers are those of SmolLM2, Qwen and Llama 3; templates are the tests' own, but for SmolLM2's.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support import tool_templates
from support.real_tokenizers import LLAMA, QWEN, real_tokenizer
from support.tool_envs import ANSWER, LOOKUP
from turnwise.envs.messages import AssistantMessage, tool_message
from turnwise.orchestrator.jinja_template import ChatTemplate
from turnwise.orchestrator.template_chat import PROBES, TemplateChat
from turnwise.orchestrator.tokenizer import load_model_text
from turnwise.orchestrator.tool_formats import ONE_CALL
from turnwise.orchestrator.types import Message

TOOLS = (LOOKUP, ANSWER)
Calls = list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Frame:
    """A chat with tools, and how a sound reply is spelled in its format."""

    chat: TemplateChat
    bare: bool = False  # JSON without marks
    listed: bool = False

    @cached_property
    def header(self) -> str:
        """Text between the last special token of a prompt and the reply."""
        prompt = self.decode(self.chat.first_prompt([{"role": "user", "content": "?"}]))
        return prompt[max(prompt.rindex(token) + len(token) for token in self.chat.encoder.ids if token in prompt) :]

    def spell(self, content: str, calls: Calls) -> str:
        if self.bare:
            return "; ".join(json.dumps({"name": n, "parameters": a}, ensure_ascii=False) for n, a in calls) or content
        written = [json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False) for name, arguments in calls]
        if self.listed:
            with_ids = [f'{call[:-1]}, "id": "call{number:05d}"}}' for number, call in enumerate(written)]
            return content + (f"[CALLS][{', '.join(with_ids)}]" if calls else "")
        return "\n".join([*([content] if content else []), *(f"<tool_call>\n{call}\n</tool_call>" for call in written)])

    def encode(self, text: str) -> list[int]:
        """As a policy may sample it: special tokens only where the format has them, never out of the text."""
        mark = self.chat.encoder.mark_for([{"role": "assistant", "content": text}])
        return self.chat.encoder.encode(self.chat.encoder.guard({"role": "assistant", "content": text}, mark)["content"], mark)

    def decode(self, ids: Sequence[int]) -> str:
        return self.chat.model.tokenizer.decode(list(ids), skip_special_tokens=False)

    def special(self, ids: Sequence[int]) -> list[int]:
        return [token for token in ids if token in set(self.chat.encoder.ids.values())]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((None, ""), id="smollm2-described", marks=pytest.mark.model),
        pytest.param((QWEN, tool_templates.HERMES), id="qwen-hermes"),
        pytest.param((QWEN, tool_templates.LISTED), id="qwen-listed"),
        pytest.param((LLAMA, tool_templates.LLAMA), id="llama-one-call"),
    ],
)
def frame(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Frame:
    which, template = request.param
    if which is None:
        from turnwise.launch.models import resolve_model

        return Frame(TemplateChat(load_model_text(resolve_model("smollm2-135m"))).with_tools(TOOLS))
    file = tmp_path_factory.mktemp("template") / "chat_template.jinja"
    file.write_text(template)
    chat = TemplateChat(load_model_text(str(real_tokenizer(which)), chat_template=file)).with_tools(TOOLS)
    return Frame(chat, bare=template == tool_templates.LLAMA, listed=template == tool_templates.LISTED)


TOKENS = ["<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>", "<|start_header_id|>", "<|python_tag|>", "\ufdd0"]
MARKS = ["<tool_call>", "</tool_call>", "</tool_response>", "<think>", "<tool_call>{}</tool_call>", "[CALLS]["]
HOSTILE = st.sampled_from([*TOKENS, *MARKS, PROBES[0]])
PLAIN = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
TEXT = st.lists(PLAIN | HOSTILE, max_size=3).map("".join)
CALM = st.text("abc XYZ.,12\n é日", max_size=12)  # nothing that a parser would look at
ARGUMENTS = st.dictionaries(st.sampled_from(["page", "k"]), TEXT | st.integers(-9, 9), max_size=2)
CALLS = st.lists(st.tuples(st.sampled_from(["lookup", "answer", "<|im_end|>", "nobody"]), ARGUMENTS), max_size=3)


def _answers(said: AssistantMessage, texts: list[str]) -> list[Message]:
    padded = [*texts, *["x"] * len(said.tool_calls)]
    return [dict(tool_message(call, text)) for call, text in zip(said.tool_calls, padded, strict=False)] or [
        {"role": "user", "content": padded[0] if padded else "Go on."}
    ]


@given(st.data())
@settings(deadline=None, max_examples=30)
def test_conversations_grow_at_their_end_and_give_back_their_calls(frame: Frame, data: st.DataObject):
    """Whatever tools answer: the prompt is what was before and a bridge; if replies encode back, it is what rendering gives."""
    chat = frame.chat
    history: list[Message] = [{"role": "system", "content": data.draw(CALM)}, {"role": "user", "content": data.draw(TEXT)}]
    prompt, exact = chat.first_prompt(history), True
    for _ in range(data.draw(st.integers(1, 2))):
        calls: Calls = data.draw(CALLS)
        text = frame.spell(data.draw(CALM), calls)
        cut = data.draw(st.integers(0, 3))  # tokens short of the end: 0 is a whole reply
        ids = frame.encode(text)
        sampled = ids[: len(ids) - cut] if cut else [*ids, chat.stop_ids[0]]
        said = chat.reply(sampled, prompt)
        if not cut and frame.decode(ids) == text:  # Qwen's tokenizer composes characters
            found = [(call.name, call.arguments) for call in said.tool_calls]
            assert found == calls
            assert [call.error for call in said.tool_calls[1:]] == [ONE_CALL if frame.bare else None] * len(calls[1:])
        new = _answers(said, data.draw(st.lists(TEXT, max_size=3)))
        grown = chat.next_prompt(prompt, sampled, [*history, said.to_message()], new)
        assert grown[: len(prompt) + len(sampled)] == [*prompt, *sampled]
        calm = chat.next_prompt(prompt, sampled, [*history, said.to_message()], [{**m, "content": "x"} for m in new])
        assert frame.special(grown[len(prompt) :]) == frame.special(calm[len(prompt) :])
        exact = exact and _encodes_back(frame, sampled, said)
        history, prompt = [*history, said.to_message(), *new], grown
    if exact:
        assert prompt == chat.first_prompt(history)


def _encodes_back(frame: Frame, sampled: Sequence[int], said: AssistantMessage) -> bool:
    """Whether the text of a reply, in its place in a template, has the ids that were sampled."""
    text = frame.chat.text(sampled)
    ids = list(sampled[:-1]) if sampled and sampled[-1] in frame.chat.stop_ids else list(sampled)
    trims = frame.bare and text != text.strip()
    listed = frame.listed and bool(said.tool_calls)  # rendered out of the calls, with its own spaces
    return not trims and not listed and frame.encode(frame.header + text) == [*frame.encode(frame.header), *ids]


@given(calls=CALLS.filter(bool), texts=st.lists(CALM.map(str.strip), min_size=3, max_size=3))
@settings(deadline=None, max_examples=20)
def test_the_bridge_is_what_the_whole_template_renders(frame: Frame, calls: Calls, texts: list[str]):
    """The reference is the template itself over messages with `tool_calls`, encoded as one text by the tokenizer."""
    chat = frame.chat
    calls = [(name, dict.fromkeys(arguments, "calm")) for name, arguments in calls if name.isalpha()][: 1 if frame.bare else 3]
    history: list[Message] = [{"role": "user", "content": "?"}]
    prompt = chat.first_prompt(history)
    sampled = [*frame.encode(frame.spell("", calls)), chat.stop_ids[0]]
    said = chat.reply(sampled, prompt)
    new = _answers(said, texts)
    spoken = {key: value for key, value in said.to_message().items() if key != "raw"}
    assert chat.style is not None
    if chat.style.native:
        shown = chat.style.shown([*history, spoken, *new], ())
        text = ChatTemplate(chat.model).render(shown, tools=[tool.spec() for tool in TOOLS])
        whole = chat.model.tokenizer.encode(text, add_special_tokens=False).ids
    else:
        whole = chat.first_prompt([*history, spoken, *new])
    assert chat.next_prompt(prompt, sampled, [*history, said.to_message()], new) == whole


@given(data=st.data())
@settings(deadline=None, max_examples=30)
def test_no_sampled_ids_make_reading_or_bridging_raise(frame: Frame, data: st.DataObject):
    tokens = st.integers(0, frame.chat.model.tokenizer.get_vocab_size() - 1)
    marks = [
        "<tool_call>",
        '{"name": "lookup", "arguments": {"page": "',
        "[CALLS][",
        '"}}',
        "</tool_call>",
        "<|python_tag|>",
        "<think>",
    ]
    spelled = st.sampled_from([frame.encode(mark) for mark in marks])
    sampled = [i for part in data.draw(st.lists(spelled | tokens.map(lambda i: [i]), max_size=10)) for i in part]
    history: list[Message] = [{"role": "user", "content": "?"}]
    prompt = frame.chat.first_prompt(history)
    said = frame.chat.reply(sampled, prompt)
    assert AssistantMessage.from_action(said.to_action()).tool_calls == said.tool_calls
    assert all(call.error or call.arguments is not None for call in said.tool_calls)
    grown = frame.chat.next_prompt(prompt, sampled, [*history, said.to_message()], _answers(said, []))
    assert grown[: len(prompt) + len(sampled)] == [*prompt, *sampled]
    assert frame.chat.first_prompt([*history, said.to_message(), *_answers(said, [])])
