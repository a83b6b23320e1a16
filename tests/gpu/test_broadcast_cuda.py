"""Weights by NCCL from this process's GPU to a process on another."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from turnwise.transport import BroadcastError, Manifest, Sender, plan_buckets, spec_of, tensor_digest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
WORKER = Path(__file__).parents[1] / "support" / "broadcast_worker.py"
TIMEOUT_S = 60


def weights(version: int) -> dict[str, Tensor]:
    """About 0.5 GB, with tensors larger and smaller than a bucket."""
    generator = torch.Generator("cuda:0").manual_seed(version)
    shapes = {"embed": (40_000, 2_560), "norm": (2_560,), "scale": (), "up": (9_728, 2_560), "down": (2_560, 9_728)}
    return {name: torch.randn(shape, generator=generator, device="cuda:0").bfloat16() for name, shape in shapes.items()}


def announce(folder: Path, version: int, tensors: dict[str, Tensor]) -> Manifest:
    manifest = Manifest(version, "nccl", 2, plan_buckets([spec_of(*pair) for pair in tensors.items()], limit_bytes=2**26))
    (folder / str(version)).mkdir()
    manifest.write(folder / str(version))
    (folder / str(version) / "go").touch()
    return manifest


@contextlib.contextmanager
def worker_of(source: Sender, folder: Path, *more: str) -> "Generator[subprocess.Popen[str]]":
    command = [sys.executable, str(WORKER), source.rendezvous, "1", str(folder), str(TIMEOUT_S), *more]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as worker:
        try:
            yield worker
        finally:
            worker.kill()


def test_a_worker_on_another_gpu_gets_each_version_to_the_bit(tmp_path: Path) -> None:
    torch.cuda.set_device(0)
    source = Sender(backend="nccl", workers=1, timeout_s=TIMEOUT_S)
    digests: list[str] = []
    with worker_of(source, tmp_path, "--versions", "3") as worker:
        for version in range(3):
            tensors = weights(version)
            source.send(announce(tmp_path, version, tensors), tensors.items())
            digests.append(tensor_digest(tensors))
        output, _ = worker.communicate(timeout=TIMEOUT_S)
    source.close()
    assert output.split() == digests
    assert len(set(digests)) == 3


def test_a_worker_that_dies_is_named_and_the_gpu_stays_usable(tmp_path: Path) -> None:
    """NCCL by itself would wait for ever."""
    torch.cuda.set_device(0)
    source = Sender(backend="nccl", workers=1, timeout_s=TIMEOUT_S)
    tensors = weights(0)
    manifest = announce(tmp_path, 0, tensors)

    def send_twice() -> None:
        """The rest of the first version may still get through: its transfers were begun before the worker died."""
        source.send(manifest, tensors.items())
        source.send(manifest, tensors.items())

    with worker_of(source, tmp_path, "--die-after", "1") as worker:
        with pytest.raises(BroadcastError, match=r"trainer: weights v0, bucket \d of \d: worker 1 \(process \d+\) is gone"):
            send_twice()
        assert worker.wait(TIMEOUT_S) == 9
    assert float(torch.ones(1000, device="cuda:0").sum()) == 1000
