"""A person plays."""

import io
from collections.abc import Sequence

import pytest

from turnwise.envs import Step, Task, TextEnv, make
from turnwise.envs.play import choose_task, play


def session(text: str, env_id: str = "wordle", **args: object) -> tuple[float, str]:
    output = io.StringIO()
    total = play(make(env_id, args), input=io.StringIO(text), output=output, seed=0)
    return total, output.getvalue()


def test_a_game_is_played_from_piped_lines() -> None:
    total, shown = session("crane\nfrost\n", answers=["frost"])
    assert total == pytest.approx(2 * 0.4 / 6 + 0.5 / 6 + 0.4 + 2.12)
    for text in (
        "You play Wordle",
        "Try 1 of 6.",
        "> crane",
        "crane -> -G---",
        "Correct: frost.",
        "guesses_to_win 2",
    ):
        assert text in shown
    assert f"total reward {total:+.3f}" in shown


def test_the_end_of_input_ends_the_episode() -> None:
    total, shown = session("crane\n", answers=["frost"])
    assert total == pytest.approx(0.4 / 6 + 0.08)
    assert "end of input" in shown
    assert "win_rate 0" in shown


def test_what_looks_like_markup_is_shown_as_it_is() -> None:
    _, shown = session("[bold]crane[/nothing]\n", answers=["frost"], templates={"opening": "[red]{length}[/blue]"})
    assert "[red]5[/blue]" in shown
    assert "> [bold]crane[/nothing]" in shown


def test_any_environment_can_be_played_and_the_task_fixed() -> None:
    row = {"id": "x", "question": "6*7?", "answer": "42"}
    output = io.StringIO()
    assert play(make("gsm8k"), input=io.StringIO("#### 42\n"), output=output, task=row) == 1.0
    assert "6*7? Let's think step by step" in output.getvalue()
    assert "acc 1" in output.getvalue()


class TwoLines(TextEnv):
    """Wants replies that end with a full stop."""

    max_turns = 1

    def tasks(self, split: str) -> Sequence[Task]:
        return [{"id": "a/0"}, {"id": "b/0"}, {"id": "b/1"}]

    def begin(self, task: Task) -> str:
        return f"task {task['id']}"

    def typed(self, text: str) -> str | None:
        return f"<{text}>" if text.endswith(".") else None

    def step(self, action: str) -> Step:
        self.turn += 1
        return self.end(f"heard {action}")


def test_an_environment_says_how_many_lines_make_a_reply():
    output = io.StringIO()
    play(TwoLines(), input=io.StringIO("one\ntwo.\n"), output=output)
    assert "heard <one\ntwo.>" in output.getvalue()


def test_a_task_is_chosen_by_its_id_or_the_beginning_of_it():
    env = TwoLines()
    assert choose_task(env, "b/1")["id"] == "b/1"
    assert choose_task(env, "b")["id"] == "b/0"
    with pytest.raises(ValueError, match="begins with 'c'; there are a/0, b/0, b/1"):
        choose_task(env, "c")
