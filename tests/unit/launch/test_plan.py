"""The composed plan and the resolved configuration behind it."""

import json
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from turnwise.config import ConfigError, RLConfig, load_config
from turnwise.config.files import merge
from turnwise.inference.launcher import usable_cores
from turnwise.launch.child import Child
from turnwise.launch.describe import arithmetic_lines, weights_line
from turnwise.launch.dry_run import dry_run
from turnwise.launch.gpus import Gpu, Machine, TorchBuild, choose
from turnwise.launch.plan import ProcessSpec, compose
from turnwise.launch.ports import check_free, free_range, is_free
from turnwise.launch.resolve import resolve, with_defaults, write_resolved
from turnwise.launch.run import allocated
from turnwise.launch.survivors import RUN_ID
from turnwise.trainer.sharing import WAIT_FOR

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


GIB = 2**30
CUDA = TorchBuild("2.11.0+cu130", "13.0")
H200S = Machine(tuple(Gpu(str(i), f"GPU-{i}", "NVIDIA H200", 140 * GIB, 0) for i in range(8)), None, CUDA)


def resolved(folder: Path, model: Path, **changes: Any) -> RLConfig:
    return resolve(config(folder, model, **changes)).config


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


@pytest.mark.parametrize(
    ("gpus", "tp", "offered", "expected"),
    [
        (
            {"inference": [0, 1], "trainer": [2, 3, 4, 5, 6], "containers": [7]},
            1,
            None,
            {"inference": "0", "inference_1": "1", "trainer": "2,3,4,5,6"},
        ),
        ({"inference": [0, 1, 2, 3], "trainer": [4]}, 2, None, {"inference": "0,1", "inference_1": "2,3", "trainer": "4"}),
        ({"inference": [3, 1], "trainer": [2, 0]}, 2, None, {"inference": "3,1", "trainer": "2,0"}),
        ({"inference": [0], "trainer": [1, 2], "containers": [3]}, 1, "4,5,6,7", {"inference": "4", "trainer": "5,6"}),
        ({"inference": [1], "trainer": [0]}, 1, "GPU-6,GPU-2", {"inference": "GPU-2", "trainer": "GPU-6"}),
        ({"inference": [0], "trainer": [1]}, 1, "MIG-a,MIG-b", {"inference": "MIG-a", "trainer": "MIG-b"}),
        ({"inference": [0], "trainer": [0, 1], "share": True}, 1, None, {"inference": "0", "trainer": "0,1"}),
        ({"inference": [], "trainer": [5]}, 1, None, {"inference": "", "trainer": "5"}),
        ({"inference": [5], "trainer": []}, 1, None, {"inference": "5", "trainer": ""}),
    ],
)
def test_each_process_sees_its_gpus_and_no_others(
    tmp_path: Path, tiny_model: Path, gpus: dict[str, Any], tp: int, offered: str | None, expected: dict[str, str]
):
    machine = H200S if offered is None else Machine(tuple(choose(H200S.gpus, offered)), offered)
    asked = resolved(tmp_path, tiny_model, gpus=gpus, inference={"engine": "vllm", "tp": tp})
    plan = compose(asked, run_id="abc", machine=machine)
    assert {process.name: process.env["CUDA_VISIBLE_DEVICES"] for process in plan.processes} == {**expected, "orchestrator": ""}
    for process in plan.processes:
        assert process.env.get("CUDA_DEVICE_ORDER") == ("PCI_BUS_ID" if process.gpus else None)
        assert process.place == (f"GPU {', '.join(map(str, process.gpus))}" if process.gpus else "CPU")
    urls = [process.health_url for process in plan.of_role("inference")]
    assert len(set(urls)) == len(urls) == max(1, len(gpus["inference"]) // tp)
    (trainer,) = plan.of_role("trainer")
    assert trainer.argv[trainer.argv.index("--nproc-per-node") + 1] == str(max(1, len(gpus["trainer"])))
    for reserved in gpus.get("containers", []):
        assert all(machine.device(reserved) not in process.env["CUDA_VISIBLE_DEVICES"].split(",") for process in plan.processes)


def test_what_the_user_sets_for_nccl_reaches_every_process_untouched(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    plan = compose(resolved(tmp_path, tiny_model, **EIGHT), run_id="abc", machine=H200S)
    for process in plan.processes:
        assert not [key for key in process.env if key.startswith(("NCCL", "GLOO"))]
    log = tmp_path / "environment.stdout"
    child = Child(replace(plan.of_role("trainer")[0], argv=("env",), cwd=tmp_path, log=log))
    child.reap()
    lines = log.read_text().splitlines()
    assert {"NCCL_NVLS_ENABLE=0", "GLOO_SOCKET_IFNAME=eth7", "CUDA_VISIBLE_DEVICES=2,3,4,5,6"} <= set(lines)


def test_vllm_on_a_gpu_has_one_thread_and_trainers_a_share_of_the_cores(tmp_path: Path, tiny_model: Path):
    plan = compose(resolved(tmp_path, tiny_model, **EIGHT), run_id="abc", machine=H200S)
    assert plan.of_role("inference")[0].env["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS", "1")
    assert "OMP_NUM_THREADS" in plan.of_role("trainer")[0].env


ONE_GPU = {"gpus": {"inference": [0], "trainer": [0], "share": True}, "inference": {"engine": "vllm"}}


def test_a_trainer_that_shares_a_gpu_waits_for_all_engines_and_another_for_none(tmp_path: Path, tiny_model: Path):
    pair = {"gpus": {"inference": [0, 1], "trainer": [1], "share": True}, "inference": {"engine": "vllm"}}
    plan = compose(resolved(tmp_path, tiny_model, **pair), run_id="abc", machine=H200S)
    urls = [str(process.health_url) for process in plan.of_role("inference")]
    assert plan.of_role("trainer")[0].env[WAIT_FOR].split() == urls
    apart = compose(resolved(tmp_path, tiny_model, **EIGHT), run_id="abc", machine=H200S)
    assert WAIT_FOR not in apart.of_role("trainer")[0].env


def test_the_computed_split_reaches_vllm_and_the_configuration_of_the_run(tmp_path: Path, tiny_model: Path):
    said: list[str] = []
    run = allocated(resolve(config(tmp_path, tiny_model, **ONE_GPU)), said.append, H200S)
    assert run.config.gpus.inference_memory == 0.9
    command = compose(run.config, run_id="abc", machine=H200S).of_role("inference")[0].argv
    assert command[command.index("--gpu-memory-utilization") + 1] == "0.9"
    assert said == [line for line in said if line.startswith("GPU 0 (NVIDIA H200, 140.0 GiB) is shared: engine 126.0 GiB (90%)")]
    assert len(said) == 1


def test_a_run_is_refused_where_its_gpus_are_not(tmp_path: Path, tiny_model: Path):
    with pytest.raises(ConfigError, match=r"gpus\.trainer = \[2, 3, 4, 5, 6\] but this machine has 2 GPUs") as refused:
        allocated(resolve(config(tmp_path, tiny_model, **EIGHT)), print, Machine(H200S.gpus[:2], None, CUDA))
    assert "gpus.containers = [7] but this machine has 2 GPUs" in str(refused.value)


def test_a_run_on_the_cpu_asks_nothing_of_a_machine(tmp_path: Path, tiny_model: Path):
    said: list[str] = []
    before = resolve(config(tmp_path, tiny_model))
    assert allocated(before, said.append, Machine()).config == before.config
    assert said == []


def shown(wanted: RLConfig, machine: Machine, *, width: int = 200) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        dry_run(wanted, console=console, machine=machine)
    return captured.get()


def test_a_dry_run_for_eight_gpus_works_where_none_is(tmp_path: Path, tiny_model: Path):
    text = shown(config(tmp_path, tiny_model, **EIGHT), Machine())
    assert "GPUs: not checked: this machine has no GPUs." in text
    assert "trainer rank 4" in text
    assert "12 training tasks; 32 rollouts a step / 8 of each task = 4 tasks a step" in text
    assert "steps an epoch = floor(12 x 8 / 32) = 3; 4 steps = 1.33 epochs = 128 rollouts" in text
    assert not (tmp_path / "run").exists()
    assert "the memory split is computed where the GPUs are" in shown(config(tmp_path, tiny_model, **ONE_GPU), Machine())


def test_a_dry_run_where_gpus_are_missing_names_them_and_goes_on(tmp_path: Path, tiny_model: Path):
    text = shown(config(tmp_path, tiny_model, **EIGHT), Machine(H200S.gpus[:2], None, CUDA))
    assert "gpus.trainer = [2, 3, 4, 5, 6] but this machine has 2 GPUs (0, 1); use those." in text
    assert "trainer rank 4" in text


def test_a_dry_run_shows_the_split_and_each_gpu_against_what_it_has(tmp_path: Path, tiny_model: Path):
    busy = Machine((Gpu("0", "GPU-0", "NVIDIA H200", 140 * GIB, 100 * GIB),), None, CUDA)
    text = shown(config(tmp_path, tiny_model, **ONE_GPU), busy)
    assert "GPU 0 (NVIDIA H200, 140.0 GiB) is shared: engine 126.0 GiB (90%), trainer at most 9.7 GiB" in text
    assert "of 140.0 GiB (NVIDIA H200), 100.0 in use now" in text
    assert "warning: GPU 0 (NVIDIA H200, 140.0 GiB): other processes hold 100.0 GiB of it" in text
    assert "--gpu-memory-utilization 0.9 " in text


def test_a_dry_run_as_json(tmp_path: Path, tiny_model: Path):
    console = Console(width=80)
    with console.capture() as captured:
        dry_run(config(tmp_path, tiny_model, **ONE_GPU), as_json=True, console=console, machine=H200S)
    plan = json.loads(captured.get())
    assert [process["name"] for process in plan["processes"]] == ["inference", "trainer", "orchestrator"]
    assert plan["arithmetic"]["steps_per_epoch"] == 3
    assert plan["weights"] == "files"
    assert plan["memory"][0]["total"] == sum(plan["memory"][0]["parts"].values())
    (split,) = plan["gpus"]["splits"]
    assert (split["gpu"], split["engine"], split["total"]) == (0, int(0.9 * 140 * GIB), 140 * GIB)
    assert (len(plan["gpus"]["present"]), plan["gpus"]["errors"], plan["gpus"]["warnings"]) == (8, [], [])


def test_the_printed_plan_is_all_that_a_launcher_needs_to_place_processes(tmp_path: Path, tiny_model: Path):
    """Each entry of the JSON makes the same ProcessSpec again, and nothing in it points into this process."""
    console = Console(width=80)
    with console.capture() as captured:
        dry_run(config(tmp_path, tiny_model, **EIGHT), as_json=True, console=console, machine=H200S)
    for entry in json.loads(captured.get())["processes"]:
        typed = {"argv": tuple(entry["argv"]), "gpus": tuple(entry["gpus"]), "cwd": Path(entry["cwd"]), "log": Path(entry["log"])}
        spec = ProcessSpec(**{**entry, **typed})
        assert (spec.cwd.is_absolute(), spec.log.is_absolute(), Path(spec.argv[0]).is_absolute()) == (True, True, True)
        assert bool(spec.health_url) == (spec.role == "inference")
        assert len(spec.gpus) == (5 if spec.role == "trainer" else spec.role == "inference")


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


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "weights: each version is an adapter folder, which engines load beside the one before, without a pause"),
        ({"trainer": {"model": {"lora": None}}}, "weights: each version is a folder with the whole model"),
        (
            {"trainer": {"model": {"lora": None}, "weight_transfer": "broadcast"}},
            "weights: broadcast (gloo) from the trainer's memory to 1 engine worker, which pause meanwhile",
        ),
        (
            {**EIGHT, "trainer": {"model": {"lora": None}}},
            "weights: broadcast (NCCL) from GPU 2 to 2 engine workers, which pause meanwhile",
        ),
    ],
)
def test_the_plan_says_how_weights_travel(tmp_path: Path, tiny_model: Path, changes: dict[str, Any], line: str):
    console = Console(width=200)
    with console.capture() as captured:
        dry_run(config(tmp_path, tiny_model, **changes), console=console, machine=H200S)
    assert line in captured.get()
    filled = with_defaults(config(tmp_path, tiny_model, **changes), max_steps=1, model=str(tiny_model))
    assert weights_line(filled).startswith(line)
