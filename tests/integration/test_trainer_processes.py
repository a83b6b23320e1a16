"""The trainer as real torchrun processes on recorded batches: resumption to the bit, and two ranks against one."""

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
from turnwise.trainer.checkpoint_index import checkpoint_steps, latest_valid_checkpoint
from turnwise.transport import BatchLog, RunDir, WeightsReady, WeightsStore

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"lora": {"rank": 4, "dropout": 0.0}},
    "full": {"lora": None},
    "copies": {"lora": {"rank": 4}, "shard": False},
    "packed": {"lora": {"rank": 4}, "quant": {}},
    "packed shards": {"lora": {"rank": 4}, "quant": {"shard_base": True}, "gradient_checkpointing": True},
    "rounded": {"lora": None, "quant": {}},
    "compiled": {"lora": {"rank": 4}, "quant": {}, "compile": True, "gradient_checkpointing": True},
    "compiled rounded": {"lora": None, "quant": {}, "compile": True},
}
STEPS = 4


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(config: RLConfig, ranks: int, *more: str, limit_kib: int | None = None) -> subprocess.CompletedProcess[str]:
    path = RunDir(config.output_dir).config
    path.write_text(dump_toml(config))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    address = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command = [*torchrun, *address, "-m", "turnwise.trainer", "--config", str(path), *more]
    if limit_kib is not None:
        command = ["bash", "-c", f'ulimit -f {limit_kib}; exec "$@"', "-", *command]
    return subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240, check=False
    )


def config_in(folder: Path, model: Path, variant: str, ranks: int) -> RLConfig:
    trainer = {
        "processes": ranks,
        "threads": 1,
        "model": VARIANTS[variant],
        "optim": {"lr": 1e-3, "eps": 1e-4, "schedule": "linear", "warmup_steps": 1},
        "loss": {"kl_beta": 0.05, "importance_sampling": "truncate"},
        "micro_batch_tokens": 128,
    }
    tables = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "model": {"name": str(model)},
        "trainer": trainer,
        "ckpt": {"interval": 2},
    }
    return RLConfig.model_validate(tables)


def record_batches(folder: Path) -> None:
    for step in range(1, STEPS + 1):
        BatchLog(RunDir(folder).batches).write(make_batch(step, groups=2, group_size=4))


Runs = dict[tuple[str, int], RLConfig]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Runs:
    """Finished runs of four steps: every variant on two ranks, and the sharded ones on one."""
    finished: Runs = {}
    for variant, ranks in [
        *((v, r) for v in ("lora", "full", "packed", "rounded") for r in (1, 2)),
        ("copies", 2),
        ("packed shards", 2),
    ]:
        folder = tmp_path_factory.mktemp(f"{variant}-{ranks}") / "run"
        record_batches(folder)
        config = config_in(folder, tiny_model, variant, ranks)
        done = launch(config, ranks)
        assert done.returncode == 0, done.stderr
        finished[variant, ranks] = config
    return finished


def weights(config: RLConfig, version: int = STEPS) -> dict[str, torch.Tensor]:
    return published(config, version)


def measured(ready: WeightsReady) -> dict[str, float]:
    """Metrics without clocks."""
    return {name: value for name, value in ready.metrics.items() if not name.startswith(("timing/", "perf/"))}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("variant", ["lora", "full", "packed", "rounded"])
def test_four_steps_equal_two_and_a_resume_and_two_to_the_bit(runs: Runs, tmp_path: Path, variant: str, ranks: int) -> None:
    straight = runs[variant, ranks]
    shutil.copytree(straight.output_dir, tmp_path / "run")
    resumed = straight.model_copy(update={"output_dir": tmp_path / "run"})
    run_dir = RunDir(resumed.output_dir)
    shutil.rmtree(run_dir.checkpoint(STEPS))
    shutil.rmtree(run_dir.weights)
    assert latest_valid_checkpoint(run_dir.root) == 2
    done = launch(resumed, ranks, "--resume-step", "2")
    assert done.returncode == 0, done.stderr
    assert WeightsStore(run_dir.weights).versions() == [2, 3, 4]
    for version in (2, 3, 4):
        assert announcement(resumed, version).digest == announcement(straight, version).digest
    for version in (3, 4):
        assert measured(announcement(resumed, version)) == measured(announcement(straight, version))
        assert announcement(resumed, version).canaries == announcement(straight, version).canaries
    assert checkpoint_steps(run_dir.root) == [2, 4]


