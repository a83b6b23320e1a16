"""Writing and reading configurations, older names, and the generated reference."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.config import ConfigError, RLConfig, load_config
from turnwise.config.files import dump_toml, merge
from turnwise.config.legacy import RENAMED, upgrade
from turnwise.config.problems import all_keys
from turnwise.config.reference import help_text, markdown, tables

ROOT = Path(__file__).parents[3]


def round_trip(config: RLConfig, folder: Path) -> RLConfig:
    path = folder / "config.toml"
    path.write_text(dump_toml(config))
    return load_config(path)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"trainer": {"model": {"lora": None}, "optim": {"max_grad_norm": None}}, "ckpt": {"keep_last": None}},
        {
            "wandb": {"tags": ["a", "b"]},
            "orchestrator": {"env": [{"id": "wordle", "args": {"answers": ["frost"], "deep": {"x": 1.5}}}]},
        },
        {
            "output_dir": Path("/tmp/a b"),
            "trainer": {"optim": {"betas": (0.8, 0.9)}},
            "stop": {"success_when": 'running_mean("x/y") > 1'},
        },
    ],
)
def test_what_is_written_is_read_back(values: dict[str, Any], tmp_path: Path):
    config = RLConfig.model_validate(values)
    assert round_trip(config, tmp_path).model_dump() == config.model_dump()


numbers = st.dictionaries(st.sampled_from("abc"), st.integers(), max_size=2)
tables_of = st.fixed_dictionaries({}, optional={"x": st.integers(), "y": st.integers(), "t": numbers, "u": numbers})


@settings(deadline=None)
@given(tables_of, tables_of, tables_of)
def test_merging_is_associative_and_the_right_side_wins(a: dict, b: dict, c: dict):
    assert merge(merge(a, b), c) == merge(a, merge(b, c))
    assert merge(a, a) == a
    assert all(merge(a, b)[key] == value for key, value in b.items() if not isinstance(value, dict))


def test_merging_leaves_its_arguments_alone():
    a, b = {"t": {"x": 1}}, {"t": {"y": 2}}
    assert merge(a, b) == {"t": {"x": 1, "y": 2}}
    assert (a, b) == ({"t": {"x": 1}}, {"t": {"y": 2}})


def test_every_older_spelling_leads_to_a_key_that_exists_and_is_none_itself():
    keys = set(all_keys())
    assert set(RENAMED.values()) <= keys
    assert not keys & RENAMED.keys()


def test_upgrading_moves_values_and_drops_tables_that_become_empty():
    old = {"inference": {"parallel": {"dp": 2, "tp": 1}}, "trainer_gpu_ids": [1]}
    tables, renamed = upgrade(old)
    assert tables == {"inference": {"dp": 2, "tp": 1}, "gpus": {"trainer": [1]}}
    assert set(renamed) == {"inference.parallel.dp", "inference.parallel.tp", "trainer_gpu_ids"}
    assert old == {"inference": {"parallel": {"dp": 2, "tp": 1}}, "trainer_gpu_ids": [1]}


def test_where_both_spellings_stand_the_new_one_wins():
    tables, _ = upgrade({"trainer_gpu_ids": [1], "gpus": {"trainer": [5]}})
    assert tables == {"gpus": {"trainer": [5]}}


def test_a_config_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no such file"):
        load_config(tmp_path / "config.toml")


def test_the_reference_page_is_in_step_with_the_code():
    assert (ROOT / "docs" / "configuration.md").read_text() == markdown(), "run `make docs`"


def test_every_key_is_described():
    undocumented = [f"{table.path}.{key.name}" for table in tables() for key in table.keys if not key.description]
    obvious = {"trainer.optim.weight_decay", "trainer.optim.betas", "trainer.optim.eps", "trainer.optim.min_lr_ratio"}
    assert set(undocumented) <= obvious | {"wandb.project", "wandb.entity", "wandb.group", "wandb.tags"}


@pytest.mark.parametrize("width", [40, 80, 130])
def test_help_names_every_key_and_fits(width: int):
    text = help_text(width)
    for table in tables():
        for key in table.keys:
            name = key.name if table.header.startswith("[[") else key.name.replace("_", "-")
            assert name in text
    longest = max(len(line) for line in text.splitlines() if line.startswith(" "))
    assert longest <= max(width, 75)
