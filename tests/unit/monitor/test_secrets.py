"""Planted secrets: in the environment, in the configuration, in text."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turnwise.config import RLConfig
from turnwise.monitor.secrets import Redactor, is_secret_name

NAMES = [
    "key",
    "api_key",
    "apiKey",
    "hf-token",
    "HF_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID",
    "PGPASSWORD",
    "api_keys",
]
HARMLESS = [
    "max_tokens",
    "micro_batch_tokens",
    "tokenizer",
    "TOKENIZERS_PARALLELISM",
    "token_ids",
    "monkey",
    "seq_len",
    "keep_last",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_secrets_are_known(name: str):
    assert is_secret_name(name)


@pytest.mark.parametrize("name", HARMLESS)
def test_names_that_only_look_alike_are_none(name: str):
    assert not is_secret_name(name)


def test_no_key_of_our_own_configuration_looks_secret():
    tables = RLConfig(wandb={}, mlflow={}).model_dump(mode="json")
    assert Redactor(tables, {}).tables(tables) == tables


def test_text_under_secret_keys_is_hidden_and_so_is_everything_in_it():
    tables = {
        "inference": {"vllm": {"api_key": "abc", "hf-token": "def", "max_tokens": "12", "key": 3}},
        "tags": [{"secret": "x"}],
        "credentials": {"user": "ann", "list": ["b", 7]},
    }
    assert Redactor(tables, {}).tables(tables) == {
        "inference": {"vllm": {"api_key": "***", "hf-token": "***", "max_tokens": "12", "key": 3}},
        "tags": [{"secret": "***"}],
        "credentials": {"user": "***", "list": ["***", 7]},
    }


def test_a_secret_variable_is_hidden_wherever_its_value_stands():
    redactor = Redactor({"api_key": "configured-secret"}, {"OPENAI_API_KEY": "planted-in-environment", "HOME": "/home/ann"})
    tables: dict[str, Any] = {"args": {"command": "judge --with planted-in-environment"}, "home": "/home/ann"}
    assert redactor.tables(tables) == {"args": {"command": "judge --with ***"}, "home": "/home/ann"}
    assert redactor.text("401 for configured-secret") == "401 for ***"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("https://ann:pass@host/x and https://host/y", "https://***@host/x and https://host/y"),
        ("Authorization: Bearer abcdefgh1234", "Authorization: Bearer ***"),
        ("sk-abcdefghijklmnop1234 hf_abcdefghijklmnopqrst", "*** ***"),
        ("a task is-not-secret at all", "a task is-not-secret at all"),
    ],
)
def test_credentials_are_known_by_their_form(text: str, hidden: str):
    assert Redactor({}, {}).text(text) == hidden


def test_a_short_value_is_no_reason_to_cut_up_text():
    assert Redactor({"password": "a"}, {"X_TOKEN": "false"}).text("a false alarm") == "a false alarm"


@given(st.text(min_size=8).filter(lambda value: "*" not in value), st.text(), st.text())
def test_a_known_secret_is_in_no_text(secret: str, before: str, after: str):
    assert secret not in Redactor({}, {"MY_API_KEY": secret}).text(before + secret + after).replace("***", "\0")
