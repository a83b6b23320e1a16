"""Four processes as two nodes of two: replicated over nodes, sharded inside them, with the weights of one process."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from support.batches import make_batch
from support.run_records import announcement, published
from turnwise.config import RLConfig
from turnwise.config.files import dump_toml
from turnwise.trainer.checkpoint_index import checkpoint_steps
from turnwise.trainer.loop import run_trainer
from turnwise.transport import BatchLog, RunDir

STEPS = 3
VARIANTS: dict[str, dict[str, Any]] = {
    # by the nodes that torchrun describes; moments in the CPU's memory
    "nodes": {"model": {"lora": None}, "optim": {"offload": True}},
    # by the key, on one node
    "replicas": {"model": {"lora": {"rank": 4}, "replicas": 2}, "loss": {"kl_beta": 0.05}},
}
ALONE: dict[str, dict[str, Any]] = {
    "nodes": {"model": {"lora": None}},
    "replicas": {"model": {"lora": {"rank": 4}}, "loss": {"kl_beta": 0.05}},
}


def config_in(folder: Path, model: Path, trainer: dict[str, Any], dtype: str = "float32") -> RLConfig:
    """Micro-batches so small that every rank has several: replicas sum their gradients after the last one only."""
    optim = {"lr": 1e-3, "eps": 1e-4, **trainer.get("optim", {})}
    options = {"rehearse": True, "threads": 1, "micro_batch_tokens": 32, "canaries": 0, **trainer, "optim": optim}
    tables = {"output_dir": str(folder), "max_steps": STEPS, "seq_len": 64, "trainer": options}
    config = RLConfig.model_validate(tables | {"ckpt": {"interval": 2}, "model": {"name": str(model), "dtype": dtype}})
    for step in range(1, STEPS + 1):
        BatchLog(RunDir(folder).batches).write(make_batch(step, groups=3, group_size=4))
    return config


def launch(config: RLConfig, *, nodes: int) -> list[tuple[int, str]]:
    """Four processes under one torchrun for each node; exit status and output of each."""
    path = RunDir(config.output_dir).config
    path.write_text(dump_toml(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes), "--nproc-per-node", str(4 // nodes)]
    address = ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    agents = [
        subprocess.Popen(
            [*torchrun, *address, "--node-rank", str(node), "-m", "turnwise.trainer", "--config", str(path)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(nodes)
    ]
    try:
        outputs = [agent.communicate(timeout=240)[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    return [(agent.returncode, output) for agent, output in zip(agents, outputs, strict=True)]


Runs = dict[str, tuple[RLConfig, RLConfig]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Runs:
    """Of each variant, the run of one process and that of four."""
    finished: Runs = {}
    for variant in VARIANTS:
        alone = config_in(tmp_path_factory.mktemp("alone") / "run", tiny_model, ALONE[variant])
        run_trainer(alone)
        four = config_in(tmp_path_factory.mktemp(variant) / "run", tiny_model, VARIANTS[variant])
        for code, output in launch(four, nodes=2 if variant == "nodes" else 1):
            assert code == 0, output
            if "policy v0" in output:
                assert "on 4 processes, 2 replicas each sharded over 2" in output
        finished[variant] = alone, four
    return finished


def weights(config: RLConfig, version: int = STEPS) -> dict[str, torch.Tensor]:
    return published(config, version)


def measured(config: RLConfig, version: int) -> dict[str, float]:
    """Metrics without clocks."""
    metrics = announcement(config, version).metrics
    return {name: value for name, value in metrics.items() if not name.startswith(("timing/", "perf/"))}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_nodes_of_two_give_the_weights_and_metrics_of_one_process(runs: Runs, variant: str) -> None:
    one, four = runs[variant]
    for version in range(STEPS + 1):
        torch.testing.assert_close(weights(four, version), weights(one, version), rtol=1e-4, atol=2e-6)
    for version in range(1, STEPS + 1):
        assert measured(four, version) == pytest.approx(measured(one, version), rel=1e-3, abs=1e-5)
    moved = sum(float((weights(one)[name] - weights(one, 0)[name]).square().sum()) for name in weights(one)) ** 0.5
    assert moved > 1e-2  # there was something to get wrong


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_process_goes_on_from_a_checkpoint_of_two_nodes(runs: Runs, tmp_path: Path, variant: str) -> None:
    one, four = runs[variant]
    shutil.copytree(four.output_dir, tmp_path / "run")
    resumed = one.model_copy(update={"output_dir": tmp_path / "run"})
    assert checkpoint_steps(tmp_path / "run") == [2, 3]
    run_trainer(resumed, resume_step=2)
    torch.testing.assert_close(weights(resumed), weights(four), rtol=1e-4, atol=2e-6)


def test_bfloat16_over_float32_master_weights_is_the_same_on_four_processes(tmp_path: Path, tiny_model: Path) -> None:
    """Both compute in bfloat16, whose rounding depends on the packing; gradients are summed and weights kept in float32."""
    trainer = {"model": {"lora": None, "replicas": 2}}
    alone = config_in(tmp_path / "alone", tiny_model, {"model": {"lora": None}}, "bfloat16")
    run_trainer(alone)
    four = config_in(tmp_path / "four", tiny_model, trainer, "bfloat16")
    ((code, output),) = launch(four, nodes=1)
    assert code == 0, output
    for version in range(1, STEPS + 1):
        for name, value in measured(four, version).items():
            assert value == pytest.approx(measured(alone, version)[name], rel=0.05, abs=0.02), name
    for name, tensor in weights(four).items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor, weights(alone)[name], rtol=0.02, atol=2e-3)
