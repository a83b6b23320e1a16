"""Worked examples show what an agent may do, as the environment would show it."""

import pytest

from turnwise.envs.mlgym import MLGym
from turnwise.envs.mlgym.examples import EXAMPLES
from turnwise.envs.mlgym.protocol import Kind, parse_action


@pytest.mark.parametrize("count", range(len(EXAMPLES) + 1))
def test_user_and_assistant_take_turns_and_the_last_word_is_the_assistants(count: int):
    messages = MLGym(shown_examples=count).examples
    assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
    assert len(messages) == 2 * sum(len(example.turns) for example in EXAMPLES[:count])


def test_every_shown_reply_is_a_command_and_each_episode_ends_with_its_submission():
    replies = [m["content"] for m in MLGym(shown_examples=3).examples if m["role"] == "assistant"]
    kinds = [parse_action(reply).kind for reply in replies]
    assert kinds.count(Kind.SUBMIT) == kinds.count(Kind.VALIDATE) == 3
    assert kinds[-1] is Kind.SUBMIT


def test_replies_left_count_down_as_in_an_episode():
    observations = [m["content"] for m in MLGym(shown_examples=1).examples if m["role"] == "user"]
    assert "You have 3 replies." in observations[0]
    assert [text.rpartition("(")[2].split(";")[0] for text in observations[1:]] == ["2 of 3 replies left", "1 of 3 replies left"]


@pytest.mark.parametrize("count", [-1, 4])
def test_more_examples_than_there_are_are_refused(count: int):
    with pytest.raises(ValueError, match=f"shown_examples = {count} must be from 0 to 3"):
        MLGym(shown_examples=count)
