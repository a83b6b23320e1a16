"""What is written and shown: trajectories, the log, status.json."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from support.rollouts import echo_setup, make_config, make_group, make_rollout
from support.tool_envs import LOOKUP
from turnwise.config import AdvantageConfig
from turnwise.envs.messages import AssistantMessage, ToolCall
from turnwise.orchestrator.batches import BatchBuilder
from turnwise.orchestrator.console import MAX_TEXT, batch_line, pick_samples, render_rollout
from turnwise.orchestrator.filters import FinishedGroup, judge
from turnwise.orchestrator.metrics import batch_metrics
from turnwise.orchestrator.status import STATUS_EVERY, Pulse
from turnwise.orchestrator.trajectories import write_trajectories
from turnwise.report.run import replies


def _builder() -> BatchBuilder:
    builder = BatchBuilder(make_config(), 3)
    builder.add(make_group([0.0, 1.0], number=2, version=2))
    builder.add(make_group([0.0, 1.0], number=0, version=0))  # stale
    errored = make_group([0.5, None], number=1, version=2)
    builder.add(replace(errored, failed_attempts=(make_rollout(group=1, index=1, error="first try"),)))
    builder.add(make_group([0.5, 0.5], number=3, version=2))
    return builder


def test_every_rollout_is_in_the_trajectories_the_dropped_and_the_errored_too(tmp_path: Path):
    path = write_trajectories(tmp_path, _builder())
    assert path.name == "step_3.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["rollout_id"], r["fate"], r["in_batch"]) for r in records] == [
        ("g0-0", "stale", False),
        ("g0-1", "stale", False),
        ("g1-0", "errored", False),
        ("g1-1", "errored", False),
        ("g1-1", "errored", False),
        ("g2-0", "signal", True),
        ("g2-1", "signal", True),
        ("g3-0", "equal_reward", True),
        ("g3-1", "equal_reward", True),
    ]
    assert [r["error"] for r in records[2:5]] == [None, "boom", "first try"]
    sample = records[6]["samples"][0]
    assert sample["token_ids"] == [1, 2, 3, 7, 8, 9]
    assert sample["loss_mask"] == [False] * 3 + [True] * 3
    assert sample["logprobs"] == [0.0] * 3 + [-0.5] * 3
    assert sample["policy_versions"] == [-1] * 3 + [2] * 3
    assert sample["advantages"][-1] == pytest.approx(0.70710, abs=1e-4)
    record = records[6]
    assert record["messages"][1] == {"role": "assistant", "content": "word"}
    assert (record["reward"], record["components"], record["step"], record["attempt"]) == (1.0, {"length": 1.0}, 3, 0)
    assert record["turns"][0]["spans"] == [[2, 3]]
    assert record["timing"]["total_s"] == 2.0


def test_the_line_of_a_batch_tells_signal_and_trouble():
    builder = _builder()
    metrics = batch_metrics(builder, builder.samples(), seconds=2.0, served=2)
    line = batch_line(3, 10, builder.in_order(), metrics)
    assert line.startswith("batch 3/10 | reward 0.500 ± 0.354 | 1 of 4 groups with signal")
    assert "2 errored" in line
    assert "1 groups too old" in line


def test_the_best_and_the_worst_rollouts_are_shown_first():
    groups = [judge(make_group([0.1, 0.9, 0.5, 0.3]), AdvantageConfig(), oldest_allowed=0)]
    assert [r.reward for r in pick_samples(groups, 3)] == [0.9, 0.1, 0.5]
    assert pick_samples(groups, 0) == []
    assert len(pick_samples(groups, 99)) == 4


def test_a_rollout_is_shown_as_it_was_played():
    text = render_rollout(make_rollout(turn_rewards=[0.5, 0.25], reply="crane"))
    assert text.splitlines()[:4] == [
        "┌ rollout g0-0 of echo, task t0: reward 0.750, terminated",
        "│ env   : guess",
        "│ reply > crane",
        "│         +0.500 (length +0.50; 3 tokens)",
    ]


def _calling(group: int, *errors: str | None) -> FinishedGroup:
    """A group of an environment with tools, of which one rollout makes a call an error (or none)."""
    calls = [ToolCall(id=f"call{i:05d}", name="lookup", arguments={}, raw="{", error=error) for i, error in enumerate(errors)]
    said = AssistantMessage(content="", tool_calls=tuple(calls), raw="<tool_call>...</tool_call>" if calls else "").to_message()
    made = make_group([0.0, 1.0], number=group, version=2, setup=replace(echo_setup(), tools=(LOOKUP,)))
    called = replace(made.rollouts[0], messages=(made.rollouts[0].messages[0], said))
    return replace(made, rollouts=(called, made.rollouts[1]))


def test_calls_are_counted_over_the_rollouts_that_were_offered_tools():
    builder = BatchBuilder(make_config(), 3)
    builder.add(_calling(0, None, "cut", None))
    builder.add(make_group([0.0, 1.0], number=1, version=2))
    metrics = batch_metrics(builder, builder.samples(), seconds=2.0, served=2)
    assert metrics["tool_calls/count/mean"] == 1.5
    assert metrics["tool_calls/malformed/share"] == pytest.approx(1 / 3)
    silent = BatchBuilder(make_config(), 3)
    silent.add(_calling(0))
    metrics = batch_metrics(silent, silent.samples(), seconds=2.0, served=2)
    assert (metrics["tool_calls/count/mean"], metrics["tool_calls/malformed/share"]) == (0.0, 0.0)


def test_worked_examples_are_not_what_the_policy_said():
    played = make_rollout(turn_rewards=[0.5, 0.25], reply="crane")
    call = ToolCall(id="call00000", name="lookup", arguments={}).spec()
    example = {"role": "assistant", "content": "shown", "tool_calls": [call]}
    shown = replace(played, messages=({"role": "user", "content": "for instance"}, example, *played.messages))
    assert shown.replies() == ["crane", "crane"]
    assert shown.tool_calls() == []
    assert render_rollout(shown).splitlines()[2:6] == [
        "│ reply > shown",
        "│ env   : guess",
        "│ reply > crane",
        "│         +0.500 (length +0.50; 3 tokens)",
    ]
    written = {"messages": list(shown.messages), "turns": 2}
    assert replies([written]) == replies([{**written, "turns": [{}, {}]}]) == ["crane", "crane"]


def test_calls_are_shown_and_recorded_with_what_is_wrong_with_them(tmp_path: Path):
    builder = BatchBuilder(make_config(), 3)
    builder.add(_calling(0, "cut"))
    assert "│ reply > <tool_call>...</tool_call>" in render_rollout(builder.in_order()[0].group.rollouts[0])
    record = json.loads(write_trajectories(tmp_path, builder).read_text().splitlines()[0])
    assert record["messages"][1]["raw"] == "<tool_call>...</tool_call>"
    assert record["messages"][1]["tool_calls"] == [
        {"id": "call00000", "type": "function", "function": {"name": "lookup", "arguments": {}}, "raw": "{", "error": "cut"}
    ]


def test_a_reply_cannot_move_the_cursor_of_whoever_watches_nor_flood_the_screen():
    text = render_rollout(make_rollout(1.0, reply="\x1b[2J\r\u202e" + "x" * 10_000))
    assert "\x1b" not in text
    assert "\\x1b[2J\\r\\u202e" in text
    assert len(text) < 4 * MAX_TEXT
    assert "(10006 characters)" in text


def test_an_error_is_shown():
    assert "│ error  : boom" in render_rollout(make_rollout(error="boom"))


async def test_the_status_is_rewritten_while_the_pulse_beats(tmp_path: Path):
    tokens, ticks = 0, 0

    def tick() -> None:
        nonlocal ticks
        ticks += 1

    pulse = Pulse(tokens=lambda: tokens, tick=tick)
    path = tmp_path / "status.json"
    beat = asyncio.create_task(pulse.beat(path, lambda: {"phase": "rollouts"}))
    for _ in range(300):
        await asyncio.sleep(0.01)
        tokens += 10
        if path.exists():
            break
    beat.cancel()
    status = json.loads(path.read_text())
    assert status["phase"] == "rollouts"
    metrics = pulse.take()
    assert ticks >= STATUS_EVERY
    assert 0 <= metrics["orchestrator/loop_lag_s/mean"] <= metrics["orchestrator/loop_lag_s/max"]
    assert pulse.take() == {}


def test_tokens_per_second_are_those_of_the_last_seconds(monkeypatch: pytest.MonkeyPatch):
    clock, tokens = 100.0, 0
    monkeypatch.setattr("turnwise.orchestrator.status.time.monotonic", lambda: clock)
    pulse = Pulse(tokens=lambda: tokens, tick=lambda: None)
    assert pulse.tokens_per_s() == 0.0
    clock, tokens = 110.0, 500
    assert pulse.tokens_per_s() == 50.0
    clock, tokens = 131.0, 500
    assert pulse.tokens_per_s() == 0.0
