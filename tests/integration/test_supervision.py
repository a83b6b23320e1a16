"""Supervision of the real processes: whatever dies or is interrupted, nothing is left running, and the run goes on afterwards."""

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.rl_command import finish, running, write_config
from turnwise.monitor import read_metrics
from turnwise.monitor.facts import REWARD
from turnwise.transport import BatchLog, RunDir

KILLED = {
    "inference": ("turnwise.inference.embedded", "\0"),
    "orchestrator": ("turnwise.orchestrator", "\0"),
    "torchrun": ("torch.distributed.run", "\0"),
    "trainer": ("turnwise.trainer", "torch.distributed.run"),
}


def has_batch(root: Path, step: int) -> bool:
    return BatchLog(RunDir(root).batches).path(step).exists()


@pytest.mark.parametrize("role", sorted(KILLED))
def test_killing_a_role_ends_the_run_and_leaves_nothing(tmp_path: Path, tiny_model: Path, role: str):
    config = write_config(tmp_path, tiny_model, max_steps=1000)
    with running(tmp_path, "@", str(config)) as rl:
        rl.wait_until(lambda: has_batch(tmp_path / "run", 3))
        word, but = KILLED[role]
        rl.find(word, but=but).kill()
        assert rl.wait() == 1
        assert rl.processes() == []
        assert "Failed at step" in rl.output()
        assert "Its last lines:" in rl.output()
        assert "Traceback" not in rl.output().split("Its last lines:")[0]


def test_one_interrupt_leaves_a_checkpoint_from_which_the_run_goes_on(tmp_path: Path, tiny_model: Path):
    config = write_config(tmp_path, tiny_model, max_steps=1000)
    root = tmp_path / "run"
    with running(tmp_path, "@", str(config)) as rl:
        rl.wait_until(lambda: has_batch(root, 3))
        rl.interrupt()
        assert rl.wait() == 3
        assert rl.processes() == []
        assert "Press Ctrl-C again to end at once" in rl.output()
        ended = rl.output()
        assert "--resume" in ended.splitlines()[-1]
    checkpoint = max(int(path.name.removeprefix("step_")) for path in (root / "checkpoints").iterdir())
    assert checkpoint >= 2
    # the orchestrator ends at once, while the trainer finishes a step: its metrics are not lost
    assert [line["step"] for line in read_metrics(root / "metrics.jsonl") if REWARD in line] == list(range(1, checkpoint + 1))
    assert f"Interrupted at step {checkpoint} of" in ended
    output = finish(tmp_path, "@", str(config), "--resume", "--max-steps", str(checkpoint + 2))
    assert f"Resuming after step {checkpoint}" in output
    assert f"Done at step {checkpoint + 2} of {checkpoint + 2}" in output


def test_two_interrupts_end_everything_at_once(tmp_path: Path, tiny_model: Path):
    config = write_config(tmp_path, tiny_model, max_steps=1000)
    with running(tmp_path, "@", str(config)) as rl:
        rl.wait_until(lambda: len(rl.processes()) >= 5)  # while torch is still loading, nobody answers a polite request
        rl.interrupt()
        time.sleep(0.5)
        rl.interrupt()
        assert rl.wait() == 130
        assert rl.processes() == []


def test_kill_9_of_rl_leaves_nothing_and_the_folder_is_free_again(tmp_path: Path, tiny_model: Path):
    config = write_config(tmp_path, tiny_model, max_steps=1000)
    with running(tmp_path, "@", str(config)) as rl:
        rl.wait_until(lambda: has_batch(tmp_path / "run", 2))
        rl.process.kill()
        rl.process.wait()
        deadline = time.monotonic() + 60
        while rl.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert rl.processes() == []
    finish(tmp_path, "@", str(config), "--resume", "--max-steps", "3")


def test_a_second_run_in_the_folder_is_refused_and_does_not_disturb_the_first(tmp_path: Path, tiny_model: Path):
    config = write_config(tmp_path, tiny_model, max_steps=1000)
    with running(tmp_path, "@", str(config)) as rl:
        rl.wait_until(lambda: has_batch(tmp_path / "run", 1))
        for option in ("--resume", "--clean"):
            assert "is in use by another run" in finish(tmp_path, "@", str(config), option, expect=2)
        rl.wait_until(lambda: has_batch(tmp_path / "run", 4))


def test_an_engine_that_cannot_start_is_told_with_its_last_lines(tmp_path: Path, tiny_model: Path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny_model.iterdir():
        (broken / path.name).write_bytes(path.read_bytes()[:1000] if path.suffix == ".safetensors" else path.read_bytes())
    config = write_config(tmp_path, broken, max_steps=3)
    output = finish(tmp_path, "@", str(config), expect=1)
    assert "Failed at step 0" in output
    assert "safetensors" in output


def test_on_a_terminal_the_run_is_a_live_picture(tmp_path: Path, tiny_model: Path):
    config = write_config(tmp_path, tiny_model, max_steps=2)
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
    rl = subprocess.Popen(
        [sys.executable, "-m", "turnwise.cli.rl", "@", str(config)],
        cwd=tmp_path,
        env=env,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:
        pass  # the other end was closed: rl has ended
    finally:
        os.close(ours)
    assert rl.wait(60) == 0
    text = shown.decode(errors="replace")
    assert "Ctrl-C: stop with a checkpoint" in text
    assert "2 / 2" in text
    assert "Done at step 2 of 2" in text
