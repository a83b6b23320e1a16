"""The composed plan and the resolved configuration behind it."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from turnwise.config import ConfigError, RLConfig, load_config
from turnwise.config.files import merge
from turnwise.inference.launcher import usable_cores
from turnwise.launch.describe import arithmetic_lines, missing_gpus
from turnwise.launch.dry_run import dry_run
from turnwise.launch.plan import compose, engines, visible_gpus
from turnwise.launch.ports import check_free, free_range, is_free
from turnwise.launch.resolve import resolve, with_defaults, write_resolved
from turnwise.launch.survivors import RUN_ID

EIGHT = {
    "gpus": {"inference": [0, 1], "trainer": [2, 3, 4, 5, 6], "containers": [7]},
    "inference": {"engine": "vllm"},
}


def config(folder: Path, model_name: Path | str, **changes: Any) -> RLConfig:
    base = {
        "output_dir": folder / "run",
        "max_steps": 4,
        "model": {"name": str(model_name)},
        "orchestrator": {"env": [{"id": "wordle", "args": {"num_train": 12}}]},
    }
    return RLConfig.model_validate(merge(base, changes))


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")


def test_everything_is_filled_in(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    written = config(tmp_path, tiny_model, output_dir="here", max_steps=None, epochs=2, orchestrator={"max_staleness": 2})
    filled = resolve(written).config
    assert filled.output_dir == tmp_path / "here"
    assert filled.trajectories_dir == tmp_path / "here" / "trajectories"
    assert (filled.run_name, filled.max_steps, filled.epochs) == ("here", 6, None)
    assert filled.model.name == str(tiny_model.resolve())
    assert filled.inference.dp == 1
    assert is_free(filled.inference.host, filled.inference.port or 0)
    assert (filled.inference.max_loras, filled.orchestrator.max_inflight) == (5, 96)
    assert not filled.inference.embedded.deterministic
    write_resolved(filled, tmp_path / "config.toml")
    assert load_config(tmp_path / "config.toml").model_dump() == filled.model_dump()


def test_strictly_alternating_runs_are_deterministic(tmp_path: Path, tiny_model: Path):
    strict = config(tmp_path, tiny_model, orchestrator={"max_staleness": 0})
    assert resolve(strict).config.inference.embedded.deterministic


def test_replicas_follow_from_the_gpus(tmp_path: Path, tiny_model: Path):
    assert resolve(config(tmp_path, tiny_model, **EIGHT)).config.inference.dp == 2
    halves = merge(EIGHT, {"inference": {"tp": 2}})
    assert resolve(config(tmp_path, tiny_model, **halves)).config.inference.dp == 1


def test_a_port_in_use_is_refused_with_its_number(tmp_path: Path, tiny_model: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"inference\.port = {port}: port {port} on 127\.0\.0\.1 is in use"):
            resolve(config(tmp_path, tiny_model, inference={"port": port}))
        with pytest.raises(ConfigError, match=rf"port {port} on"):
            check_free("127.0.0.1", port, 1)


def test_a_host_that_is_not_this_machine_is_refused():
    with pytest.raises(ConfigError, match=r"is no address of this machine"):
        free_range("203.0.113.7", 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stop": {"success_when": "running_mean(total_reward >"}}, r"\[stop\]"),
        ({"model": {"chat_template": "nowhere.jinja"}}, r'model\.chat_template = "nowhere\.jinja": no such file'),
        ({"model": {"name": "./nowhere"}}, r'model\.name = "\./nowhere"'),
        ({"orchestrator": {"env": [{"id": "wordel"}]}}, r'orchestrator\.env id = "wordel" cannot be used'),
    ],
)
def test_what_is_named_and_not_there_is_refused_before_anything_starts(
    tmp_path: Path, tiny_model: Path, changes: dict[str, Any], words: str
):
    for check in (resolve, dry_run):
        broken = config(tmp_path, tiny_model, **merge({"max_steps": None, "epochs": 1}, changes))
        with pytest.raises(ConfigError, match=words):
            check(broken)


def test_the_processes_of_a_cpu_run(tmp_path: Path, tiny_model: Path):
    resolved = resolve(config(tmp_path, tiny_model, trainer={"processes": 2})).config
    plan = compose(resolved, run_id="abc")
    assert [process.name for process in plan.processes] == ["inference", "trainer", "orchestrator"]
    for process in plan.processes:
        assert process.env[RUN_ID] == "abc"
        assert process.env["CUDA_VISIBLE_DEVICES"] == ""
        assert process.env["TOKENIZERS_PARALLELISM"] == "false"
        assert process.log == tmp_path / "run" / "logs" / f"{process.name}.stdout"
        assert "--resume-step" not in process.argv
    inference, trainer, _ = plan.processes
    assert inference.health_url == f"http://127.0.0.1:{resolved.inference.port}/health"
    assert trainer.argv[trainer.argv.index("--nproc-per-node") + 1] == "2"
    assert trainer.env["OMP_NUM_THREADS"] == str(max(1, usable_cores() // 2))
    assert trainer.env["OMP_WAIT_POLICY"] == "PASSIVE"


def test_a_resumed_run_tells_trainer_and_orchestrator_where_it_stands(tmp_path: Path, tiny_model: Path):
    plan = compose(resolve(config(tmp_path, tiny_model)).config, run_id="abc", resume_step=7)
    for role in ("trainer", "orchestrator"):
        assert plan.of_role(role)[0].argv[-2:] == ("--resume-step", "7")


@pytest.mark.usefixtures("eight_gpus")
def test_each_process_sees_only_its_gpus(tmp_path: Path, tiny_model: Path):
    plan = compose(resolve(config(tmp_path, tiny_model, **EIGHT)).config, run_id="abc")
    seen = {process.name: process.env["CUDA_VISIBLE_DEVICES"] for process in plan.processes}
    assert seen == {"inference": "0", "inference_1": "1", "trainer": "2,3,4,5,6", "orchestrator": ""}
    ports = [process.health_url for process in plan.of_role("inference")]
    assert len(set(ports)) == 2


def test_gpus_are_counted_along_what_a_cluster_offers(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-abc")
    assert visible_gpus() == ["4", "GPU-abc"]
    here = config(tmp_path, tiny_model, gpus={"inference": [0], "trainer": [1]})
    resolved = resolve(here).config
    assert missing_gpus(resolved) == []
    assert engines(resolved, {})[0].env["CUDA_VISIBLE_DEVICES"] == "4"
    assert compose(resolved, run_id="x").of_role("trainer")[0].env["CUDA_VISIBLE_DEVICES"] == "GPU-abc"


def test_a_dry_run_for_eight_gpus_works_where_none_is(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    console = Console(record=True, width=160, file=None, quiet=False)
    with console.capture() as captured:
        dry_run(config(tmp_path, tiny_model, **EIGHT), console=console)
    text = captured.get()
    assert "gpus: this machine has no NVIDIA GPUs; missing: 0, 1, 2, 3, 4, 5, 6, 7." in text
    assert "trainer rank 4" in text
    assert "12 training tasks; 32 rollouts a step / 8 of each task = 4 tasks a step" in text
    assert "steps an epoch = floor(12 x 8 / 32) = 3; 4 steps = 1.33 epochs = 128 rollouts" in text
    assert not (tmp_path / "run").exists()


def test_a_dry_run_as_json(tmp_path: Path, tiny_model: Path):
    console = Console(width=80)
    with console.capture() as captured:
        dry_run(config(tmp_path, tiny_model), as_json=True, console=console)
    plan = json.loads(captured.get())
    assert [process["name"] for process in plan["processes"]] == ["inference", "trainer", "orchestrator"]
    assert plan["arithmetic"]["steps_per_epoch"] == 3
    assert plan["memory"][0]["total"] == sum(plan["memory"][0]["parts"].values())


def test_a_dry_run_goes_on_when_tasks_cannot_be_counted(tmp_path: Path, tiny_model: Path):
    def offline(_: object) -> int:
        raise ConfigError("the data set is not at hand")

    console = Console(width=160)
    with console.capture() as captured:
        dry_run(config(tmp_path, tiny_model), console=console, count=offline)
    assert "unknown number of training tasks: the data set is not at hand" in captured.get()
    with pytest.raises(ConfigError, match="not at hand"):
        dry_run(config(tmp_path, tiny_model, max_steps=None, epochs=1), console=console, count=offline)


def test_the_arithmetic_is_told_in_sentences(tmp_path: Path, tiny_model: Path):
    written = config(tmp_path, tiny_model, orchestrator={"eval": {"interval": 2}})
    resolved = resolve(written)
    assert arithmetic_lines(resolved.arithmetic, resolved.config)[2] == (
        "held-out evaluation at the start, every 2 steps, and at the end; "
        "a sample may lag 1 steps behind the policy that trains on it"
    )


def test_defaults_can_be_filled_without_counting_or_preparing(tmp_path: Path):
    filled = with_defaults(config(tmp_path, "owner/name"), max_steps=3, model="owner/name", port=1234)
    assert (filled.max_steps, filled.model.name, filled.inference.port) == (3, "owner/name", 1234)
