"""Actions of agents: one block, one command."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.envs.mlgym.protocol import FormatError, Kind, Refused, parse_action


def block(text: str, *, said: str = "I look first.", language: str = "") -> str:
    return f"{said}\n```{language}\n{text}\n```\n"


@pytest.mark.parametrize(
    ("action", "kind", "name"),
    [
        (block("ls -l data"), Kind.SHELL, "ls"),
        (block("cat > a.py <<'END'\nprint(1)\nEND", language="bash"), Kind.SHELL, "cat"),
        (block("validate"), Kind.VALIDATE, "validate"),
        (block("  submit  "), Kind.SUBMIT, "submit"),
        (block("exit_forfeit"), Kind.FORFEIT, "exit_forfeit"),
        (block("open data/train.csv 20"), Kind.EDITOR, "open"),
        (block("python train.py"), Kind.SHELL, "python"),
        (block("echo validate"), Kind.SHELL, "echo"),  # the word in an output or an argument is no command
    ],
)
def test_a_command_is_what_its_first_word_says(action: str, kind: Kind, name: str):
    command = parse_action(action)
    assert (command.kind, command.name) == (kind, name)


def test_edits_have_the_lines_between_their_first_and_their_end_mark():
    command = parse_action(block("edit 3:4\ndef f():\n    return '```'\n\nend_of_edit"))
    assert (command.arguments, command.body) == (("3:4",), "def f():\n    return '```'\n\n")
    assert parse_action(block("insert 0\nend_of_insert")).body == ""


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("I would list the files.", "no block"),
        ("```ls```", "no block"),
        (block("ls") + block("pwd"), "2 blocks"),
        (block("   "), "is empty"),
    ],
)
def test_no_single_block_is_an_error_of_form(action: str, words: str):
    with pytest.raises(FormatError, match=words):
        parse_action(action)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("submit now", "takes no arguments"),
        ("validate\nls", "stands alone"),
        ("vim a.py", "nobody can answer"),
        ("python", "waits for input"),
        ("bash", "waits for input"),
        ("edit 1:2\nx = 1", "end_of_edit"),
        ("insert 3", "end_of_insert"),
        ("open a.py\nls", "is one line"),
        ("open 'a.py", "cannot be read"),
    ],
)
def test_commands_that_cannot_end_well_are_refused_in_words(command: str, words: str):
    with pytest.raises(Refused, match=words):
        parse_action(block(command))


@pytest.mark.parametrize(("text", "trains"), [("python a.py", True), ("cd x && torchrun a.py", True), ("ls pythonic", False)])
def test_training_commands_get_more_time(text: str, trains: bool):
    assert parse_action(block(text)).trains is trains


@given(st.text(max_size=200))
def test_whatever_is_said_is_a_command_or_an_answer_in_words(action: str):
    for text in (action, block(action)):
        with suppress(FormatError, Refused):
            assert parse_action(text).text
