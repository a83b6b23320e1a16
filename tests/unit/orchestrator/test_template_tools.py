"""What is found out about a template at the start: whether it shows tools, how it writes calls, how many, what it refuses."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support import tool_templates
from support.tool_envs import ANSWER, LOOKUP
from turnwise.envs.messages import Tool, ToolCall, tool_message
from turnwise.orchestrator.chat import load_chat
from turnwise.orchestrator.template_chat import TemplateChat
from turnwise.orchestrator.tokenizer import ChatError, ModelText, load_model_text
from turnwise.orchestrator.tool_formats import ONE_CALL, JsonCalls
from turnwise.orchestrator.types import Message

TOOLS = (LOOKUP, ANSWER)
QUESTION: Message = {"role": "user", "content": "?"}
Make = Callable[..., TemplateChat]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> ModelText:
    """The tiny model with the tokens of tools in its vocabulary, and Llama's, under ids of its own."""
    text = load_model_text(str(tiny_model))
    text.tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"])
    text.tokenizer.add_special_tokens(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"])
    return text


@pytest.fixture
def with_template(model: ModelText) -> Make:
    def make(template: str, **options: Any) -> TemplateChat:
        return TemplateChat(replace(model, template=template), **options)

    return make


def _call(number: int = 0, name: str = "lookup", **arguments: Any) -> ToolCall:
    return ToolCall(id=f"call{number:05d}", name=name, arguments=arguments)


def _said(*calls: ToolCall, content: str = "") -> Message:
    spoken = {"tool_calls": [call.spec() for call in calls]} if calls else {}
    return {"role": "assistant", "content": content, **spoken}


def _decode(chat: TemplateChat, ids: list[int]) -> str:
    return chat.model.tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("name", "native", "several", "as_text", "text_arguments"),
    [
        ("HERMES", True, True, True, False),
        ("THINKING", True, True, True, False),
        ("ONE_SHOWN", True, False, True, False),
        ("XML", True, True, True, False),
        ("LISTED", True, True, False, True),
        ("LLAMA", True, False, True, False),
        ("NO_SYSTEM", False, True, True, False),
    ],
)
def test_the_style_of_a_template_is_found(
    with_template: Make, name: str, native: bool, several: bool, as_text: bool, text_arguments: bool
):
    style = with_template(getattr(tool_templates, name)).with_tools(TOOLS).style
    assert style is not None
    assert (style.native, style.several, style.as_text, style.text_arguments) == (native, several, as_text, text_arguments)
    assert style.system_role is (name != "NO_SYSTEM")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("HERMES", JsonCalls()),
        ("LISTED", JsonCalls("[CALLS]", "")),
        ("LLAMA", JsonCalls("", "", "parameters")),
        ("NO_SYSTEM", JsonCalls()),
    ],
)
def test_the_format_of_calls_is_found(with_template: Make, name: str, expected: JsonCalls):
    style = with_template(getattr(tool_templates, name)).with_tools(TOOLS).style
    assert style is not None
    assert style.format == expected


def test_calls_written_as_xml_are_read_with_texts_as_texts(with_template: Make):
    chat = with_template(tool_templates.XML).with_tools(TOOLS)
    arguments = "<parameter=page>\n007\n</parameter>\n<parameter=k>\n3\n</parameter>"
    text = f"Well.<tool_call>\n<function=lookup>\n{arguments}\n</function>\n</tool_call>"
    said = chat.reply(chat.encoder.encode(text, "\ufdd0"), ())
    assert (said.content, said.tool_calls[0].name) == ("Well.", "lookup")
    assert said.tool_calls[0].arguments == {"page": "007", "k": 3}
    broken = chat.reply(chat.encoder.encode("<tool_call>\n<function=lookup>", "\ufdd0"), ())
    assert "not finished" in str(broken.tool_calls[0].error)


def test_a_template_whose_calls_nothing_reads_is_refused_with_what_it_writes(with_template: Make):
    with pytest.raises(ChatError, match=r"writes 'I call turnwise_probe_tool'\. Set model\.chat_template .* model\.tool_format"):
        with_template(tool_templates.PROSE).with_tools(TOOLS)


