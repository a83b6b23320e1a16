"""Sweeps of fake runs from start to end: order, ends that come early, GPU sets, seeds, and what is kept of it all."""

import itertools
import json
from pathlib import Path

import pytest

from support.sweeps import COMPLETE, Fakes, wait_until
from turnwise.config import ConfigError
from turnwise.launch.run_folder import locked
from turnwise.launch.supervise import ExitCode
from turnwise.launch.sweep.attempts import AttemptLog
from turnwise.launch.sweep.runner import Sweeper
from turnwise.report.sweep import RunState

GPU_RUN = '[[run]]\nid = "{}"\n[run.overrides.gpus]\ninference = [0]\ntrainer = [1]\n'


def test_runs_are_made_one_after_the_other_and_each_seed_once(tmp_path: Path):
    fakes = Fakes(tmp_path, "a", "b")
    assert fakes.run(seeds=2) is ExitCode.DONE
    assert fakes.starts() == [(label, "new") for label in ("a-s0", "b-s0", "a-s1", "b-s1")]
    status = fakes.status()
    assert set(fakes.states().values()) == {COMPLETE}
    times = [(status[label]["started"], status[label]["ended"]) for label in ("a-s0", "b-s0", "a-s1", "b-s1")]
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(times))
    assert status["b-s1"]["result"] == {"value": pytest.approx(0.61), "step": 4, "stderr": 0.012}
    assert (status["a-s0"]["step"], status["a-s0"]["max_steps"], status["a-s0"]["attempts"]) == (4, 4, 1)


def test_a_complete_sweep_has_nothing_left_to_do(tmp_path: Path):
    fakes = Fakes(tmp_path, "a")
    fakes.run()
    calls = fakes.calls()
    assert fakes.run() is ExitCode.DONE
    assert fakes.calls() == calls


EARLY = {
    "exit code": ({"do": "die", "at": 2, "code": 1}, "step 2 of 4, exit code 1"),
    "exit code 0 before the last step": ({"do": "die", "at": 3, "code": 0}, "step 3 of 4"),
    "signal": ({"do": "die", "at": 2, "code": -9}, "step 2 of 4, ended by signal 9"),
    "no final evaluation": ({"do": "skip the evaluation"}, "no final evaluation, of step 4"),
    "before the first step": ({"do": "die", "at": 0, "code": 1}, "step 0 of 4, exit code 1"),
}


