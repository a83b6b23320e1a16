"""Models that the library `renderers` knows, with tools, over the real vocabularies of Qwen and Llama 3."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.real_tokenizers import LLAMA, QWEN, real_tokenizer
from support.tool_envs import ANSWER, LOOKUP
from turnwise.envs.messages import AssistantMessage, tool_message
from turnwise.orchestrator.renderers_chat import RenderersChat, load_renderers_chat
from turnwise.orchestrator.tool_formats import ONE_CALL
from turnwise.orchestrator.types import Message

TOOLS = (LOOKUP, ANSWER)
QUESTION: Message = {"role": "user", "content": "?"}
CALM = st.text("abc XYZ.,12é日", max_size=12).map(str.strip)
HOSTILE = st.sampled_from(["<|im_end|>", "<|eot_id|>", "<tool_call>", "</tool_response>", "<think>", "<|start_header_id|>"])
TEXT = st.lists(CALM | HOSTILE, max_size=3).map("".join)
CALLS = st.lists(
    st.tuples(st.sampled_from(["lookup", "nobody"]), st.dictionaries(st.sampled_from(["page", "k"]), CALM | st.integers(-9, 9))),
    max_size=3,
)
Calls = list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Frame:
    """A chat of the library, without and with tools."""

    plain: RenderersChat
    chat: RenderersChat
    bare: bool

    def encode(self, text: str) -> list[int]:
        return list(self.plain._guard.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: list[int]) -> str:
        return self.plain._guard.tokenizer.decode(ids, skip_special_tokens=False)

    def special(self, ids: list[int]) -> list[int]:
        return [token for token in ids if token in set(self.plain._guard.ids.values())]

    def spell(self, content: str, calls: Calls) -> str:
        if self.bare:
            return "; ".join(json.dumps({"name": n, "parameters": a}, ensure_ascii=False) for n, a in calls) or content
        written = [json.dumps({"name": n, "arguments": a}, ensure_ascii=False) for n, a in calls]
        return "\n".join([*([content] if content else []), *(f"<tool_call>\n{call}\n</tool_call>" for call in written)])


@pytest.fixture(scope="module", params=["Qwen/Qwen3-8B", "meta-llama/Llama-3.2-1B-Instruct"])
def frame(request: pytest.FixtureRequest) -> Frame:
    bare = request.param.startswith("meta")
    plain = load_renderers_chat(str(real_tokenizer(LLAMA if bare else QWEN)), request.param)
    assert plain is not None
    return Frame(plain, plain.with_tools(TOOLS), bare)


def _answers(said: AssistantMessage, text: str) -> list[Message]:
    return [dict(tool_message(call, text)) for call in said.tool_calls] or [{"role": "user", "content": text}]


@given(data=st.data())
@settings(deadline=None, max_examples=20)
def test_conversations_grow_at_their_end_and_give_back_their_calls(frame: Frame, data: st.DataObject):
    history: list[Message] = [{"role": "system", "content": "Play."}, {"role": "user", "content": data.draw(TEXT)}]
    prompt, exact = frame.chat.first_prompt(history), True
    for _ in range(data.draw(st.integers(1, 2))):
        calls: Calls = data.draw(CALLS)
        ids, cut = frame.encode(frame.spell(data.draw(CALM), calls)), data.draw(st.integers(0, 3))
        sampled = ids[: len(ids) - cut] if cut else [*ids, frame.chat.stop_ids[0]]
        said = frame.chat.reply(sampled, prompt)
        if not cut:
            assert [(call.name, call.arguments) for call in said.tool_calls] == calls
            assert [call.error for call in said.tool_calls[1:]] == [ONE_CALL if frame.bare else None] * len(calls[1:])
        text = data.draw(TEXT)
        spoken = [*history, said.to_message()]
        grown = frame.chat.next_prompt(prompt, sampled, spoken, _answers(said, text))
        assert grown[: len(prompt) + len(sampled)] == [*prompt, *sampled]
        calm = frame.chat.next_prompt(prompt, sampled, spoken, _answers(said, "x"))
        assert frame.special(grown[len(prompt) :]) == frame.special(calm[len(prompt) :])
        exact = exact and not cut and frame.encode(frame.decode(ids)) == ids
        history, prompt = [*spoken, *_answers(said, text)], grown
    if exact:
        assert prompt == frame.chat.first_prompt(history)


@given(data=st.data())
@settings(deadline=None, max_examples=20)
def test_no_sampled_ids_make_reading_or_bridging_raise(frame: Frame, data: st.DataObject):
    stops = set(frame.chat.stop_ids)
    tokens = st.integers(0, frame.plain._guard.tokenizer.get_vocab_size() - 1).filter(lambda token: token not in stops)
    marks = [
        "<tool_call>",
        '{"name": "lookup", "arguments": {"page": "',
        '"}}',
        "</tool_call>",
        "[" * 2000,
        "<think>",
        "</think>",
    ]
    spelled = st.sampled_from([frame.encode(mark) for mark in marks])
    sampled = [i for part in data.draw(st.lists(spelled | tokens.map(lambda i: [i]), max_size=10)) for i in part]
    for chat in (frame.chat, frame.plain):
        prompt = chat.first_prompt([QUESTION])
        said = chat.reply(sampled, prompt)
        assert AssistantMessage.from_action(said.to_action()).tool_calls == said.tool_calls
        assert said.content == chat.text(sampled)
        spoken = [QUESTION, said.to_message()]
        grown = chat.next_prompt(prompt, sampled, spoken, _answers(said, "x"))
        assert said.thoughts or grown[: len(prompt) + len(sampled)] == [*prompt, *sampled]
        assert chat.first_prompt([*spoken, *_answers(said, "x")])


def test_tools_are_shown_as_the_models_own_template_shows_them(frame: Frame):
    shown = frame.decode(frame.chat.first_prompt([QUESTION]))
    assert shown.count('"lookup"') == 1
    assert "lookup" not in frame.decode(frame.plain.first_prompt([QUESTION]))
    assert frame.plain.with_tools(TOOLS) is frame.chat
    assert frame.plain.with_tools(()) is frame.plain


def test_a_user_who_answers_does_not_make_the_history_encode_again(frame: Frame):
    """The library re-renders at each message of a user, for the sake of thoughts; without thoughts nothing is encoded again."""
    prompt = frame.plain.first_prompt([QUESTION])
    sampled = [*frame.encode("c"), *frame.encode("rane"), frame.plain.stop_ids[0]]
    said = frame.plain.reply(sampled, prompt)
    assert frame.encode(said.content) != sampled[:-1]
    grown = frame.plain.next_prompt(prompt, sampled, [QUESTION, said.to_message()], [{"role": "user", "content": "No."}])
    assert grown[: len(prompt) + len(sampled)] == [*prompt, *sampled]


@pytest.mark.parametrize("frame", ["Qwen/Qwen3-8B"], indirect=True)
def test_thoughts_stay_while_tools_answer_and_go_when_a_user_does(frame: Frame):
    prompt = frame.chat.first_prompt([QUESTION])
    sampled = [*frame.encode(f"<think>\nhm\n</think>\n\n{frame.spell('', [('lookup', {})])}"), frame.chat.stop_ids[0]]
    said = frame.chat.reply(sampled, prompt)
    assert (said.thoughts, said.content, len(said.tool_calls)) == ("hm", "", 1)
    history = [QUESTION, said.to_message()]
    answered = frame.chat.next_prompt(prompt, sampled, history, _answers(said, "x"))
    assert answered[: len(prompt) + len(sampled)] == [*prompt, *sampled]
    asked = frame.chat.next_prompt(prompt, sampled, history, [{"role": "user", "content": "And?"}])
    assert "hm" not in frame.decode(asked)
    assert '"name": "lookup"' in frame.decode(asked[len(prompt) :])


@pytest.mark.parametrize("frame", ["Qwen/Qwen3-8B"], indirect=True)
@pytest.mark.parametrize(
    ("call", "error"),
    [
        ('<tool_call>{"name": "lookup", "argu', "not finished"),
        ("<tool_call>lookup()</tool_call>", "not valid JSON"),
        ('<tool_call>{"arguments": {}}</tool_call>', 'no "name"'),
        ('<tool_call>{"name": "lookup", "arguments": 3}</tool_call>', "must be a JSON object"),
        ('<tool_call>{"name": "lookup", "arguments": {"page": "\\ud800"}}</tool_call>', "not valid JSON"),
        (f"<tool_call>{'[' * 3000}{']' * 3000}</tool_call>", "cannot be read (RecursionError)"),
    ],
)
def test_the_librarys_word_on_a_broken_call_becomes_words_for_the_policy(frame: Frame, call: str, error: str):
    said = frame.chat.reply(frame.encode(f"Hm. {call}"), frame.chat.first_prompt([QUESTION]))
    assert error in str(said.tool_calls[0].error)
    assert said.tool_calls[0].raw
    assert said.raw == f"Hm. {call}"