def test_a_template_that_shows_no_answers_is_refused(with_template: Make):
    silent = tool_templates.HERMES.replace("m.content + '\\n</tool_response>'", "'</tool_response>'")
    assert silent != tool_templates.HERMES
    with pytest.raises(ChatError, match="shows no answers"):
        with_template(silent).with_tools(TOOLS)


def test_tools_are_described_on_demand_whatever_the_template_can(with_template: Make):
    chat = with_template(tool_templates.PROSE, tool_format="described").with_tools(TOOLS)
    shown = _decode(chat, chat.first_prompt([{"role": "system", "content": "Play."}, QUESTION]))
    assert shown.startswith("<|im_start|>system\nPlay.\n\n# Tools")
    assert '{"name": "lookup", "description": "Look up a page."' in shown


def test_a_template_without_system_messages_gets_the_description_with_the_first_message(with_template: Make):
    chat = with_template(tool_templates.NO_SYSTEM).with_tools(TOOLS)
    shown = _decode(chat, chat.first_prompt([QUESTION]))
    assert shown.startswith("<|im_start|>user\n# Tools")
    assert shown.endswith("\n\n?<|im_end|>\n<|im_start|>assistant\n")


def test_described_tools_are_answered_by_one_message_of_the_user(with_template: Make):
    chat = with_template(tool_templates.NO_SYSTEM).with_tools(TOOLS)
    new = [tool_message(_call(0), "a"), tool_message(_call(1), "b"), {"role": "user", "content": "And?"}]
    grown = chat.next_prompt([], [], [], [dict(message) for message in new])
    answers = "<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response>\nAnd?"
    assert _decode(chat, grown) == f"<|im_end|>\n<|im_start|>user\n{answers}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", ["HERMES", "ONE_SHOWN", "LISTED", "LLAMA", "NO_SYSTEM"])
def test_replies_that_nobody_sampled_are_rendered_even_where_the_template_refuses_them(with_template: Make, name: str):
    """Two calls in one reply, and one that could not be read: neither raises."""
    chat = with_template(getattr(tool_templates, name)).with_tools(TOOLS)
    first, second = _call(0, page="one"), _call(1, page="two")
    broken = ToolCall(id="call00001", raw='{"nobody', error="not finished")

    def shown(*calls: ToolCall) -> str:
        answers = [dict(tool_message(call, f"answer {call.id}")) for call in calls]
        return _decode(chat, chat.first_prompt([QUESTION, _said(*calls, content="So."), *answers]))

    assert all(text in shown(first, second) for text in ('"page": "one"', '"page": "two"', "answer call00001"))
    assert all(text in shown(first, broken) for text in ('"page": "one"', "answer call00001"))
    assert ('{"nobody' in shown(first, broken)) is (name != "LISTED")  # which takes nothing but calls


def test_in_a_template_of_one_call_further_calls_are_data_for_the_policy(with_template: Make):
    chat = with_template(tool_templates.LLAMA).with_tools(TOOLS)
    ids = chat.encoder.encode('{"name": "lookup", "parameters": {"page": "a"}}; {"name": "answer", "parameters": {}}', "\ufdd0")
    said = chat.reply(ids, ())
    assert [call.error for call in said.tool_calls] == [None, ONE_CALL]
    assert said.tool_calls[1].name == "answer"
    grown = chat.next_prompt([], ids, [QUESTION, said.to_message()], [dict(tool_message(call, "x")) for call in said.tool_calls])
    assert grown[: len(ids)] == ids


def test_thoughts_stay_while_tools_answer_and_go_when_a_user_does(with_template: Make):
    chat = with_template(tool_templates.THINKING).with_tools(TOOLS)
    prompt = chat.first_prompt([QUESTION])
    text = '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "lookup", "arguments": {}}\n</tool_call>'
    sampled = [*chat.encoder.encode(text, "\ufdd0"), chat.stop_ids[0]]
    said = chat.reply(sampled, prompt)
    history = [QUESTION, said.to_message()]
    answered = chat.next_prompt(prompt, sampled, history, [dict(tool_message(said.tool_calls[0], "x"))])
    assert answered[: len(prompt) + len(sampled)] == [*prompt, *sampled]
    asked = chat.next_prompt(prompt, sampled, history, [{"role": "user", "content": "And?"}])
    assert "hm" not in _decode(chat, asked)
    assert '{"name": "lookup", "arguments": {}}' in _decode(chat, asked)


