"""What one configuration says otherwise than another, and what a file laid over others is said to change."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.config.command import read_command
from turnwise.config.differences import differences, leaves

LORA = {"trainer": {"model": {"lora": {"rank": 32, "alpha": 16}}}}
OFF = {"trainer": {"model": {"lora": "None"}}}
ENVS = {"orchestrator": {"env": [{"id": "gsm8k", "args": {"scoring": "strict"}}]}}
FLEXIBLE = {"orchestrator": {"env": [{"id": "gsm8k", "args": {"scoring": "flexible", "format_reward": 0.1}}]}}

CASES = [
    ({"max_steps": 4}, {"max_steps": 9}, ["max_steps: 4 -> 9"]),
    ({"epochs": 1}, {"epochs": "None", "max_steps": 100}, ["epochs: 1 -> unset", "max_steps: unset -> 100"]),
    ({"seq_len": 2048}, {}, []),  # the default
    ({}, {"seq_len": 512}, ["seq_len: 2048 -> 512"]),
    (LORA, OFF, ["trainer.model.lora: {rank = 32, alpha = 16} -> unset"]),
    (OFF, LORA, ["trainer.model.lora: unset -> {rank = 32, alpha = 16}"]),
    ({}, {"orchestrator": {"overlong": {"buffer": 9}}}, ["orchestrator.overlong.buffer: unset -> 9"]),
    ({"gpus": {"inference": [0, 1]}}, {"gpus": {"inference": []}}, ["gpus.inference: [0, 1] -> []"]),
    ({"trainer": {"optim": {"lr": 1e-5}}}, {"trainer": {"optim": {"lr": 1e-06}}}, ["trainer.optim.lr: 1e-05 -> 1e-06"]),
    ({"gpus": {"share": False}}, {"gpus": {"share": True}}, ["gpus.share: false -> true"]),
    (
        ENVS,
        FLEXIBLE,
        [
            'orchestrator.env[0].args.scoring: "strict" -> "flexible"',
            "orchestrator.env[0].args.format_reward: unset -> 0.1",
        ],
    ),
]


@pytest.mark.parametrize(("before", "after", "expected"), CASES)
def test_each_key_that_differs_is_named_with_both_values(before: dict[str, Any], after: dict[str, Any], expected: list[str]):
    assert [str(difference) for difference in differences(before, after)] == expected


TABLES = st.recursive(
    st.integers() | st.booleans() | st.text(max_size=3) | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from(["a", "b", "seq_len"]), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["a", "b", "seq_len"]), TABLES, max_size=3))
def test_nothing_differs_from_itself(tables: dict[str, Any]):
    assert differences(tables, tables) == []


@given(st.dictionaries(st.sampled_from(["a", "b", "c"]), TABLES, max_size=3), st.integers())
def test_a_changed_leaf_is_found(tables: dict[str, Any], value: int):
    changed = {**tables, "planted": value}
    assert [difference.key for difference in differences(tables, changed)] == ["planted"]
    assert len(leaves(changed)) == len(leaves(tables)) + 1


def test_a_file_over_others_tells_what_it_changes_and_one_that_only_adds_tells_nothing(tmp_path: Path):
    base, mine, short = (tmp_path / f"{name}.toml" for name in ("base", "mine", "short"))
    base.write_text('output_dir = "a"\nepochs = 1\n[trainer.optim]\nlr = 1e-5\n')
    mine.write_text('output_dir = "b"\nrun_name = "mine"\n[trainer.model.lora]\nrank = 32\n')
    short.write_text('epochs = "None"\nmax_steps = 100\n[trainer.optim]\nlr = 1e-5\n')
    request = read_command(["@", str(base), "@", str(mine), "@", str(short)])
    assert request.changes == (
        f"{short} changes what the files before it say:",
        "  epochs: 1 -> unset",
        "  max_steps: unset -> 100",
    )
    assert read_command(["@", str(base), "@", str(mine)]).changes == ()
