"""Full fine-tuning through `rl` with weights by broadcast: proven, attributed to the token, and ended cleanly at any moment."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from support.rl_command import finish, running, write_config
from support.run_records import batches
from turnwise.transport import BatchLog, Manifest, RunDir, WeightsReady, WeightsStore, tensor_digest

STEPS = 3
BROADCAST = ["--no-trainer.model.lora", "--trainer.weight-transfer", "broadcast"]


def announced(root: Path) -> dict[int, WeightsReady]:
    store = WeightsStore(RunDir(root).weights)
    return {version: ready for version in store.versions() if (ready := store.poll(version)) is not None}


def checkpoint_digest(root: Path, step: int) -> str:
    return tensor_digest(load_file(RunDir(root).checkpoint(step) / "model" / "model.safetensors"))


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> tuple[Path, str]:
    """Run folder and output of three steps on two trainer processes and two engines."""
    folder = tmp_path_factory.mktemp("broadcast")
    config = write_config(folder, tiny_model, max_steps=STEPS)
    more = ["--trainer.processes", "2", "--inference.dp", "2", "--ckpt.interval", "1", "--ckpt.keep-last", "10"]
    return folder / "run", finish(folder, "@", str(config), *BROADCAST, *more)


def test_a_run_says_how_weights_travel_and_writes_none_to_disk(three_steps: tuple[Path, str]):
    root, output = three_steps
    assert "weights: broadcast (gloo) from the trainer's memory to 2 engine workers, which pause meanwhile" in output
    assert "Done at step 3 of 3" in output
    versions = announced(root)
    assert max(versions) == STEPS
    for ready in versions.values():
        assert (ready.kind, ready.transfer) == ("full", "broadcast")
        assert Manifest.read(Path(ready.path)).world_size == 3
    assert list((root / "weights").rglob("*.safetensors")) == []


def test_the_engines_proved_the_weights_that_the_checkpoints_hold(three_steps: tuple[Path, str]):
    """Every version was acknowledged, which takes equal digests of both engines; and the digests are those of the checkpoints."""
    root, _ = three_steps
    assert WeightsStore(RunDir(root).weights).served() == STEPS
    for version, ready in announced(root).items():
        if version > 0:
            assert ready.digest == checkpoint_digest(root, version)
    assert len({ready.digest for ready in announced(root).values()}) == len(announced(root))


def test_every_token_of_every_trajectory_knows_a_version_that_was_served_by_then(three_steps: tuple[Path, str]):
    root, _ = three_steps
    seen: set[int] = set()
    for batch in batches(root):
        versions = {version for sample in batch.samples for version in sample.policy_versions if version >= 0}
        assert versions <= {batch.step - 2, batch.step - 1}  # max_staleness = 1
        seen |= versions
    assert {0, 1} <= seen


def test_the_trainer_agrees_with_the_engines_about_what_they_sampled(three_steps: tuple[Path, str]):
    """Under the version that sampled: with a learning rate of 1e-2, a token of another one would be off by far more."""
    root, _ = three_steps
    lines = [json.loads(line) for line in RunDir(root).metrics.read_text().splitlines()]
    metrics: dict[int, dict[str, Any]] = {}
    for line in lines:
        metrics.setdefault(line["step"], {}).update(line)
    fresh = [step for step in range(1, STEPS + 1) if metrics[step]["staleness/max"] == 0]
    assert 1 in fresh
    for step in fresh:
        assert metrics[step]["mismatch/logprob_abs/max"] < 1e-3
    assert all(metrics[step]["timing/wait_claim_s"] >= 0 for step in range(2, STEPS + 1))


def test_a_stop_while_the_trainer_waits_for_the_engines_ends_cleanly_and_resumes(tmp_path: Path, tiny_model: Path):
    """Here they are kept from answering; nothing was trained, and the initial weights are the checkpoint."""
    config = write_config(tmp_path, tiny_model, max_steps=2)
    root = tmp_path / "run"
    store = WeightsStore(RunDir(root).weights)
    with running(tmp_path, "@", str(config), *BROADCAST) as rl:
        rl.wait_until(lambda: any("turnwise.inference.embedded" in process.cmdline() for process in rl.processes()))
        rl.find("turnwise.inference.embedded").suspend()
        rl.wait_until(lambda: store.versions() == [0])
        assert not store.claim_path(0).exists()
        rl.interrupt()
        assert rl.wait() == 3, rl.output()
        assert rl.processes() == []
    assert "stopping after step 0: interrupted by the user" in (root / "logs" / "trainer.stdout").read_text()
    output = finish(tmp_path, "@", str(config), "--resume")
    assert "Done at step 2 of 2" in output
    assert announced(root)[2].digest == checkpoint_digest(root, 2)


def test_engines_that_are_killed_during_a_run_end_it_with_a_checkpoint_from_which_it_goes_on(tmp_path: Path, tiny_model: Path):
    config = write_config(tmp_path, tiny_model, max_steps=6)
    root = tmp_path / "run"
    with running(tmp_path, "@", str(config), *BROADCAST, "--trainer.processes", "2") as rl:
        rl.wait_until(lambda: BatchLog(RunDir(root).batches).path(2).exists())
        rl.find("turnwise.inference.embedded").kill()
        assert rl.wait() == 1, rl.output()
    output = finish(tmp_path, "@", str(config), "--resume")
    assert "Done at step 6 of 6" in output
    log = batches(root)
    accounted = [rollout for batch in log for rollout in batch.rollout_ids]
    assert len(accounted) == len(set(accounted))
    assert announced(root)[6].digest == checkpoint_digest(root, 6)