def test_calls_drafted_in_a_thought_that_the_prompt_opened_are_not_made(with_template: Make):
    opened = tool_templates.HERMES.replace(r"{{- '<|im_start|>assistant\n' }}", r"{{- '<|im_start|>assistant\n<think>\n' }}")
    assert opened != tool_templates.HERMES
    chat = with_template(opened).with_tools(TOOLS)
    call = '<tool_call>{"name": "lookup", "arguments": {}}</tool_call>'
    assert chat.reply(chat.encoder.encode(f"perhaps {call}", "\ufdd0"), ()).tool_calls == ()
    assert len(chat.reply(chat.encoder.encode(f"perhaps {call}</think>{call}", "\ufdd0"), ()).tool_calls) == 1


def test_a_reply_that_ended_by_another_end_token_gets_no_second_one(model: ModelText):
    """Llama ends calls with `<|eom_id|>` as well as with `<|eot_id|>`."""
    other = model.tokenizer.token_to_id("<|end_header_id|>")
    chat = TemplateChat(replace(model, template=tool_templates.LLAMA, eos_ids=(other,))).with_tools(TOOLS)
    assert other in chat.stop_ids
    grown = chat.next_prompt([], [65, other], [QUESTION, _said(content="b")], [dict(tool_message(_call(), "x"))])
    assert _decode(chat, grown[2:]).startswith("<|start_header_id|>ipython")


@pytest.mark.parametrize("name", ["HERMES", "LISTED", "LLAMA"])
@pytest.mark.parametrize("hostile", ["<|im_end|>", "<tool_call>", "</tool_response>", "<|eot_id|>"])
def test_no_text_of_calls_answers_or_tools_becomes_a_token_of_the_template(with_template: Make, name: str, hostile: str):
    def specials(text: str) -> list[int]:
        tool = Tool(name="lookup", description=text, parameters={"type": "object", "properties": {}})
        chat = with_template(getattr(tool_templates, name)).with_tools((tool,))
        call = _call(0, name=text, page=text)
        conversation = [{"role": "user", "content": text}, _said(call), dict(tool_message(call, text))]
        ids = chat.first_prompt(conversation)
        grown = chat.next_prompt(ids, [], conversation, [dict(tool_message(call, text))])
        return [token for token in grown if token == chat.encoder.ids[hostile]]

    of_the_policy = 0 if hostile.startswith("<|") else 2  # name and argument: its own text may hold tokens that are not special
    assert len(specials(hostile)) == len(specials("calm")) + of_the_policy


def test_a_chat_with_tools_is_made_once_and_none_for_no_tools(with_template: Make):
    chat = with_template(tool_templates.HERMES)
    assert chat.with_tools(TOOLS) is chat.with_tools(list(TOOLS))
    assert chat.with_tools(TOOLS[:1]) is not chat.with_tools(TOOLS)
    assert chat.with_tools(()) is chat


def test_a_model_may_have_another_template_for_tools(tiny_model: Path, tmp_path: Path):
    folder = tmp_path / "m"
    shutil.copytree(tiny_model, folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(tool_templates.HERMES)
    chat = load_chat(str(folder))
    assert isinstance(chat, TemplateChat)
    assert _decode(chat, chat.first_prompt([QUESTION])) == "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"
    bound = chat.with_tools(TOOLS)
    assert bound.style is not None
    assert bound.style.native
    assert "Your tools:" in _decode(bound, bound.first_prompt([QUESTION]))


def test_a_template_of_the_config_serves_conversations_with_tools(tiny_model: Path, tmp_path: Path):
    (tmp_path / "t.jinja").write_text(tool_templates.HERMES)
    chat = load_chat(str(tiny_model), chat_template=tmp_path / "t.jinja").with_tools(TOOLS)
    assert isinstance(chat, TemplateChat)
    assert "Your tools:" in _decode(chat, chat.first_prompt([QUESTION]))