@pytest.mark.parametrize(
    ("variant", "alone"),
    [("lora", "lora"), ("full", "full"), ("copies", "lora"), ("packed", "packed"), ("packed shards", "packed")],
)
def test_two_ranks_equal_one(runs: Runs, variant: str, alone: str) -> None:
    one, two = runs[alone, 1], runs[variant, 2]
    for version in range(STEPS + 1):
        torch.testing.assert_close(weights(two, version), weights(one, version), rtol=1e-4, atol=2e-6)
    for version in range(1, STEPS + 1):
        assert measured(announcement(two, version)) == pytest.approx(measured(announcement(one, version)), rel=1e-3, abs=1e-5)
    for version in range(1, STEPS + 1):
        for mine, other in zip(announcement(two, version).canaries, announcement(one, version).canaries, strict=True):
            assert mine.token_ids == other.token_ids
            for name in ("logprobs", "before", "base"):
                assert getattr(mine, name) == pytest.approx(getattr(other, name), abs=1e-4)
    moved = sum(float((weights(one)[name] - weights(one, 0)[name]).square().sum()) for name in weights(one)) ** 0.5
    assert moved > 1e-2  # there was something to get wrong


@pytest.mark.parametrize(("variant", "plain"), [("compiled", "packed"), ("compiled rounded", "rounded")])
def test_compiled_layers_over_quantised_weights_train_as_plain_ones(
    runs: Runs, tmp_path: Path, tiny_model: Path, variant: str, plain: str
) -> None:
    config = config_in(tmp_path, tiny_model, variant, 1).model_copy(update={"max_steps": 1})
    record_batches(tmp_path)
    done = launch(config, 1)
    assert done.returncode == 0, done.stderr
    assert "graph break" not in done.stderr
    expected = measured(announcement(runs[plain, 1], 1))
    assert measured(announcement(config, 1)) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_two_ranks_that_train_quantised_weights_equal_one_but_for_codes_at_a_threshold(runs: Runs) -> None:
    """Sums in another order move a master by a millionth of a code; one that is so near to a threshold takes the next code."""
    one, two = runs["rounded", 1], runs["rounded", 2]
    assert announcement(two, 0).digest == announcement(one, 0).digest
    for version in range(1, STEPS + 1):
        assert measured(announcement(two, version)) == pytest.approx(measured(announcement(one, version)), rel=1e-2, abs=1e-4)
    ours, theirs = weights(two), weights(one)
    apart = sum(int((~torch.isclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5)).sum()) for name in theirs)
    moved = sum(int((theirs[name] != weights(one, 0)[name]).sum()) for name in theirs)
    assert apart < 0.002 * moved


def test_one_rank_reads_a_checkpoint_of_two(runs: Runs, tmp_path: Path) -> None:
    """State is sharded by tensors, not by processes: the number of processes may change."""
    shutil.copytree(runs["lora", 2].output_dir, tmp_path / "run")
    config = runs["lora", 1].model_copy(update={"output_dir": tmp_path / "run"})
    done = launch(config, 1, "--resume-step", "2")
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(weights(config), weights(runs["lora", 2]), rtol=1e-4, atol=2e-6)


def test_a_file_system_that_is_full_fails_on_all_ranks_with_a_clear_error(runs: Runs, tmp_path: Path, tiny_model: Path) -> None:
    """A real limit on file sizes: adapters (45 KiB) fit, the first checkpoint (moments too, 67 KiB a rank) does not."""
    record_batches(tmp_path)
    done = launch(config_in(tmp_path, tiny_model, "lora", 2), 2, limit_kib=50)
    assert done.returncode != 0
    assert "step_2 could not be written" in done.stderr
    assert "rl --resume" in done.stderr
    assert checkpoint_steps(tmp_path) == []
    assert list(RunDir(tmp_path).checkpoints.iterdir()) == []
    assert WeightsStore(RunDir(tmp_path).weights).versions() == [0, 1, 2]
    assert BatchLog(RunDir(tmp_path).batches).steps() == [1, 2, 3, 4]
