"""The commands that start engines."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import turnwise.kernels
from turnwise.config import ConfigError, RLConfig
from turnwise.inference import launcher
from turnwise.inference.client import KEEP_ALIVE_S
from turnwise.inference.launcher import check_engine, engine_commands, lora_rank_limit
from turnwise.inference.wire import FLOAT32_NORMS


def config(**inference: Any) -> RLConfig:
    return RLConfig.model_validate({"model": {"name": "some/model"}, "inference": {"port": 9000, **inference}})


def flag(argv: tuple[str, ...], name: str) -> str:
    return argv[argv.index(name) + 1]


def test_the_embedded_engine_is_started_once_for_each_replica() -> None:
    commands = engine_commands(config(dp=2, embedded={"threads": 3}), Path("/run/config.toml"), gpus=[])
    assert [command.url for command in commands] == ["http://127.0.0.1:9000", "http://127.0.0.1:9001"]
    assert [command.name for command in commands] == ["inference", "inference_1"]
    assert commands[1].argv[1:] == (
        *("-m", "turnwise.inference.embedded", "--config", "/run/config.toml", "--port", "9001", "--host", "127.0.0.1"),
    )
    assert commands[0].env == {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "PASSIVE"}


def test_vllm_serves_the_base_model_and_adapters_with_processed_logprobs() -> None:
    (command,) = engine_commands(config(engine="vllm"), Path("/run/config.toml"), gpus=[0])
    assert flag(command.argv, "--logprobs-mode") == "processed_logprobs"
    assert flag(command.argv, "--generation-config") == "vllm"
    assert flag(command.argv, "--served-model-name") == "some/model"
    assert flag(command.argv, "--max-loras") == "4"  # max_staleness 1, and three
    assert flag(command.argv, "--max-lora-rank") == "16"
    first = command.argv.index("--lora-target-modules") + 1
    assert command.argv[first : first + 7] == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert flag(command.argv, "--max-model-len") == "2049"
    assert "--enable-lora" in command.argv
    assert "--enforce-eager" not in command.argv
    assert command.env["VLLM_SERVER_DEV_MODE"] == "1"
    assert command.env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert "VLLM_CPU_KVCACHE_SPACE" not in command.env


def test_vllm_serves_the_packed_folder_under_the_name_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """And without kernels that round activations, too."""
    monkeypatch.setenv("VLLM_DISABLED_KERNELS", "Chosen")
    plain = config(engine="vllm")
    packed = plain.model_copy(update={"model": plain.model.model_copy(update={"quantized": Path("/cache/packed")})})
    (command,) = engine_commands(packed, Path("c"), gpus=[0])
    assert flag(command.argv, "--model") == "/cache/packed"
    assert flag(command.argv, "--served-model-name") == "some/model"
    assert command.env["VLLM_DISABLED_KERNELS"].split(",")[:2] == ["Chosen", "FlashInferMxFp4LinearKernel"]
    assert "MarlinMxFp4LinearKernel" not in command.env["VLLM_DISABLED_KERNELS"]
    (command,) = engine_commands(plain, Path("c"), gpus=[0])
    assert flag(command.argv, "--model") == "some/model"
    assert "VLLM_DISABLED_KERNELS" not in command.env


def test_vllm_gets_the_worker_extension_and_a_path_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/of/the/user")
    (command,) = engine_commands(config(engine="vllm"), Path("c"), gpus=[0])
    assert flag(command.argv, "--worker-extension-cls") == "turnwise.inference.vllm_worker.WorkerExtension"
    assert command.env["PYTHONPATH"] == os.pathsep.join([str(launcher.ENGINE_PATH), "/of/the/user"])
    monkeypatch.delenv("PYTHONPATH")
    (command,) = engine_commands(config(engine="vllm"), Path("c"), gpus=[0])
    assert command.env["PYTHONPATH"] == str(launcher.ENGINE_PATH)


def test_vllm_on_a_gpu_has_one_cpu_thread_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (command,) = engine_commands(config(engine="vllm"), Path("c"), gpus=[0])
    assert command.env["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    (command,) = engine_commands(config(engine="vllm"), Path("c"), gpus=[0])
    assert command.env["OMP_NUM_THREADS"] == "6"


def test_replicas_of_vllm_draw_different_noise() -> None:
    commands = engine_commands(config(engine="vllm", dp=3), Path("c"), gpus=[0, 1, 2])
    assert [flag(command.argv, "--seed") for command in commands] == ["0", "1", "2"]


def test_vllm_keeps_idle_connections_longer_than_the_client() -> None:
    (command,) = engine_commands(config(engine="vllm"), Path("c"), gpus=[0])
    assert float(command.env["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"]) > KEEP_ALIVE_S


def test_vllm_answers_token_requests_the_short_way_unless_told_otherwise() -> None:
    (command,) = engine_commands(config(engine="vllm"), Path("c"), gpus=[0])
    assert flag(command.argv, "--middleware") == "turnwise.inference.vllm_route.TokenRoute"
    (plain,) = engine_commands(config(engine="vllm", vllm={"middleware": []}), Path("c"), gpus=[0])
    assert "--middleware" not in plain.argv


def test_on_that_path_another_interpreter_finds_this_package_and_nothing_else_of_its_environment(tmp_path: Path) -> None:
    code = (
        "import importlib.util, turnwise.kernels\n"
        "print(turnwise.kernels.__file__, *(importlib.util.find_spec(name) for name in ('msgspec', 'torch', 'tests')))"
    )
    argv = [sys.executable, "-S", "-c", code]  # -S: without the packages of this environment
    env = {"PYTHONPATH": str(launcher.ENGINE_PATH)}
    result = subprocess.run(argv, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.split() == [turnwise.kernels.__file__, "None", "None", "None"]


@pytest.mark.parametrize(
    ("inflight", "gpus", "expected"),
    [
        (None, [0], None),
        (204, [0], None),
        (205, [0], "257"),
        (400, [0, 1], None),
        (640, [0, 1], "400"),
        (5000, [0], "1024"),
    ],
)
def test_vllm_decodes_as_many_sequences_as_a_replica_may_get_within_bounds(
    inflight: int | None, gpus: list[int], expected: str | None
) -> None:
    """Its own default is at least 256."""
    run = RLConfig.model_validate(
        {
            "model": {"name": "m"},
            "inference": {"engine": "vllm", "port": 9000},
            "orchestrator": {"max_inflight": inflight, "batch_size": 64, "rollouts_per_example": 8},
        }
    )
    command = engine_commands(run, Path("c"), gpus=gpus)[0]
    assert (flag(command.argv, "--max-num-seqs") if "--max-num-seqs" in command.argv else None) == expected


def test_on_a_gpu_vllm_keeps_prefixes_and_writes_no_access_log() -> None:
    (command,) = engine_commands(config(engine="vllm"), Path("c"), gpus=[0])
    assert {"--enable-prefix-caching", "--disable-uvicorn-access-log"} <= set(command.argv)


def test_vllm_on_a_cpu_gets_its_variables() -> None:
    (command,) = engine_commands(config(engine="vllm", embedded={"threads": 2}), Path("c"), gpus=[])
    assert command.env["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert command.env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert command.env["OMP_NUM_THREADS"] == "2"
    assert "--enforce-eager" in command.argv
    assert "--no-enable-chunked-prefill" in command.argv


def test_one_vllm_is_started_for_each_group_of_tp_gpus() -> None:
    commands = engine_commands(config(engine="vllm", tp=2), Path("c"), gpus=[0, 1, 2, 3])
    assert len(commands) == 2
    assert {flag(command.argv, "--tensor-parallel-size") for command in commands} == {"2"}


def test_the_engines_part_of_a_gpu_becomes_a_flag_that_vllms_own_setting_overrides() -> None:
    half = RLConfig.model_validate(config(engine="vllm").model_dump() | {"gpus": {"inference": [0], "inference_memory": 0.5}})
    (command,) = engine_commands(half, Path("c"), gpus=[0])
    assert flag(command.argv, "--gpu-memory-utilization") == "0.5"
    tables = half.model_dump()
    tables["inference"]["vllm"] = {"gpu_memory_utilization": 0.7}
    (command,) = engine_commands(RLConfig.model_validate(tables), Path("c"), gpus=[0])
    assert flag(command.argv, "--gpu-memory-utilization") == "0.7"
    assert command.argv.count("--gpu-memory-utilization") == 1
    (on_cpu,) = engine_commands(half, Path("c"), gpus=[])
    assert "--gpu-memory-utilization" not in on_cpu.argv


def test_settings_of_the_vllm_table_become_flags_and_win() -> None:
    table = {"gpu_memory_utilization": 0.5, "max_model_len": 100, "enable_prefix_caching": False, "hf_overrides": {"a": 1}}
    (command,) = engine_commands(config(engine="vllm", vllm=table), Path("c"), gpus=[0])
    assert flag(command.argv, "--gpu-memory-utilization") == "0.5"
    assert flag(command.argv, "--max-model-len") == "100"
    assert command.argv.count("--max-model-len") == 1
    assert json.loads(flag(command.argv, "--hf-overrides")) == {"a": 1}
    assert "--no-enable-prefix-caching" in command.argv


@pytest.mark.parametrize(
    ("noise", "expected"),
    [({}, {FLOAT32_NORMS: True}), ({"float32_norms": False}, None), (None, None)],
)
def test_norms_that_will_get_noise_are_float32_from_the_start(
    noise: dict[str, Any] | None, expected: dict[str, bool] | None
) -> None:
    (command,) = engine_commands(config(engine="vllm", noise=noise), Path("c"), gpus=[0])
    given = json.loads(flag(command.argv, "--additional-config")) if "--additional-config" in command.argv else None
    assert given == expected


def test_the_context_never_exceeds_the_positions_of_the_model(tiny_model: Path) -> None:
    settings = RLConfig.model_validate(
        {"seq_len": 5000, "model": {"name": str(tiny_model)}, "inference": {"engine": "vllm", "port": 9000}}
    )
    (command,) = engine_commands(settings, Path("c"), gpus=[0])
    assert flag(command.argv, "--max-model-len") == "2048"


def test_full_fine_tuning_needs_no_adapters() -> None:
    settings = RLConfig.model_validate(
        {"inference": {"engine": "vllm", "port": 9000}, "trainer": {"model": {"lora": None}}, "model": {"name": "m"}}
    )
    (command,) = engine_commands(settings, Path("c"), gpus=[0])
    assert "--enable-lora" not in command.argv


@pytest.mark.parametrize(("rank", "limit"), [(1, 8), (8, 8), (9, 16), (48, 64), (257, 320), (512, 512)])
def test_the_rank_is_rounded_up_to_what_vllm_accepts(rank: int, limit: int) -> None:
    assert lora_rank_limit(rank) == limit


def test_a_rank_beyond_vllm_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank = 513"):
        lora_rank_limit(513)


def test_vllm_with_its_administrative_routes_stays_on_loopback() -> None:
    with pytest.raises(ConfigError, match=r"inference.host = .0.0.0.0."):
        engine_commands(config(engine="vllm", host="0.0.0.0"), Path("c"), gpus=[0])


def test_a_missing_vllm_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(launcher.VLLM_PYTHON, raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install turnwise\[vllm\]"):
        check_engine(config(engine="vllm"))
    check_engine(config())


def test_another_python_may_have_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(launcher.VLLM_PYTHON, sys.executable)
    check_engine(config(engine="vllm"))
    (command,) = engine_commands(config(engine="vllm"), Path("c"), gpus=[0])
    assert command.argv[0] == sys.executable
    monkeypatch.setenv(launcher.VLLM_PYTHON, "/no/such/python")
    with pytest.raises(ConfigError, match="does not exist"):
        check_engine(config(engine="vllm"))


def test_neither_launcher_nor_client_loads_torch() -> None:
    code = "import sys, turnwise.inference, turnwise.inference.launcher; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "False"
