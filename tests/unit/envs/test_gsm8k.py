"""GSM8K: scoring, tasks, reward."""

from pathlib import Path

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.envs import make
from turnwise.envs.gsm8k import GSM8K
from turnwise.envs.gsm8k.scoring import TAIL, is_correct, last_number, marked_answer, true_answer

ROW = {"id": "one", "question": "What is 6 times 7?", "answer": "6*7 = <<6*7=42>>42\n#### 42"}


@pytest.mark.parametrize(
    ("solution", "strict", "flexible"),
    [
        ("6*7 = 42\n#### 42", "42", "42"),
        ("#### 41\nNo: #### 42", "42", "42"),
        ("It is 42.", None, "42"),
        ("#### 1,234", "1234", "1234"),
        ("#### -7 degrees", "-7", "-7"),
        ("#### 42.", "42.", "42"),  # the field compares strings: the full stop costs the point
        ("#### $42", None, "42"),
        ("####42", None, "42"),
        ("The answer is $1,234.50, I think", None, "1234.50"),
        ("#### 42 and 3 are left over", "42", "3"),
        ("I do not know", None, None),
        ("", None, None),
        ("#### 42" + "x" * (TAIL - 7), "42", "42"),
        ("#### 42" + "x" * (TAIL - 6), None, "42"),
        ("#### 42" + "x" * TAIL, None, None),
    ],
)
def test_strict_and_flexible_reading(solution: str, strict: str | None, flexible: str | None) -> None:
    assert (marked_answer(solution), last_number(solution)) == (strict, flexible)


@given(number=st.integers(-(10**9), 10**9), before=st.text(max_size=50))
@settings(deadline=None)
def test_every_whole_number_is_read_back_with_and_without_commas(number: int, before: str) -> None:
    truth = true_answer(f"some steps\n#### {number:,}")
    assert truth == str(number)
    for solution in (f"{before}\n#### {number}", f"{before}\n#### {number:,}"):
        assert is_correct(solution, truth, scoring="strict")
        assert is_correct(solution, truth, scoring="flexible")
        assert not is_correct(f"{solution}1", truth, scoring="strict")


def test_check_env_finds_nothing_to_warn_of(data_dir: Path) -> None:
    check_env(gymnasium.make("turnwise/gsm8k").unwrapped)
    check_env(gymnasium.make("turnwise/gsm8k", scoring="flexible", format_reward=0.1).unwrapped)


def test_every_row_at_hand_has_an_answer_that_its_own_solution_scores(data_dir: Path) -> None:
    env = make("gsm8k")
    for split in ("train", "validation"):
        rows = env.tasks(split)
        assert len({row["id"] for row in rows}) == len(rows) >= 4
        assert all(is_correct(row["answer"], true_answer(row["answer"]), scoring="strict") for row in rows)
    if (len(env.tasks("train")), len(env.tasks("validation"))) == (7473, 1319):
        commas = [sum("," in row["answer"].split("#### ")[1] for row in env.tasks(split)) for split in ("train", "validation")]
        assert commas == [79, 14]


def test_the_prompt_is_the_fields(small_data: Path) -> None:
    observation, info = GSM8K().reset(options={"task": ROW})
    assert observation == 'What is 6 times 7? Let\'s think step by step and output the final answer after "####".'
    assert info["task_id"] == "one"
    assert GSM8K().system_prompt == ""


@pytest.mark.parametrize(
    ("args", "reply", "components", "acc"),
    [
        ({}, "#### 42", {"answer": 1.0}, 1.0),
        ({}, "It is 42", {"answer": 0.0}, 0.0),
        ({"scoring": "flexible"}, "It is 42", {"answer": 1.0}, 1.0),
        ({"format_reward": 0.1}, "#### 41", {"answer": 0.0, "format": 0.1}, 0.0),
        ({"format_reward": 0.1}, "#### 42", {"answer": 1.0, "format": 0.1}, 1.0),
        ({"format_reward": 0.1}, "42", {"answer": 0.0, "format": 0.0}, 0.0),
    ],
)
def test_accuracy_stands_apart_from_the_reward(
    args: dict[str, object], reply: str, components: dict[str, float], acc: float
) -> None:
    env = make("gsm8k", args)
    env.reset(options={"task": ROW})
    _, reward, terminated, truncated, info = env.step(reply)
    assert (terminated, truncated) == (True, False)
    assert info["reward_components"] == components
    assert reward == pytest.approx(sum(components.values()))
    assert info["metrics"]["acc"] == acc
    assert info["metrics"]["acc_flexible"] == float("42" in reply)


def test_an_episode_cut_off_is_scored_as_wrong() -> None:
    env = GSM8K()
    env.reset(options={"task": ROW})
    assert env.finish("context is full") == {"answer": 0.0}


def test_tasks_come_from_the_data_folder_sliced(small_data: Path) -> None:
    env = GSM8K(train="train[2:4]", validation="test[:1]")
    assert [row["id"] for row in env.tasks("train")] == ["gsm8k/train/2", "gsm8k/train/3"]
    assert [row["id"] for row in env.tasks("validation")] == ["gsm8k/test/0"]
    env.reset(options={"task": env.tasks("train")[0]})
    assert env.step("#### 1350")[1] == 1.0


def test_tasks_come_from_files_folders_and_lists(small_data: Path) -> None:
    file = small_data / "gsm8k" / "train.jsonl"
    assert len(GSM8K(train=file).tasks("train")) == 8
    assert [row["id"] for row in GSM8K(train=f"{file}[:2]").tasks("train")] == ["gsm8k/train/0", "gsm8k/train/1"]
    assert len(GSM8K(dataset=small_data / "gsm8k").tasks("validation")) == 4
    assert GSM8K(train=[ROW]).tasks("train") == (ROW,)
    assert GSM8K(train=[{"question": "6*7?", "answer": "42"}]).tasks("train")[0]["id"] == "gsm8k/train/0"


def test_without_data_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TURNWISE_DATA", raising=False)
    with pytest.raises(
        ValueError, match=r"'openai/gsm8k', split 'train', cannot be loaded .*name a folder that holds it in TURNWISE_DATA"
    ):
        GSM8K().tasks("train")


def test_bad_input_is_named(small_data: Path) -> None:
    file = small_data / "gsm8k" / "train.jsonl"
    with pytest.raises(ValueError, match=r"args\.scoring = 'loose' must be 'strict' or 'flexible'"):
        GSM8K(scoring="loose")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no split 'test'\. Known: train, validation"):
        GSM8K().tasks("test")
    with pytest.raises(ValueError, match=r"args\.train\[0\]: the field 'answer' is missing"):
        GSM8K(train=[{"question": "?"}]).tasks("train")
    with pytest.raises(
        ValueError, match=r"task 'x': the answer must end with '#### number' or be a number, but ends with 'many'"
    ):
        GSM8K().reset(options={"task": {"id": "x", "question": "?", "answer": "many"}})
    with pytest.raises(ValueError, match=r"task 'x' lacks the field 'question'"):
        GSM8K().reset(options={"task": {"id": "x", "answer": "1"}})
    file.write_text(file.read_text() + "{broken\n")
    with pytest.raises(ValueError, match=r"train\.jsonl:9: not JSON"):
        GSM8K().tasks("train")
