"""Could this run start and end on this machine?"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from support.planted_checks import tables
from turnwise.config import RLConfig
from turnwise.config.files import merge
from turnwise.diagnose.context import Context
from turnwise.diagnose.core import Finding, Verdict, run_checks
from turnwise.diagnose.text_checks.plan import PLAN, checkpoint_bytes, existing, kept_checkpoints
from turnwise.inference.launcher import VLLM_PYTHON
from turnwise.launch.gpus import Gpu, Machine, TorchBuild
from turnwise.launch.shape import read_shape

Look = Callable[..., Finding]


@pytest.fixture
def look(tiny_model: Path, tmp_path: Path) -> Look:
    """The finding on the small run with these changes."""

    def judge(changes: dict[str, Any] | None = None, **orchestrator: Any) -> Finding:
        given = tables(tiny_model, tmp_path, **orchestrator)
        config = RLConfig.model_validate(merge(given, changes or {}))
        (result,) = run_checks([PLAN], Context(config, tmp_path / "scratch", lambda text: None), lambda result: None)
        return result.finding

    return judge


def test_a_run_that_fits_passes_with_its_arithmetic(look: Look):
    found = look()
    assert found.verdict is Verdict.PASS, found.evidence
    assert found.evidence == "4 steps of 8 rollouts on the CPU"
    assert "8 rollouts a step / 4 of each task = 2 tasks a step" in found.lines[0]


def test_gpus_that_are_not_there_fail(look: Look, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = look({"gpus": {"trainer": [0, 1]}})
    assert found.verdict is Verdict.FAIL
    assert "gpus.trainer = [0, 1] but CUDA_VISIBLE_DEVICES = '' in the environment hides all GPUs" in found.evidence


def test_gpus_that_are_there_pass_with_who_has_which(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VLLM_PYTHON, sys.executable)
    config = RLConfig.model_validate({**tables(tiny_model, tmp_path), "gpus": {"inference": [0], "trainer": [1]}})
    context = Context(config, tmp_path / "scratch", lambda text: None)
    gpus = tuple(Gpu(str(index), f"GPU-{index}", "a GPU", 24 * 2**30, 0) for index in range(2))
    context.machine = Machine(gpus, None, TorchBuild("2.11.0", "13.0"))
    found = PLAN.run(context)
    assert found.verdict is Verdict.PASS, found.evidence
    assert found.evidence == "4 steps of 8 rollouts with engines on [0], the trainer on [1]"


def test_an_engine_that_is_not_installed_fails(look: Look, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VLLM_PYTHON, "/no/such/python")
    found = look({"inference": {"engine": "vllm"}})
    assert found.verdict is Verdict.FAIL
    assert "/no/such/python does not exist" in found.evidence


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": {"name": "/no/such/folder"}}, "there is no such folder"),
        ({"model": {"chat_template": "/no/such/template"}}, "no such file"),
        ({"stop": {"abort_when": "mean("}}, "[stop]"),
        ({"max_steps": None, "epochs": 0.01}, "come to no whole step"),
    ],
)
def test_what_a_dry_run_refuses_fails(look: Look, changes: dict[str, Any], told: str):
    found = look(changes)
    assert found.verdict is Verdict.FAIL
    assert told in found.evidence


def test_a_full_disk_fails_and_a_nearly_full_one_warns(look: Look, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1000))
    found = look()
    assert found.verdict is Verdict.FAIL
    assert "checkpoints take about" in found.evidence
    assert "ckpt.keep_last" in found.remedy
    needed = int(found.data["checkpoint_bytes"])
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=int(1.2 * needed)))
    assert look().verdict is Verdict.WARN


def test_a_machine_with_too_little_memory_fails(look: Look, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=2**28, available=2**27))
    found = look()
    assert found.verdict is Verdict.FAIL
    assert "GiB of RAM are needed, and this machine has 0.2 GiB, of which 0.1 are free" in found.evidence
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=2**40, available=2**27))
    assert look().verdict is Verdict.WARN


def test_turns_that_do_not_fit_a_sequence_are_a_warning(look: Look):
    found = look(sampling={"max_tokens": 300})
    assert found.verdict is Verdict.WARN
    assert "3 turns of Echo with up to 300 tokens are 900, and seq_len = 512" in found.evidence


def test_replies_as_long_as_a_sequence_are_a_warning(look: Look):
    found = look(sampling={"max_tokens": 512})
    assert "orchestrator.sampling.max_tokens = 512 leaves no room for a prompt in seq_len = 512" in found.evidence


def test_a_warm_up_that_never_ends_is_a_warning(look: Look):
    found = look({"trainer": {"optim": {"warmup_steps": 4}}})
    assert "trainer.optim.warmup_steps = 4 of 4 steps: the learning rate never reaches trainer.optim.lr" in found.evidence


def test_fewer_tasks_than_a_step_plays_are_a_warning(look: Look):
    found = look(batch_size=40)
    assert "a step plays 10 tasks and there are 5: some more than once" in found.evidence


def test_an_environment_that_cannot_be_made_is_not_the_plans_fault_with_given_steps(look: Look):
    found = look(env=[{"id": "no_such_module:Env"}])
    assert found.verdict is Verdict.PASS
    assert "unknown number of training tasks" in found.lines[0]


def test_checkpoints_hold_what_trains_and_its_moments(tiny_model: Path):
    shape = read_shape(tiny_model)
    lora = RLConfig.model_validate({"trainer": {"model": {"lora": {"rank": 4, "target_modules": ["q_proj"]}}}})
    assert checkpoint_bytes(lora, shape) == 2 * 4 * (64 + 64) * 16
    full = RLConfig.model_validate({"trainer": {"model": {"lora": None}}})
    assert checkpoint_bytes(full, shape) == shape.parameters * 16


@pytest.mark.parametrize(
    ("ckpt", "steps", "kept"),
    [
        ({}, 100, 1),
        ({"interval": 20}, 100, 5),
        ({"interval": 20, "keep_last": 2, "keep_best": 0}, 100, 3),
        ({"interval": 30, "keep_last": None}, 100, 4),
        ({"interval": 10}, 100, 5),
    ],
)
def test_so_many_checkpoints_are_on_disk_together(ckpt: dict[str, Any], steps: int, kept: int):
    assert kept_checkpoints(RLConfig.model_validate({"max_steps": steps, "ckpt": ckpt})) == kept


def test_the_disk_is_that_of_the_nearest_folder_that_exists(tmp_path: Path):
    assert existing(tmp_path / "a" / "b") == tmp_path
