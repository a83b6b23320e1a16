"""The short run of the check `overfit` by the real `rl`."""

from pathlib import Path

from support.rl_command import write_config
from turnwise.config import load_config
from turnwise.diagnose.overfit import short_config
from turnwise.diagnose.overfit_run import play
from turnwise.launch.resolve import changed, with_defaults
from turnwise.launch.survivors import processes_of
from turnwise.orchestrator.environments import load_setups


def test_a_real_run_plays_one_task_and_leaves_no_process_behind(tiny_model: Path, tmp_path: Path):
    given = load_config(write_config(tmp_path, tiny_model, max_steps=50, max_staleness=2))
    user = with_defaults(changed(given, {"output_dir": tmp_path}), max_steps=50, model=str(tiny_model))
    task = str(load_setups(user.orchestrator.env, "train")[0].tasks[3]["id"])
    config = short_config(user, task, 1e-2, steps=2)
    said: list[str] = []
    run = play(config, run_id=tmp_path.name, enough=lambda rewards: False, limit_s=240, say=said.append)
    assert run.failure == ""
    assert [len(groups) for groups in run.rewards] == [8, 8]
    assert len(run.updates) >= 1
    assert all(update > 0 for update in run.updates)
    assert len(said) == 2
    assert processes_of(tmp_path.name) == []
    trajectories = (tmp_path / "overfit" / "trajectories" / "step_2.jsonl").read_text()
    assert trajectories.count(f'"task_id":"{task}"') == trajectories.count("\n") == 16
