"""The trainer's processes on GPUs: the same batches give what they give on a CPU, on one GPU and on two."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support.batches import make_batch
from turnwise.config import RLConfig
from turnwise.config.files import dump_toml
from turnwise.transport import BatchLog, RunDir, WeightsStore

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
STEPS = 3


def train(folder: Path, model: Path, gpus: list[int], options: dict[str, Any], dtype: str, ranks: int = 1) -> tuple[Path, str]:
    """Run three steps; the folder of the last version, and what the trainer printed."""
    trainer = {
        "threads": 1,
        "micro_batch_tokens": 128,
        "model": options,
        "optim": {"lr": 1e-3, "eps": 1e-3},
        "loss": {"kl_beta": 0.05, "importance_sampling": "truncate", "entropy_coef": 0.01},
    }
    tables = {"output_dir": str(folder), "max_steps": STEPS, "model": {"name": str(model), "dtype": dtype}, "trainer": trainer}
    config = RLConfig.model_validate(tables | {"gpus": {"trainer": gpus}})
    run_dir = RunDir(config.output_dir)
    for step in range(1, STEPS + 1):
        BatchLog(run_dir.batches).write(make_batch(step))
    run_dir.config.write_text(dump_toml(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-addr", "127.0.0.1"]
    command = [*torchrun, "--master-port", str(port), "-m", "turnwise.trainer", "--config", str(run_dir.config)]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    ready = WeightsStore(run_dir.weights).poll(STEPS)
    assert ready is not None
    return Path(ready.path), done.stdout


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("options", [{"lora": {"rank": 4}}, {"lora": None}], ids=["lora", "full"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_gpus_give_the_weights_of_a_cpu(tmp_path: Path, tiny_model: Path, options: dict[str, Any], ranks: int) -> None:
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    cpu, _ = train(tmp_path / "cpu", tiny_model, [], options, "float32")
    gpu, _ = train(tmp_path / "gpu", tiny_model, list(range(ranks)), options, "float32", ranks)
    torch.testing.assert_close(weights(gpu), weights(cpu), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("options", [{"lora": {"rank": 4}}, {"lora": None}], ids=["lora", "full"])
def test_a_bfloat16_model_trains_on_a_gpu(tmp_path: Path, tiny_model: Path, options: dict[str, Any]) -> None:
    folder, printed = train(tmp_path / "gpu", tiny_model, [0], options, "bfloat16")
    assert "step 3/3" in printed
    expected = torch.float32 if options["lora"] else torch.bfloat16
    assert {tensor.dtype for tensor in weights(folder).values()} == {expected}