@pytest.mark.parametrize("early", EARLY)
@pytest.mark.parametrize("when", ["resume", "rerun"])
def test_a_run_that_ended_early_is_found_and_gone_on_with_or_made_anew(tmp_path: Path, early: str, when: str):
    act, words = EARLY[early]
    fakes = Fakes(tmp_path, "a", "b", keys=f'when_ended_early = "{when}"', acts={"a-s0": [act, {"do": "finish"}]})
    assert fakes.run() is ExitCode.DONE
    assert fakes.starts() == [("a-s0", "new"), ("a-s0", when), ("b-s0", "new")]
    assert f"a-s0 ended early: {words}; tries again" in fakes.said.getvalue()
    assert fakes.states() == {"a-s0": COMPLETE, "b-s0": COMPLETE}
    assert fakes.status()["a-s0"]["attempts"] == 2
    steps = [json.loads(line)["step"] for line in (fakes.folder("a-s0") / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 4
    assert "2 starts" in (fakes.sweep_root / "status.md").read_text()


def test_a_run_that_keeps_failing_is_given_up_and_the_others_go_on(tmp_path: Path):
    fakes = Fakes(tmp_path, "a", "b", keys="max_attempts = 2", acts={"a-s0": [{"do": "die", "at": 1, "code": 1}]})
    assert fakes.run() is ExitCode.FAILED
    assert fakes.starts() == [("a-s0", "new"), ("a-s0", "resume"), ("b-s0", "new")]
    row = fakes.status()["a-s0"]
    assert (row["state"], row["reason"]) == ("failed", "step 2 of 4, exit code 1; 2 of max_attempts = 2 starts failed")
    assert "1 of 2 runs are not complete; they enter no mean." in (fakes.sweep_root / "comparison.md").read_text()
    # the next sweep leaves it, unless it is told to try again
    assert fakes.run() is ExitCode.FAILED
    assert len(fakes.calls()) == 3
    fakes.acts({"a-s0": [{"do": "finish"}]})
    assert fakes.run(retry=True) is ExitCode.DONE
    assert fakes.starts()[3:] == [("a-s0", "resume")]


def test_a_wrong_configuration_is_not_tried_twice_and_says_why(tmp_path: Path):
    fakes = Fakes(tmp_path, "a", "b", acts={"a-s0": [{"do": "refuse"}]})
    assert fakes.run() is ExitCode.FAILED
    assert fakes.starts() == [("a-s0", "new"), ("b-s0", "new")]
    reason = fakes.status()["a-s0"]["reason"]
    assert reason == "One problem in the configuration: - planted is wrong; mend it."
    fakes.acts({})  # mended: the next sweep starts it without being told to
    assert fakes.run() is ExitCode.DONE
    assert fakes.starts()[2:] == [("a-s0", "new")]


def test_a_run_that_aborts_by_its_own_condition_stays_as_it_is(tmp_path: Path):
    fakes = Fakes(tmp_path, "a", acts={"a-s0": [{"do": "abort", "at": 3}]})
    assert fakes.run() is ExitCode.FAILED
    assert fakes.run() is ExitCode.FAILED
    assert len(fakes.calls()) == 1
    row = fakes.status()["a-s0"]
    assert (row["state"], row["reason"]) == ("ended early", "step 3 of 4: planted: length explosion")
    assert row["result"]["step"] == 2  # its last evaluation, which enters no mean
    assert json.loads((fakes.sweep_root / "comparison.json").read_text())["experiments"][0]["mean"] is None


def test_an_rl_that_is_not_there_fails_its_runs_and_not_the_sweep(tmp_path: Path):
    fakes = Fakes(tmp_path, "a")
    sweeper = Sweeper(fakes.plan(), fakes.sweeper().view, rl=[str(tmp_path / "no-rl")], poll_s=0.01)
    assert sweeper.run() is ExitCode.FAILED
    assert "cannot be started" in fakes.status()["a-s0"]["reason"]


def gpus_of(args: list[str]) -> dict[str, str]:
    return {flag: value for flag, value in itertools.pairwise(args) if flag.startswith("--gpus.")}


def test_runs_on_disjoint_sets_go_side_by_side_and_never_two_on_one(tmp_path: Path):
    hold = {"do": "finish", "at": 1, "hold": str(tmp_path / "go")}
    runs = [GPU_RUN.format(name) for name in "abcd"]
    fakes = Fakes(tmp_path, *runs, keys="gpu_sets = [[2, 3], [7, 5]]", acts={"a-s0": [hold], "b-s0": [hold]})
    sweeper = fakes.sweeper()
    states: list[dict[str, str]] = []

    def both_run() -> bool:
        states.append(fakes.states() if (fakes.sweep_root / "status.json").exists() else {})
        return len(fakes.calls()) == 2 and sweeper.step()

    sweeper.survey()
    sweeper.step()
    wait_until(both_run)
    assert fakes.states() == {"a-s0": "running", "b-s0": "running", "c-s0": "pending", "d-s0": "pending"}
    given = [gpus_of(call["args"]) for call in fakes.calls()]  # in the order in which two processes came to write them
    assert sorted(given, key=str) == [
        {"--gpus.inference": "[2]", "--gpus.trainer": "[3]"},
        {"--gpus.inference": "[7]", "--gpus.trainer": "[5]"},
    ]
    (tmp_path / "go").touch()
    while sweeper.step():
        busy = [row["gpus"] for row in fakes.status().values() if row["state"] == "running"]
        assert len(busy) <= 2
        assert len({gpu for gpus in busy for gpu in gpus}) == sum(map(len, busy))
    assert set(fakes.states().values()) == {COMPLETE}
    assert sorted(run for run, _ in fakes.starts()) == ["a-s0", "b-s0", "c-s0", "d-s0"]


def test_a_run_that_goes_on_elsewhere_is_told_its_new_gpus(tmp_path: Path):
    fakes = Fakes(tmp_path, GPU_RUN.format("a"), keys="gpu_sets = [[2, 3]]\nmax_attempts = 1")
    fakes.acts({"a-s0": [{"do": "die", "at": 1, "code": 1}, {"do": "finish"}]})
    fakes.run()
    fakes.file.write_text(fakes.file.read_text().replace("[[2, 3]]", "[[0, 6]]"))
    assert fakes.run(retry=True) is ExitCode.DONE
    assert [gpus_of(call["args"]) for call in fakes.calls()] == [
        {"--gpus.inference": "[2]", "--gpus.trainer": "[3]"},
        {"--gpus.inference": "[0]", "--gpus.trainer": "[6]"},
    ]


def test_a_run_whose_files_changed_keeps_its_values_and_the_sweep_says_so(tmp_path: Path):
    fakes = Fakes(tmp_path, "a", acts={"a-s0": [{"do": "die", "at": 1, "code": 1}]}, keys="max_attempts = 1")
    fakes.run()
    (tmp_path / "base.toml").write_text((tmp_path / "base.toml").read_text().replace("max_steps = 4", "max_steps = 9"))
    fakes.acts({})
    assert fakes.run(retry=True) is ExitCode.DONE
    said = fakes.said.getvalue()
    assert "a-s0 began with other values, which it keeps (delete its folder to begin anew): max_steps: 4 -> 9" in said
    assert fakes.status()["a-s0"]["max_steps"] == 4


def test_two_sweeps_do_not_work_in_one_folder(tmp_path: Path):
    fakes = Fakes(tmp_path, "a")
    with locked(fakes.sweep_root), pytest.raises(ConfigError, match="is in use by another run"):
        fakes.run()
    assert fakes.calls() == []


def test_a_run_in_which_somebody_works_already_is_waited_for(tmp_path: Path):
    fakes = Fakes(tmp_path, "a", "b")
    sweeper = fakes.sweeper()
    with locked(fakes.folder("a-s0")):
        sweeper.survey()
        assert fakes.states() == {"a-s0": "running", "b-s0": "pending"}
        assert sweeper.step()
        assert fakes.calls() == []  # its GPUs may be those of the next
    while sweeper.step():
        pass
    assert fakes.states() == {"a-s0": COMPLETE, "b-s0": COMPLETE}
    assert "a-s0 runs already: taken over" in fakes.said.getvalue()


def test_a_full_disk_is_told_and_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fakes = Fakes(tmp_path, "a")

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("turnwise.launch.sweep.runner.write_status", full)
    assert fakes.run() is ExitCode.DONE
    assert "A page of the sweep could not be written: [Errno 28] No space left on device" in fakes.said.getvalue()


def test_the_log_of_attempts_survives_a_torn_line(tmp_path: Path):
    log = AttemptLog(tmp_path)
    log.started(pid=1, created=2.0, mode="new", gpus=[3])
    log.ended(exit_code=1, step=2, failed=True)
    with log.path.open("ab") as file:
        file.write(b'{"event": "sta')
    assert (log.read().count, log.read().failures, log.read().exit_code, log.read().pid) == (1, 1, 1, None)
    log.started(pid=5, created=6.0, mode="resume", gpus=[4])
    found = log.read()
    assert (found.count, found.failures, found.pid, found.gpus, found.ended) == (2, 1, 5, (4,), None)
    log.try_again()
    assert log.read().failures == 0


def test_states_are_those_of_the_folders_and_of_no_state_file(tmp_path: Path):
    fakes = Fakes(tmp_path, "a", "b")
    fakes.run()
    (fakes.sweep_root / "status.json").write_text("{}")
    (fakes.folder("b-s0") / "evals" / "step_4.json").unlink()
    sweeper = fakes.sweeper()
    sweeper.survey()
    assert [track.state for track in sweeper.tracks] == [RunState.COMPLETE, RunState.ENDED_EARLY]
    assert sweeper.tracks[1].reason == "no final evaluation, of step 4"
