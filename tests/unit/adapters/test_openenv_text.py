"""Observations of OpenEnv as text, and replies as actions."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.adapters.openenv.text import ActionText, Misfit, ObservationText
from turnwise.adapters.openenv.wire import OpenEnvError

METADATA = {"metadata": {"type": "object"}}


def schema(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {**properties, **METADATA}, "required": required}


ONE_TEXT = schema(["message"], message={"type": "string"})
NUMBER = schema(["move"], move={"type": "integer"})
SEVERAL = schema(["tool", "arguments"], tool={"type": "string"}, arguments={"type": "object"})
TOOL_CALL = schema(["tool_name"], type={"type": "string", "const": "call_tool"}, tool_name={"type": "string"}, arguments={})


@given(st.text())
def test_a_single_field_of_text_is_the_reply_whatever_it_says(reply: str):
    assert ActionText(ONE_TEXT).read(reply) == {"message": reply}


def test_a_single_field_that_is_no_text_is_read_from_the_reply():
    assert ActionText(NUMBER).read(" 3\n") == {"move": 3}
    assert ActionText(NUMBER).read("left") == {"move": "left"}  # the server says what it wants instead
    assert ActionText(NUMBER).form() == "Reply with a whole number for move and nothing else."


def test_the_only_required_field_is_the_reply_and_constants_are_filled_in():
    typed = schema(["code"], kind={"type": "string", "const": "code"}, code={"type": "string"})
    assert ActionText(typed).read("1 + 1") == {"kind": "code", "code": "1 + 1"}
    optional = schema(["code"], code={"type": "string"}, limit={"type": "integer"})
    assert ActionText(optional, {"limit": 3}).read("1 + 1") == {"code": "1 + 1", "limit": 3}


def test_the_only_field_of_text_is_the_reply_where_nothing_is_required():
    both = schema([], text={"type": "string"}, tool_calls={"type": "array"})
    assert ActionText(both).read("hello") == {"text": "hello"}
    nullable = schema([], text={"anyOf": [{"type": "string"}, {"type": "null"}]}, count={"type": "integer"})
    assert ActionText(nullable).read("hello") == {"text": "hello"}


def test_the_configured_field_is_the_reply():
    assert ActionText(SEVERAL, {"tool": "python"}, "arguments").read('{"a": 1}') == {"tool": "python", "arguments": {"a": 1}}


def test_a_call_of_an_mcp_environment_is_read_from_json():
    call = {"tool_name": "add", "arguments": {"a": 1}}
    assert ActionText(TOOL_CALL).read(json.dumps(call)) == {"type": "call_tool", **call}
    with pytest.raises(Misfit, match=r"tool_name \(text\), arguments \(JSON, optional\)"):
        ActionText(TOOL_CALL).read("add")


def test_a_field_that_does_not_exist_is_named_with_those_that_do():
    with pytest.raises(OpenEnvError, match=r"args\.action_field = 'word' is no field of the action; it has tool, arguments"):
        ActionText(SEVERAL, only="word").field()


def test_a_schema_without_a_field_to_fill_is_refused():
    with pytest.raises(OpenEnvError, match="no field that a reply could fill"):
        ActionText(schema([])).field()


@given(
    st.text(alphabet=st.characters(exclude_characters="{}")),
    st.fixed_dictionaries(
        {"tool": st.text(), "arguments": st.dictionaries(st.text(), st.integers() | st.text() | st.lists(st.booleans()))}
    ),
)
def test_several_fields_are_read_from_the_json_in_a_reply(before: str, action: dict[str, Any]):
    assert ActionText(SEVERAL).read(f"{before}{json.dumps(action)} and so on {{}}") == action


def test_json_that_names_none_of_the_fields_is_passed_over():
    reply = 'I know {"nothing": 1} {broken but call {"tool": "add", "arguments": {"a": 1}}'
    assert ActionText(SEVERAL).read(reply) == {"tool": "add", "arguments": {"a": 1}}


@given(st.text(alphabet='{}[]":,ab1 '))
def test_any_reply_is_an_action_or_is_told_the_form(reply: str):
    form = "The reply is no action. Reply with one JSON object with the fields tool (text), arguments (JSON)."
    try:
        said: object = ActionText(SEVERAL).read(reply)
    except Misfit as misfit:
        said = str(misfit)
    assert said == form if isinstance(said, str) else {"tool", "arguments"} & set(said)


def test_what_validation_found_is_said_to_the_policy():
    errors = [{"loc": ["move"], "msg": "Input should be a valid integer", "type": "int_parsing"}]
    assert ActionText(NUMBER).fault(errors) == (
        "The reply is no action that the environment takes: move: Input should be a valid integer. "
        "Reply with a whole number for move and nothing else."
    )


@pytest.mark.parametrize("errors", [[], [{"loc": ["score"], "msg": "of an observation", "type": "missing"}], ["odd"], [{}]])
def test_validation_that_is_not_about_the_action_is_no_fault_of_the_policy(errors: list[Any]):
    assert ActionText(NUMBER).fault(errors) is None


def observation(**properties: Any) -> dict[str, Any]:
    common = {"done": {"type": "boolean"}, "reward": {}, "metadata": {"type": "object"}}
    return {"type": "object", "properties": {**properties, **common}}


ECHO = observation(said={"type": "string"}, length={"type": "integer"})
BOARD = observation(board={"type": "array"}, hint={"type": "string"}, note={"anyOf": [{"type": "string"}, {"type": "null"}]})


def test_the_only_field_of_text_is_the_observation():
    assert ObservationText(ECHO).read({"observation": {"said": "hi", "length": 2, "metadata": {"a": 1}}}) == "hi"


def test_fields_stand_on_lines_with_their_names_where_there_is_not_one_of_text():
    result = {"observation": {"board": [[0, 1]], "hint": "corner", "note": None, "metadata": {}}, "reward": 1.0}
    assert ObservationText(BOARD).read(result) == "board: [[0, 1]]\nhint: corner"


def test_a_template_takes_fields_their_parts_and_the_reward():
    text = ObservationText(BOARD, "{board[0][1]}, {hint}: {reward}")
    assert text.read({"observation": {"board": [[0, 1]], "hint": "corner"}, "reward": 0.5}) == "1, corner: 0.5"


@pytest.mark.parametrize("template", ["{bord}", "{board[9]}", "{hint.colour}", "{", "{0}"])
def test_a_template_that_cannot_be_filled_names_the_fields_there_are(template: str):
    with pytest.raises(OpenEnvError, match=r"args\.observation = .* cannot be filled in .*; the observation has board, done, "):
        ObservationText(BOARD, template).read({"observation": {"board": [], "hint": "x"}, "reward": 0})


def test_an_answer_without_an_observation_is_an_error():
    with pytest.raises(OpenEnvError, match="observation is 'text', not an object"):
        ObservationText(ECHO).read({"observation": "text"})
