"""Calls in replies: what is sound is read, what is not keeps its text and a reason, and nothing that is sampled raises."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.envs.messages import AssistantMessage, ToolCall
from turnwise.orchestrator.tool_formats import MAX_DEPTH, ONE_CALL, JsonCalls, checked_call, first_only, format_of

HERMES, BARE, LISTED = JsonCalls(), JsonCalls("", "", "parameters"), JsonCalls("[CALLS]", "")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["</tool_call>", "<tool_call>", '"}', "[CALLS]"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=4,
)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
CALLS = st.lists(st.tuples(NAMES, st.dictionaries(TEXT, JSON, max_size=3)), min_size=1, max_size=3)


def _read(text: str, form: JsonCalls = HERMES, **options: bool) -> tuple[str, list[ToolCall]]:
    message = form.read(text, **options)
    return message.content, list(message.tool_calls)


def _hermes(name: str, arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"


@given(CALLS)
@settings(max_examples=40)
def test_hermes_calls_are_read_whatever_their_arguments_hold(calls: list[tuple[str, dict[str, Any]]]):
    content, found = _read("So: " + "\n".join(_hermes(*call) for call in calls) + " done")
    assert [(call.name, call.arguments, call.error) for call in found] == [(*call, None) for call in calls]
    assert content.split() == ["So:", "done"]


@given(CALLS, st.sampled_from(["; ", "\n", ", ", ""]), st.sampled_from(["", "<|python_tag|>", "Well. <|python_tag|>"]))
@settings(max_examples=40)
def test_bare_calls_are_read_one_after_another(calls: list[tuple[str, dict[str, Any]]], between: str, before: str):
    text = before + between.join(json.dumps({"name": name, "parameters": arguments}) for name, arguments in calls)
    content, found = _read(text, BARE)
    assert [(call.name, call.arguments) for call in found] == calls
    assert content == ("Well." if "Well" in before else "")


@given(CALLS)
@settings(max_examples=40)
def test_calls_in_a_list_are_read(calls: list[tuple[str, dict[str, Any]]]):
    text = "[CALLS]" + json.dumps([{"name": name, "arguments": arguments} for name, arguments in calls])
    assert [(call.name, call.arguments) for call in _read(text, LISTED)[1]] == calls


@given(CALLS)
@settings(max_examples=40)
def test_calls_reach_the_environment_as_they_were_read(calls: list[tuple[str, dict[str, Any]]]):
    message = HERMES.read("".join(_hermes(*call) for call in calls)).numbered(())
    assert AssistantMessage.from_action(message.to_action()).tool_calls == message.tool_calls


MARKS = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<|python_tag|>", "[CALLS]"]
JSONISH = [
    "{",
    "}",
    "[",
    '"name"',
    ":",
    '"a"',
    "NaN",
    '"\\ud800"',
    "1e999",
    "9" * 5000,
    "[" * 3000,
    '{"name": "f", "arguments": {"a": 1}}',
]
PIECES = st.sampled_from([*MARKS, *JSONISH, "\n", ","])


@given(st.lists(PIECES | st.text(max_size=4), max_size=12).map("".join), st.booleans(), st.sampled_from([HERMES, BARE, LISTED]))
def test_no_text_makes_reading_raise_and_no_call_is_lost_on_the_way(text: str, thinking: bool, form: JsonCalls):
    message = form.read(text, thinking=thinking).numbered(())
    assert len({call.id for call in message.tool_calls}) == len(message.tool_calls)
    assert all((call.error is None) == (call.name is not None and call.arguments is not None) for call in message.tool_calls)
    sent = AssistantMessage(content=message.content, tool_calls=message.tool_calls)
    assert AssistantMessage.from_action(message.to_action()) == sent
    assert message.tool_calls or message.content == text


@pytest.mark.parametrize(
    ("text", "raw", "reason"),
    [
        ('<tool_call>{"name": "f", "argu', '{"name": "f", "argu', "not finished: </tool_call> is missing"),
        ('<tool_call>{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {}}', "not finished"),
        ("<tool_call>f(1)</tool_call>", "f(1)", "not valid JSON"),
        ('<tool_call>{"name": "f"} and more</tool_call>', '{"name": "f"} and more', "not valid JSON"),
        (
            '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
            '{"name": "f", "arguments": {"x": NaN}}',
            "not valid JSON",
        ),
        ('<tool_call>{"arguments": {}}</tool_call>', '{"arguments": {}}', 'no "name"'),
        ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', '{"name": 3, "arguments": {}}', 'no "name"'),
        ('<tool_call>{"name": "f", "arguments": "x"}</tool_call>', '{"name": "f", "arguments": "x"}', "must be a JSON object"),
        ("<tool_call>7</tool_call>", "7", 'a JSON object with "name" and "arguments"'),
        ("<tool_call></tool_call>", "", "not valid JSON"),
    ],
)
def test_a_call_that_cannot_be_read_keeps_its_text_and_a_reason(text: str, raw: str, reason: str):
    _, (call,) = _read(f"Hm. {text}")
    assert call.raw == raw
    assert reason in str(call.error)
    assert call.arguments is None


def test_a_broken_call_does_not_hide_the_sound_one_after_it():
    content, (broken, sound) = _read('<tool_call>{"name": <tool_call>{"name": "f", "arguments": {}}</tool_call>')
    assert "not finished" in str(broken.error)
    assert (content, sound.name, sound.arguments) == ("", "f", {})


@pytest.mark.parametrize(
    ("text", "error"),
    [('{"name": "f"', "not valid JSON"), ('{"name": "f", "parameters": 3}', "object"), ("<|python_tag|>f.call()", "JSON")],
)
def test_a_broken_bare_call_is_told_from_an_answer(text: str, error: str):
    assert error in str(_read(text, BARE)[1][0].error)


@pytest.mark.parametrize("text", ["Fine.", '{"answer": 42}', "", 'I would call {"name": "f"}'])
def test_a_bare_reply_that_calls_nothing_is_content(text: str):
    assert _read(text, BARE) == (text, [])


def test_text_after_bare_calls_is_content():
    assert _read('{"name": "f", "parameters": {}} as you see', BARE)[0] == "as you see"


def test_calls_drafted_in_thoughts_are_not_made():
    thought, call = f"<think>maybe {_hermes('f', {})}</think>", _hermes("g", {})
    assert [c.name for c in _read(thought + call)[1]] == ["g"]
    assert _read(f"maybe {_hermes('f', {})}</think>{call}", thinking=True)[1][0].name == "g"
    assert _read(thought.removesuffix("</think>")) == (thought.removesuffix("</think>"), [])


def test_missing_arguments_are_none_and_parameters_are_understood():
    assert _read('<tool_call>{"name": "f"}</tool_call>')[1][0].arguments == {}
    assert _read('<tool_call>{"name": "f", "parameters": {"x": 1}}</tool_call>')[1][0].arguments == {"x": 1}


def test_arguments_nested_too_deep_for_what_comes_after_are_refused():
    deep: Any = {}
    for _ in range(MAX_DEPTH - 1):
        deep = {"a": deep}
    assert checked_call("f", deep, "").error is None
    assert "nested deeper" in str(checked_call("f", {"a": {"a": deep}}, "").error)


def test_in_a_format_of_one_call_the_further_ones_carry_the_reason():
    message = first_only(HERMES.read(_hermes("f", {}) + _hermes("g", {}) + "<tool_call>x</tool_call>"))
    assert [call.error for call in message.tool_calls][:2] == [None, ONE_CALL]
    assert "JSON" in str(message.tool_calls[2].error)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ('\n<tool_call>\n{"name": "f", "arguments": {"a": "b"}}\n</tool_call>', HERMES),
        ('{"name": "f", "parameters": {"a": "b"}}', BARE),
        ('[CALLS] [{"name": "f", "arguments": {"a": "b"}, "id": "1"}]', LISTED),
        ('Action: {"name": "f", "args": {"a": "b"}}', JsonCalls("Action:", "", "args")),
        ('```json\n[{"tool_name": "f", "parameters": {"a": "b"}}]```', JsonCalls("```json", "```", "parameters", "tool_name")),
        ("<function=f><parameter=a>b</parameter></function>", None),
        ('{"name": "other", "arguments": {"a": "b"}}', None),
    ],
)
def test_a_format_is_known_from_one_rendered_call(written: str, expected: JsonCalls | None):
    assert format_of(written, "f", {"a": "b"}) == expected


def test_ids_that_a_model_gives_are_kept_and_others_are_numbered():
    calls = [ToolCall(id="functions.f:0", name="f"), ToolCall(id=""), ToolCall(id="functions.f:0")]
    first = AssistantMessage(content="", tool_calls=tuple(calls)).numbered(())
    assert [call.id for call in first.tool_calls] == ["functions.f:0", "call00000", "call00001"]
    again = first.numbered({call.id for call in first.tool_calls})
    assert [call.id for call in again.tool_calls] == ["call00003", "call00004", "call00005"]
