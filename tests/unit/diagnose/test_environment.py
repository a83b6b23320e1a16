"""Do environments keep their contract, whatever the policy says?"""

import time
from pathlib import Path
from typing import Any

import pytest

from support import faulty_envs
from support.rollouts import ECHO, make_config
from turnwise.config import RLConfig
from turnwise.diagnose.context import Context
from turnwise.diagnose.core import Finding, Result, Verdict, run_checks
from turnwise.diagnose.text_checks.calls import CallFailed, limited
from turnwise.diagnose.text_checks.environment import ENVIRONMENT
from turnwise.diagnose.text_checks.plan import PLAN

FAULTY = "support.faulty_envs:Faulty"


def look(folder: Path, env: str, **settings: Any) -> Finding:
    """The finding on an environment; a bare name is one of support.odd_envs."""
    env_id = f"support.odd_envs:{env}" if env[0].isupper() else env
    context = Context(make_config(env=[{"id": env_id, **settings}]), folder, lambda text: None)
    (result,) = run_checks([ENVIRONMENT], context, lambda result: None)
    return result.finding


@pytest.mark.parametrize("env", [ECHO, "Library", "wordle"])
def test_an_environment_that_keeps_its_contract_passes(env: str, tmp_path: Path):
    found = look(tmp_path, env)
    assert found.verdict is Verdict.PASS, found.evidence
    assert "tasks" in found.evidence
    assert "ms a step" in found.evidence


@pytest.mark.parametrize(
    "what", ["none", "short", "number", "nan_reward", "text_flags", "no_info", "unknown_component", "bad_metrics"]
)
def test_an_answer_outside_the_contract_fails(what: str, tmp_path: Path):
    found = look(tmp_path, FAULTY, args={"where": "step", "what": what})
    assert found.verdict is Verdict.FAIL
    assert "step returned" in found.evidence or "reward_components" in found.evidence or "metrics" in found.evidence
    assert "docs/environments.md" in found.remedy


@pytest.mark.parametrize("where", ["reset", "step", "finish"])
@pytest.mark.parametrize("what", ["raise", "exit"])
def test_an_environment_that_raises_fails_with_the_place(where: str, what: str, tmp_path: Path):
    found = look(tmp_path, FAULTY, args={"where": where, "what": what})
    assert found.verdict is Verdict.FAIL
    assert where in found.evidence
    assert f"raises {'ZeroDivisionError: planted' if what == 'raise' else 'SystemExit: 3'}" in found.evidence
    assert "faulty_envs.py" in found.evidence


def test_an_environment_that_hangs_fails_at_its_time_limit(tmp_path: Path):
    faulty_envs.release.clear()  # other tests leave it set
    try:
        found = look(tmp_path, FAULTY, args={"where": "step", "what": "hang"}, timeout_s=1.0)
    finally:
        faulty_envs.release.set()
    assert found.verdict is Verdict.FAIL
    assert "does not answer within orchestrator.env.timeout_s = 1 s" in found.evidence


def test_the_same_seed_with_another_beginning_fails(tmp_path: Path):
    found = look(tmp_path, "Forgetful")
    assert found.verdict is Verdict.FAIL
    assert "begins the same task with the same seed in two ways" in found.evidence
    assert "self.np_random" in found.remedy


def test_a_reward_outside_the_components_fails(tmp_path: Path):
    found = look(tmp_path, "Unpaid")
    assert "returns the reward 1, and its reward_components come to 0: training sees the components alone" in found.evidence


def test_an_episode_that_is_paid_twice_fails(tmp_path: Path):
    assert "finish() of PaysTwice pays twice for one episode" in look(tmp_path, "PaysTwice").evidence


def test_a_reply_of_many_characters_is_tried(tmp_path: Path):
    found = look(tmp_path, "FearsLength")
    assert "step on a reply of 64,000 characters of FearsLength raises MemoryError: too long" in found.evidence


def test_calls_that_cannot_be_run_are_tried(tmp_path: Path):
    found = look(tmp_path, "BreaksOnBadCalls")
    assert found.verdict is Verdict.FAIL
    assert "step on a reply with 3 calls that cannot be run of BreaksOnBadCalls raises TypeError" in found.evidence


def test_tasks_under_one_id_are_a_warning(tmp_path: Path):
    found = look(tmp_path, "Twins")
    assert found.verdict is Verdict.WARN
    assert "1 of the first 2 tasks of Twins have an id that others have, too" in found.evidence


def test_held_out_tasks_that_are_trained_on_are_a_warning(tmp_path: Path):
    found = look(tmp_path, "Peeking")
    assert found.verdict is Verdict.WARN
    assert "1 held-out tasks of Peeking are training tasks too, 'the-only-one' for one" in found.evidence


def test_an_evaluation_without_tasks_fails(tmp_path: Path):
    found = look(tmp_path, "NothingHeldOut")
    assert found.verdict is Verdict.FAIL
    assert "the evaluation on split 'validation' cannot begin" in found.evidence


@pytest.mark.parametrize("env_id", ["no_such_env", "no_such_module:Env", "support.rollouts:make_turn"])
def test_an_environment_that_cannot_be_made_fails(env_id: str, tmp_path: Path):
    found = look(tmp_path, env_id)
    assert found.verdict is Verdict.FAIL
    assert env_id.partition(":")[0] in found.evidence
    assert "[[orchestrator.env]]" in found.remedy


def boxed(folder: Path, **containers: Any) -> list[Result]:
    """Plan and environment where an environment works in containers."""
    config = RLConfig.model_validate(
        {
            "max_steps": 1,
            "output_dir": folder / "run",
            "model": {"name": "nobody/has-this-model"},
            "orchestrator": {"env": [{"id": "support.odd_envs:Boxed"}]},
            "containers": containers,
        }
    )
    with Context(config, folder, lambda text: None) as context:
        return run_checks([PLAN, ENVIRONMENT], context, lambda result: None)


def test_a_container_engine_that_does_not_answer_fails_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    plan, environment = boxed(tmp_path)
    assert plan.finding.verdict is Verdict.FAIL
    assert f"environments need containers: unix://{tmp_path}/no.sock does not answer" in plan.finding.evidence
    assert environment.blocked_by == "plan"


def test_bubblewrap_that_is_not_there_fails_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    plan, environment = boxed(tmp_path, backend="bubblewrap")
    assert "bwrap is not on the path" in plan.finding.evidence
    assert environment.blocked_by == "plan"


def test_an_environment_in_containers_is_given_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "bwrap").write_text("#!/bin/sh\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("turnwise.launch.dry_run.known_shape", lambda model: "config.json is not at hand")
    plan, environment = boxed(tmp_path, backend="bubblewrap")
    assert plan.finding.verdict is Verdict.PASS, plan.finding.evidence
    assert environment.finding.verdict is Verdict.PASS, environment.finding.evidence


def test_a_call_is_given_up_at_its_limit_and_its_answer_is_passed_on():
    assert limited("a call", lambda: 7, timeout_s=5) == 7
    with pytest.raises(CallFailed, match=r"a call does not answer within .* 0\.05 s"):
        limited("a call", lambda: time.sleep(0.5), timeout_s=0.05)
