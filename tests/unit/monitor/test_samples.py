"""Rollouts as rows: which are picked, and what their text says."""

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from support.recorded_rollout import rollout
from turnwise.monitor.samples import COLUMNS, CONVERSATION_LIMIT, conversation, pick, read_evaluation, read_trajectories, row
from turnwise.monitor.secrets import Redactor


def test_each_reply_stands_under_what_it_earned():
    assert conversation(rollout()).split("\n\n") == [
        "[system]\nPlay.",
        "[assistant]\nworked example",
        "[user]\nguess",
        "[assistant, +0.250 (green +0.25; 7 tokens)]\n<guess>crane",
        "[user]\nagain",
        "[assistant, +0.000 (nothing; 7 tokens)]\nslate",
    ]


def test_an_evaluated_rollout_has_no_rewards_of_turns():
    assert "[assistant]\nslate" in conversation(rollout(turns=2))
    assert row(3, rollout(turns=2), Redactor({}, {}))[COLUMNS.index("turns")] == 2


def test_a_row_has_all_columns_and_no_secret():
    record = rollout(messages=[{"role": "user", "content": "key planted-secret-value"}], turns=[])
    made = dict(zip(COLUMNS, row(3, record, Redactor({}, {"A_KEY": "planted-secret-value"})), strict=True))
    assert made["conversation"] == "[user]\nkey ***"
    assert (made["step"], made["reward"], made["components"], made["turns"]) == (3, 0.5, "green +0.5", 0)


def test_long_texts_are_cut():
    long = rollout(messages=[{"role": "user", "content": "x" * 10_000}] * 100, turns=[])
    text = conversation(long)
    assert len(text) < CONVERSATION_LIMIT + 50
    assert "(10000 characters)" in text


@given(st.lists(st.floats(-9, 9), max_size=30), st.integers(0, 8))
def test_the_best_and_the_worst_are_picked_and_others_between(rewards: list[float], count: int):
    picked = [one["reward"] for one in pick(({"reward": reward} for reward in rewards), count)]
    assert len(picked) == min(count, len(rewards))
    assert picked == sorted(picked, reverse=True)
    if picked:
        assert picked[0] == max(rewards)
    if len(picked) > 1:
        assert picked[-1] == min(rewards)


def test_errored_rollouts_and_tokens_are_left_out(tmp_path: Path):
    trajectories, evaluation = tmp_path / "step_1.jsonl", tmp_path / "step_1.json"
    records = [rollout(), rollout(error="boom")]
    trajectories.write_text("".join(json.dumps(record) + "\n" for record in records))
    evaluation.write_text(json.dumps({"rollouts": records}))
    assert [sorted(record) for record in read_trajectories(trajectories)] == [sorted(set(rollout()) - {"samples"})]
    assert len(read_evaluation(evaluation)) == 1
    assert read_trajectories(tmp_path / "no.jsonl") == read_evaluation(tmp_path / "no.json") == []
