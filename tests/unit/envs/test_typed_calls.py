"""Calls as a person types them, and playing an environment with tools."""

import io
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.musique_rows import bridge_row
from turnwise.envs.messages import AssistantMessage, Tool
from turnwise.envs.musique import MuSiQue
from turnwise.envs.play import play
from turnwise.envs.typed_calls import read_typed, signature

TOOLS = MuSiQue.tools


def calls(line: str) -> list[tuple[str | None, dict[str, Any] | None]]:
    return [(call.name, call.arguments) for call in read_typed(line, TOOLS).tool_calls]


@pytest.mark.parametrize(
    ("line", "read"),
    [
        ("search Tolvar Bridge, architect", [("search", {"query": "Tolvar Bridge, architect"})]),
        ("  search  (the) Olm ", [("search", {"query": "(the) Olm"})]),
        ("read 3", [("read", {"paragraph": "3"})]),
        ("search", [("search", {})]),
        ('search(query="Olm (river)", k=2)', [("search", {"query": "Olm (river)", "k": 2})]),
        ("search('Olm', 2)", [("search", {"query": "Olm", "k": 2})]),
        ("answer('Norway', paragraphs=[1, 3])", [("answer", {"text": "Norway", "paragraphs": [1, 3]})]),
        ('{"name": "read", "arguments": {"paragraph": 3}}', [("read", {"paragraph": 3})]),
        ('[{"name": "read", "arguments": {"paragraph": 3}}, {"name": "x"}]', [("read", {"paragraph": 3}), ("x", {})]),
        ("lookup(3)", [("lookup", {})]),
    ],
)
def test_calls_are_typed_in_three_ways(line: str, read: list[tuple[str, dict[str, Any]]]) -> None:
    assert calls(line) == read


@pytest.mark.parametrize("line", ["", "hello there", "searching for Olm", "Norway (the kingdom)", "I think search(x) is right"])
def test_what_is_no_call_is_said(line: str) -> None:
    assert read_typed(line, TOOLS) == AssistantMessage(content=line)


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("search(query=Olm)", "the value of query is not a number, a list or a text in quotes"),
        ("search(query=__import__('os'))", "the value of query is not a number, a list or a text in quotes"),
        ("search(", "'(' was never closed"),
        ("search('a') + search('b')", "it is not a single call"),
        ("search(1, 2, 3)", "it has 3 values, and search takes 2"),
        ('{"name":', "Expecting value: line 1 column 9 (char 8)"),
        ("[3]", "it has no name and arguments"),
        ('{"name": "search", "arguments": 3}', "it has no name and arguments"),
    ],
)
def test_a_broken_call_says_why(line: str, error: str) -> None:
    (call,) = read_typed(line, TOOLS).tool_calls
    assert (call.arguments, call.error, call.raw) == (None, error, line.strip())


@given(line=st.text(max_size=40) | st.text(alphabet="search(){}[]\"'=,0 ", max_size=20).map(lambda text: f"search({text}"))
@settings(deadline=None)
def test_any_line_can_be_typed(line: str) -> None:
    message = read_typed(line, TOOLS)
    assert message.content == line or message.tool_calls
    assert len({call.id for call in message.tool_calls}) == len(message.tool_calls)


def test_signatures_are_short() -> None:
    assert [signature(tool) for tool in TOOLS] == [
        "search(query: string, k?: integer)",
        "read(paragraph: integer | string)",
        "answer(text: string, paragraphs?: list of integer)",
    ]
    odd = Tool(name="odd", description="", parameters={"properties": {"way": {"enum": ["up", 2]}, "x": {}}, "required": ["way"]})
    assert signature(odd) == 'odd(way: "up" | 2, x?: any)'


def test_a_person_searches_and_answers() -> None:
    output = io.StringIO()
    lines = "search Tolvar\nsaerch(1)\nsearch(\nhm\nanswer(text='Norway', paragraphs=[1, 3])\n"
    env = MuSiQue(train=[bridge_row()], support_reward=0.5, format_reward=0.0, shown_examples=1)
    total = play(env, input=io.StringIO(lines), output=output, task=bridge_row())
    shown = " ".join(output.getvalue().split())
    assert total == pytest.approx(0.25 - 0.1 + 1.25)
    for text in (
        'assistant: {"name": "search", "arguments": {"query": "Ilse Marn born"}}',
        "search(query: string, k?: integer)",
        "Find paragraphs by the words of a query.",
        "Type `tool words`",
        "[1] Tolvar Bridge: Tolvar Bridge crosses the Olm.",
        "Error: there is no tool 'saerch'. Did you mean 'search'?",
        "Error: '(' was never closed. The form is",
        "The reply calls no tool. Call one of: search, read, answer.",
        "answer_f1 +1.000, citation +0.250",
        "Correct.",
    ):
        assert text in shown
