"""Command lines: files and flags, where values came from, and every problem in one message."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.config import ConfigError, RLConfig
from turnwise.config.command import Request, check, read_command

GOOD = """
max_steps = 10
[orchestrator]
batch_size = 16
rollouts_per_example = 4
[[orchestrator.env]]
id = "wordle"
"""


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def problems_of(tmp_path: Path, text: str, *flags: str) -> str:
    """The message that refuses a configuration."""
    with pytest.raises(ConfigError) as caught:
        check(read_command(["@", write(tmp_path / "mine.toml", text), *flags]))
    return str(caught.value)


def load(*args: str) -> RLConfig:
    return check(read_command(args))


def test_files_merge_left_to_right_and_flags_beat_files(tmp_path: Path):
    a = write(tmp_path / "a.toml", GOOD + "[trainer.optim]\nlr = 1e-4\nwarmup_steps = 2\n")
    b = write(tmp_path / "b.toml", "max_steps = 20\n[trainer.optim]\nlr = 2e-4\n")
    config = load("@", a, "@", b, "--trainer.optim.lr", "3e-4", "--seed=7")
    assert (config.max_steps, config.seed) == (20, 7)
    assert (config.trainer.optim.lr, config.trainer.optim.warmup_steps) == (3e-4, 2)


def test_lists_are_replaced_whole(tmp_path: Path):
    a = write(tmp_path / "a.toml", GOOD + "[gpus]\ntrainer = [2, 3, 4]\n")
    b = write(tmp_path / "b.toml", "[gpus]\ntrainer = [5]\n")
    assert load("@", a, "@", b).gpus.trainer == [5]


def test_the_file_may_stick_to_its_sign(tmp_path: Path):
    assert load(f"@{write(tmp_path / 'a.toml', GOOD)}").max_steps == 10


def test_a_table_is_read_from_a_file(tmp_path: Path):
    a, lora = write(tmp_path / "a.toml", GOOD), write(tmp_path / "lora.toml", "rank = 4\n")
    assert (
        load("@", a, "--trainer.model.lora", "@", lora).trainer.model.lora
        == RLConfig.model_validate({"trainer": {"model": {"lora": {"rank": 4}}}}).trainer.model.lora.model_copy()
    )


@pytest.mark.parametrize("flag", ["--orchestrator.batch-size", "--orchestrator.batch_size"])
def test_kebab_and_snake_case_are_the_same(tmp_path: Path, flag: str):
    assert load("@", write(tmp_path / "a.toml", GOOD), flag, "32").orchestrator.batch_size == 32


@pytest.mark.parametrize("flags", [["--no-trainer.model.lora"], ["--trainer.model.lora", "None"]])
def test_an_optional_table_can_be_switched_off(tmp_path: Path, flags: list[str]):
    assert load("@", write(tmp_path / "a.toml", GOOD), *flags).trainer.model.lora is None


def test_a_flag_creates_an_unset_table(tmp_path: Path):
    wandb = load("@", write(tmp_path / "a.toml", GOOD), "--wandb.project", "mine").wandb
    assert wandb is not None
    assert wandb.project == "mine"


def test_environments_may_come_as_json(tmp_path: Path):
    config = load("--max-steps", "3", "--orchestrator.env", json.dumps([{"id": "gsm8k", "args": {"limit": 3}}]))
    assert config.orchestrator.env[0].args == {"limit": 3}


def test_a_switch_takes_a_value_and_its_negation(tmp_path: Path):
    path = write(tmp_path / "a.toml", GOOD)
    assert load("@", path, "--trainer.model.gradient-checkpointing").trainer.model.gradient_checkpointing
    assert not load("@", path, "--no-monitor.tensorboard").monitor.tensorboard
    assert not load("@", path, "--monitor.tensorboard", "false").monitor.tensorboard


def test_a_batch_that_the_group_does_not_divide_is_refused_with_what_would_do(tmp_path: Path):
    message = problems_of(tmp_path, GOOD, "--orchestrator.batch-size", "30", "--orchestrator.rollouts-per-example", "8")
    assert "orchestrator.batch_size = 30 is not a multiple of rollouts_per_example = 8; use 24 or 32." in message
    assert "[command line]" in message


def test_all_problems_are_told_at_once_each_with_its_file(tmp_path: Path):
    other = write(tmp_path / "other.toml", "[trainer.optim]\nlr = -1.0\n")
    text = GOOD.replace("16", "30").replace('id = "wordle"', "id = 5\nagrs = {}") + "[gpus]\ncontainers = [0]\ntrainer = [0, 1]\n"
    message = problems_of(tmp_path, text, "@", other, "--max-stesp", "3")
    assert message.startswith("6 problems in the configuration:")
    lines = message.splitlines()[1:]
    expected = {
        "orchestrator.env[0].id = 5 must be text": "mine.toml",
        "orchestrator.env[0].agrs: there is no such key; did you mean args?": "mine.toml",
        "trainer.optim.lr = -1.0 must be more than 0": "other.toml",
        'max_stesp = "3": there is no such key; did you mean max_steps?': "command line",
        "orchestrator.batch_size = 30 is not a multiple of rollouts_per_example = 4; use 28 or 32.": "mine.toml",
        "GPU 0 is in both": "mine.toml",
    }
    for text, source in expected.items():
        assert any(text in line and source in line for line in lines), (text, message)


def test_a_key_in_the_wrong_table_is_sent_to_the_right_one(tmp_path: Path):
    message = problems_of(tmp_path, GOOD + "[trainer]\nlr_typo = 1\nrank = 4\n")
    assert "trainer.rank = 4: there is no such key; did you mean trainer.model.lora.rank?" in message


def test_a_wrong_choice_names_the_choices_and_the_nearest(tmp_path: Path):
    message = problems_of(tmp_path, GOOD, "--inference.engine", "vlm")
    assert "inference.engine = \"vlm\" must be one of 'vllm' or 'embedded' (did you mean 'vllm'?)" in message


def test_a_problem_caused_by_another_is_not_told(tmp_path: Path):
    message = problems_of(tmp_path, GOOD.replace("10", '"ten"'))
    assert message.splitlines()[0] == "One problem in the configuration:"
    assert 'max_steps = "ten" must be a whole number' in message


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.toml: no such file"):
        read_command(["@", "nowhere.toml"])


def test_a_file_that_is_not_toml_is_named_with_the_place(tmp_path: Path):
    path = write(tmp_path / "broken.toml", "max_steps = 3\nseed = = 4\n")
    with pytest.raises(ConfigError, match=r"broken\.toml is not valid TOML.*line 2"):
        read_command(["@", path])


@pytest.mark.parametrize("args", [["@"], ["--max-steps"], ["stray"], ["--orchestrator", "3"], ["--orchestrator.env", "[{"]])
def test_a_line_that_cannot_be_parsed_is_refused(args: list[str]):
    with pytest.raises(ConfigError):
        check(read_command(args))


def test_older_spellings_work_with_one_notice(tmp_path: Path):
    old = """
    max_steps = 10
    inference_gpu_ids = [0, 1]
    trainer_gpu_ids = [2, 3]
    [inference.parallel]
    dp = 2
    [orchestrator]
    batch_size = 16
    rollouts_per_prompt = 4
    [[orchestrator.env]]
    id = "wordle"
    """
    request = read_command(["@", write(tmp_path / "old.toml", old), "--orchestrator.async-level", "2"])
    config = check(request)
    assert (config.gpus.inference, config.gpus.trainer, config.inference.dp) == ([0, 1], [2, 3], 2)
    assert (config.orchestrator.rollouts_per_example, config.orchestrator.max_staleness) == (4, 2)
    assert len(request.notices) == 1
    for words in ("inference_gpu_ids is now gpus.inference", "inference.parallel.dp is now inference.dp", "rollouts_per_example"):
        assert words in request.notices[0]


def test_an_older_spelling_in_a_later_file_beats_the_new_name_in_an_earlier_one(tmp_path: Path):
    a = write(tmp_path / "a.toml", GOOD + "[gpus]\ninference = [0]\n")
    b = write(tmp_path / "b.toml", "inference_gpu_ids = [3]\n")
    assert load("@", a, "@", b).gpus.inference == [3]


def test_a_problem_at_an_older_spelling_names_the_file(tmp_path: Path):
    message = problems_of(tmp_path, 'inference_gpu_ids = ["zero"]\n' + GOOD)
    assert 'gpus.inference[0] = "zero" must be a whole number.  [' in message
    assert "mine.toml]" in message


@settings(deadline=None, max_examples=60)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=4),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["env", "id", "trainer", "gpus", "inference", "lora", "model", "x"]), inner, max_size=3
            )
        ),
        max_leaves=8,
    ).filter(lambda value: isinstance(value, dict))
)
def test_no_content_of_a_file_raises_anything_but_a_config_error(tables: dict):
    with pytest.raises(ConfigError):  # never complete: neither max_steps nor epochs is among the keys
        check(Request(tables, {}, {}))
