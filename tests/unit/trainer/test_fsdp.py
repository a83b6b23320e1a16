"""How many replicas there are, and what is said when that cannot be."""

import pytest
import torch
from torch import nn

from support.batches import ConfigOf
from turnwise.trainer import fsdp
from turnwise.trainer.loop import run_trainer


@pytest.mark.parametrize(
    ("processes", "per_node", "wanted", "replicas"),
    [
        (1, [1], None, 1),
        (8, [8] * 8, None, 1),
        (16, [8] * 16, None, 2),
        (6, [2] * 6, None, 3),
        (4, [3, 3, 3, 1], None, 1),  # nodes of different sizes
        (8, [8] * 8, 4, 4),
        (16, [8] * 16, 1, 1),
    ],
)
def test_there_is_one_replica_a_node_unless_a_number_is_given(
    monkeypatch: pytest.MonkeyPatch, processes: int, per_node: list[int], wanted: int | None, replicas: int
) -> None:
    monkeypatch.setattr(fsdp, "world_size", lambda: processes)
    monkeypatch.setattr(fsdp, "gather", lambda _: per_node)
    assert fsdp._replicas(wanted) == replicas


def test_without_torchrun_there_is_one_replica(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert fsdp._replicas(None) == 1
    assert fsdp.meshes().on("cpu").mesh_dim_names == ("shard",)


def test_replicas_that_do_not_divide_the_processes_are_refused_with_what_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fsdp, "world_size", lambda: 6)
    with pytest.raises(ValueError, match=r"trainer\.model\.replicas = 4 does not divide the 6 processes.*; use 1, 2, 3, 6, or"):
        fsdp._replicas(4)


def test_the_key_of_the_configuration_arrives(config_of: ConfigOf) -> None:
    with pytest.raises(ValueError, match=r"trainer\.model\.replicas = 2 does not divide the 1 processes"):
        run_trainer(config_of({"model": {"replicas": 2}}))
    with pytest.raises(LookupError):
        fsdp.meshes()  # nothing is left of the process group
    with fsdp.process_group(cuda=False, timeout_s=60.0):
        assert fsdp.meshes().replicas == 1


def test_a_sharded_policy_says_how_it_is_arranged(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    assert fsdp.arrangement(nn.Linear(2, 2)) == "1 process"
    policy = nn.Sequential(nn.Linear(2, 2))
    fsdp.shard(policy, nn.ModuleList(policy), device=device, compute_dtype=None)
    monkeypatch.setattr(fsdp, "world_size", lambda: 8)
    assert fsdp.arrangement(nn.Linear(2, 2)) == "8 processes with a copy each"
    assert fsdp.arrangement(policy) == "8 processes, sharded over 8"
    monkeypatch.setattr(fsdp, "meshes", lambda: fsdp.Meshes(4))
    assert fsdp.arrangement(policy) == "8 processes, 4 replicas each sharded over 2"
