"""Runs whose rollouts work in containers: through `rl` itself, and through an outage of the engine."""

import asyncio
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from support.docker_engine import PrivateEngine
from support.mlgym_by_bytes import ID
from support.orchestrated import make_config, run, trainer_of, until
from support.rl_command import finish
from support.run_records import batches, metrics
from support.scripted_engine import ScriptedEngine
from turnwise.config import RLConfig
from turnwise.config.containers import ContainersConfig
from turnwise.containers.owner import RUN_LABEL
from turnwise.envs.containers import containers_of
from turnwise.orchestrator.template_chat import TemplateChat
from turnwise.orchestrator.tokenizer import load_model_text

ARGS = {
    "tasks": ["titanic"],
    "num_examples_per_task": 2,
    "num_validation_per_task": 1,
    "image": "python",
    "system_prompt": "One command between ``` marks.",
    "command_reward": 0.3,
    "time_limit_s": 60,
}
LIMITS = {"memory_mib": 256, "home_mib": 48, "tmp_mib": 16, "data_mib": 16, "shm_mib": 4}
TOML = """
output_dir = "run"
run_name = "{run}"
max_steps = 2
seq_len = 2048
[model]
name = "{model}"
[orchestrator]
batch_size = 4
rollouts_per_example = 2
max_staleness = 0
[orchestrator.sampling]
max_tokens = 8
[[orchestrator.env]]
id = "{env}"
name = "mlgym"
timeout_s = 200
args = {args}
[orchestrator.eval]
num_examples = 1
[containers]
hosts = [{{ url = "{url}" }}]
warm = 0
limits = {limits}
[trainer]
threads = 1
[inference.embedded]
threads = 1
[monitor]
tensorboard = false
"""


def as_toml(table: dict[str, Any]) -> str:
    """An inline table; JSON writes its values as TOML does."""
    return "{ " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items()) + " }"


def records(root: Path) -> list[dict[str, Any]]:
    files = sorted((root / "trajectories").glob("step_*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_a_run_in_containers_ends_without_an_error_and_leaves_no_container(
    engine_url: str, api: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))  # processes of the run import the environment from there
    name = f"mlgym-{time.monotonic_ns()}"
    args, limits = as_toml(ARGS | {"max_turns": 3}), as_toml(LIMITS)
    text = TOML.format(model=tiny_model, url=engine_url, run=name, env=ID, args=args, limits=limits)
    (tmp_path / "run.toml").write_text(text)
    output = finish(tmp_path, "@", str(tmp_path / "run.toml"))
    assert "Done at step 2 of 2" in output
    found = metrics(tmp_path / "run")
    for step in (1, 2):
        assert found[step]["rollouts/errored/count"] == 0.0
        assert found[step]["actor/grad_norm"] > 0
        assert found[step]["env/commands/mean"] > 0
    played = records(tmp_path / "run")
    assert {record["stop_reason"] for record in played} <= {"truncated", "terminated"}
    said = str([record["messages"] for record in played])
    assert "cannot access 'no-such-file'" in said
    assert "[no output]" in said
    assert api.containers(all=True, filters={"label": f"{RUN_LABEL}={name}"}) == []


@pytest.fixture
def private() -> Iterator[PrivateEngine]:
    engine = PrivateEngine(Path(f"/tmp/tw-private-{time.monotonic_ns()}"))
    yield engine
    engine.start()  # one that a failing test left killed ends its containers when it starts
    engine.remove()


FIRST = ("python3 baseline.py && sleep 2", "python3 baseline.py && sleep 2 && false")
THEN = ("validate", "submit")
EARNED = [0.1 + 0.1 + 0.1, -0.1 + 0.1 + 0.1]  # first command, validation, submission; nothing for the baseline's own score


def scripted(model: Path) -> ScriptedEngine:
    """An engine that solves titanic as the baseline does, in three replies, the first of them one of two."""
    text = load_model_text(str(model))
    chat = TemplateChat(text)
    replies = {c: [*chat.encoder.encode(f"```\n{c}\n```", "\ufdef"), chat.stop_ids[0]] for c in (*FIRST, *THEN)}

    def says(body: dict[str, Any]) -> Sequence[int]:
        turn = text.tokenizer.decode(body["prompt"]).count("replies left;")
        return replies[random.Random(str(body["seed"])).choice(FIRST) if turn == 0 else THEN[turn - 1]]

    return ScriptedEngine(script=says)


def outage_config(containers: ContainersConfig, url: str, model: Path, out: Path) -> RLConfig:
    host = {"url": url, "max_containers": 4}
    table = {"hosts": [host], "limits": LIMITS, "warm": 0, "wait_s": 90, "failures": 2, "pause_s": 0.2, "evaluations": 2}
    env = {"id": "mlgym", "timeout_s": 200, "args": ARGS | {"max_turns": 3}}
    orchestrator = {
        "batch_size": 4,
        "rollouts_per_example": 2,
        "max_staleness": 0,
        "env": [env],
        "sampling": {"max_tokens": 64},
    }
    return make_config(model, out, max_steps=2, seq_len=8192, orchestrator=orchestrator, containers=table)


async def test_an_outage_of_the_engine_is_waited_for_and_no_episode_is_scored_for_it(
    config: ContainersConfig,
    private: PrivateEngine,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("support.orchestrated.DEADLINE_S", 240.0)
    settings = outage_config(config, private.start(), tiny_model, tmp_path)
    said: list[str] = []
    async with scripted(tiny_model) as engine:
        with containers_of(settings, said.append) as pools:
            assert pools is not None
            trainer = trainer_of(settings)
            playing = asyncio.create_task(run(settings, engine, trainer, containers=pools))
            await until(lambda: len(engine.requests) >= 4 or playing.done())  # all four are at work in their containers
            await asyncio.to_thread(private.kill)
            await until(lambda: bool(pools.tasks.state.down) or playing.done())
            assert not playing.done()
            before = len(engine.requests)
            await asyncio.sleep(1)
            assert len(engine.requests) - before <= 4  # at most one reply each to what it last saw
            await asyncio.to_thread(private.start)
            assert await playing is None
    assert any("is down" in text and "none of them is scored" in text for text in said)
    assert any("works again" in text for text in said)
    played = records(tmp_path)
    ends = [record["stop_reason"] for record in played]
    assert "outage" in ends
    assert set(ends) == {"outage", "terminated"}
    rewards = [record["reward"] for record in played if record["stop_reason"] == "terminated"]
    assert all(any(reward == pytest.approx(earned) for earned in EARNED) for reward in rewards)  # none is 0
    assert [batch.step for batch in batches(tmp_path)] == [1, 2]
