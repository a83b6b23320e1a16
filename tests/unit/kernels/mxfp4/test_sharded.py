"""Packed weights under FSDP2: the same values as whole ones, in a part of the memory."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from turnwise.kernels.mxfp4 import MXFP4Linear
from turnwise.kernels.mxfp4.sharded import PackedWeight, ShardedMXFP4Linear, shard_packed

WORKER = Path(__file__).parents[3] / "support" / "sharded_worker.py"


def passes(folder: Path, ranks: int, *arguments: str) -> list[dict[str, Any]]:
    """What each rank saw."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "127.0.0.1:0", "--local-addr", "127.0.0.1", str(WORKER), str(folder), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    files = sorted(folder.glob("rank*.json"))
    assert len(files) == ranks, done.stderr[-4000:]
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("ranks", [2, 3])
def test_sharded_weights_compute_what_whole_ones_do(tmp_path: Path, ranks: int):
    rows = -(-100 // ranks)
    for seen in passes(tmp_path, ranks):
        assert seen["equal"] == [True, True]
        assert max(seen["gradients"]) < 1e-6
        assert seen["local"] == [[rows, 32], [rows, 2]]
        assert seen["gathered"] == 2
        assert seen["bytes_after"] == 0  # what was gathered is freed again
        assert "sharded: its bytes are together only during the passes" in seen["refusal"]


def test_compiled_blocks_stay_one_graph_each(tmp_path: Path):
    for seen in passes(tmp_path, 2, "compile"):
        assert seen["equal"] == [True, True]
        assert max(seen["gradients"]) < 1e-6


@pytest.fixture
def layer() -> MXFP4Linear:
    torch.manual_seed(0)
    return MXFP4Linear.from_linear(nn.Linear(64, 10))


def test_before_sharding_the_layer_is_the_packed_one(layer: MXFP4Linear):
    sharded = ShardedMXFP4Linear(layer, 4)
    assert sharded.weight.shape == (12, 64)
    assert (sharded.in_features, sharded.out_features) == (64, 10)
    assert torch.equal(sharded.weight_packed, layer.weight_packed)
    assert torch.equal(sharded.weight_scale, layer.weight_scale)
    x = torch.randn(3, 64)
    assert torch.equal(sharded(x), layer(x))
    assert not sharded.weight.requires_grad


def test_every_packed_layer_of_a_model_is_replaced(layer: MXFP4Linear):
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"up": layer}), "head": nn.Linear(10, 2)})
    shard_packed(model, 2)
    assert isinstance(model.get_submodule("mlp.up"), ShardedMXFP4Linear)
    assert type(model["head"]) is nn.Linear
    before = model.get_submodule("mlp.up")
    shard_packed(model, 2)
    assert model.get_submodule("mlp.up") is before


def test_a_packed_weight_is_no_matrix_to_compute_with(layer: MXFP4Linear):
    weight = PackedWeight(layer.weight_packed, layer.weight_scale)
    assert (weight.dtype, weight.shape) == (torch.bfloat16, (10, 64))
    for forbidden in (lambda: weight + 1, lambda: weight.float(), lambda: weight.view(64, 10), lambda: weight[:, :32]):
        with pytest.raises(NotImplementedError, match="packed weight"):
            forbidden()


def test_parts_of_a_packed_weight_are_its_rows(layer: MXFP4Linear):
    weight = PackedWeight(layer.weight_packed, layer.weight_scale)
    first, second = weight.split(6)
    assert torch.equal(first.packed, layer.weight_packed[:6])
    assert torch.equal(second.scales, layer.weight_scale[6:])
    assert second.shape == (4, 64)
    assert torch.equal(weight.narrow(0, 2, 3).packed, layer.weight_packed[2:5])
    room = weight.new_zeros((10, 64))
    room.copy_(weight)
    assert torch.equal(room.packed, layer.weight_packed)
