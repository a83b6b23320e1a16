"""What checks look at, made from a configuration without processes."""

import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from support.planted_checks import ScriptedContext, tables
from support.scripted_engine import ScriptedEngine
from turnwise.config import ConfigError, RLConfig, load_config
from turnwise.diagnose import collect
from turnwise.diagnose.checks import TEXT_CHECKS
from turnwise.diagnose.collect import group_counts
from turnwise.diagnose.context import Context
from turnwise.diagnose.core import CheckFailed, Verdict, run_checks
from turnwise.diagnose.session import Session
from turnwise.orchestrator.filters import Fate


def config_of(model: Path, folder: Path, **changes: Any) -> RLConfig:
    return RLConfig.model_validate(tables(model, folder, **changes))


def test_the_resolved_configuration_writes_to_the_scratch_folder_alone(tiny_model: Path, tmp_path: Path):
    config = config_of(tiny_model, tmp_path)
    context = Context(config, tmp_path / "scratch", lambda text: None)
    assert context.config.output_dir == tmp_path / "scratch"
    assert context.config.trajectories_dir == tmp_path / "scratch" / "trajectories"
    assert load_config(tmp_path / "scratch" / "config.toml") == context.config
    assert not (tmp_path / "run").exists()


def test_a_taken_port_fails_the_plan_as_it_would_the_run(tiny_model: Path, tmp_path: Path, unused_tcp_port: int):
    given = {**tables(tiny_model, tmp_path), "inference": {"port": unused_tcp_port}}
    with socket.create_server(("127.0.0.1", unused_tcp_port)):
        results = run_checks(TEXT_CHECKS[:2], Context(RLConfig.model_validate(given), tmp_path, print), lambda result: None)
    assert results[0].finding.verdict is Verdict.FAIL
    assert f"port {unused_tcp_port} on 127.0.0.1 is in use" in results[0].finding.evidence
    assert results[1].blocked_by == "plan"


def test_the_engines_of_the_checks_leave_the_port_of_the_run_alone(tiny_model: Path, tmp_path: Path, unused_tcp_port: int):
    given = {**tables(tiny_model, tmp_path), "inference": {"port": unused_tcp_port}}
    context = Context(RLConfig.model_validate(given), tmp_path / "scratch", lambda text: None)
    assert context.config.inference.port != unused_tcp_port


def test_a_model_that_cannot_be_had_fails_the_first_check_that_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("turnwise.launch.dry_run.known_shape", lambda model: "config.json is not at hand")
    config = config_of(Path("nobody/has-this-model"), tmp_path)
    with ScriptedContext(config, tmp_path / "scratch") as context:
        results = run_checks(TEXT_CHECKS, context, lambda result: None)
    told = {result.check.name: (result.finding.verdict, result.blocked_by) for result in results}
    assert told["plan"][0] is Verdict.PASS
    assert told["template"] == (Verdict.FAIL, None)
    assert "tokenizer or chat template of nobody/has-this-model cannot be used" in results[1].finding.evidence
    assert told["environment"][0] is Verdict.PASS
    assert {told[name] for name in ("rollouts", "reward", "advantages", "mask")} == {(Verdict.BLOCKED, "template")}


def test_groups_are_those_that_a_run_would_play_first(tiny_model: Path, tmp_path: Path):
    config = config_of(tiny_model, tmp_path)
    played: list[list[str]] = []
    for _ in range(2):
        with ScriptedContext(config, tmp_path / "scratch", rollouts=12) as context:
            assert [judged.group.id for judged in context.groups] == [0, 1, 2]
            assert len({judged.group.task.task["id"] for judged in context.groups}) == 3
            played.append([str(r.messages) for judged in context.groups for r in judged.group.rollouts])
    assert played[0] == played[1]
    assert len(played[0]) == 12


def test_rollouts_are_sampled_as_configured(tiny_model: Path, tmp_path: Path):
    config = config_of(tiny_model, tmp_path, sampling={"max_tokens": 5, "temperature": 0.6})
    engine = ScriptedEngine(require_adapters=False)
    with ScriptedContext(config, tmp_path / "scratch", engine=engine, rollouts=8) as context:
        assert len(context.groups) == 2
        stops = list(context.chat.stop_ids)
    assert {(r["temperature"], r["max_tokens"], r["model"]) for r in engine.requests} == {(0.6, 5, str(tiny_model))}
    assert all(request["stop_token_ids"] == stops for request in engine.requests)


def test_a_batch_holds_no_more_groups_than_configured(tiny_model: Path, tmp_path: Path):
    config = config_of(tiny_model, tmp_path)
    with ScriptedContext(config, tmp_path / "scratch", rollouts=24) as context:
        with_signal = [judged for judged in context.groups if judged.fate is Fate.SIGNAL]
        assert len(with_signal) > 2
        batch = context.batch
    assert batch.temperature == config.orchestrator.sampling.temperature
    assert 1 <= len({sample.group_id for sample in batch.samples}) <= 2


def test_an_environment_that_always_raises_gives_no_groups(tiny_model: Path, tmp_path: Path):
    config = config_of(tiny_model, tmp_path, env=[{"id": "support.faulty_envs:Faulty"}])
    with ScriptedContext(config, tmp_path / "scratch") as context, pytest.raises(CheckFailed, match=r"planted"):
        _ = context.groups


def test_an_engine_that_does_not_start_is_told_once(tiny_model: Path, tmp_path: Path):
    class Dead(ScriptedContext):
        starts = 0

        def open_engines(self):
            Dead.starts += 1
            raise ConfigError("inference ended with exit code 1")

    with Dead(config_of(tiny_model, tmp_path), tmp_path / "scratch") as context:
        results = run_checks(TEXT_CHECKS, context, lambda result: None)
    assert [(r.check.name, r.blocked_by) for r in results[3:]] == [
        *(("rollouts", None), ("reward", "rollouts"), ("advantages", "rollouts"), ("mask", "rollouts"))
    ]
    assert results[3].finding.evidence == "inference ended with exit code 1"
    assert Dead.starts == 1


def test_what_a_session_opened_is_closed_when_it_cannot_go_on(tiny_model: Path, tmp_path: Path):
    engine = ScriptedEngine()
    context = ScriptedContext(config_of(tiny_model, tmp_path), tmp_path / "scratch", engine=engine)
    with Session(context.config, context.open_engines(), stop_ids=(1,)) as session:
        assert (session.policy.version, session.policy.kind) == (0, "full")
        session.run(session.client.wait_healthy(5))
        url = engine.url
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{url}/health", timeout=5)


@pytest.mark.parametrize(
    ("batch", "group", "asked", "groups"),
    [
        (32, 8, None, (4, 8)),
        (2, 2, None, (16, 16)),
        (2048, 8, None, (4, 8)),
        (32, 8, 24, (3, 3)),
        (128, 64, None, (2, 2)),
        (32, 8, 1, (2, 2)),
    ],
)
def test_so_many_groups_are_played(batch: int, group: int, asked: int | None, groups: tuple[int, int]):
    config = RLConfig.model_validate({"orchestrator": {"batch_size": batch, "rollouts_per_example": group}})
    assert group_counts(config, asked) == groups


@pytest.mark.parametrize(("patience_s", "groups"), [(60.0, 16), (0.0, 8)])
def test_slow_rollouts_are_not_played_as_often(
    patience_s: float, groups: int, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(collect, "PATIENCE_S", patience_s)
    config = config_of(tiny_model, tmp_path, batch_size=32)
    with ScriptedContext(config, tmp_path / "scratch", rollouts=None) as context:
        assert [judged.group.id for judged in context.groups] == list(range(groups))
