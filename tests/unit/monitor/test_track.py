"""Following a run: what trackers are told, and that one which fails is left out of the rest."""

import io
import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from turnwise.config import RLConfig
from turnwise.monitor.follow import Follower
from turnwise.monitor.secrets import Redactor
from turnwise.monitor.track import Leash, Tracking
from turnwise.monitor.tracking import Checkpoint, Ending, Memory, StepRecord, Tracker


class Service:
    """A tracker that remembers, and fails where it is told to."""

    def __init__(self, name: str, fails_at: str = "") -> None:
        self.name, self.fails_at = name, fails_at
        self.calls: list[str] = []

    def log(self, record: StepRecord) -> None:
        self._called("log", record.step)

    def checkpoint(self, checkpoint: Checkpoint) -> None:
        self._called("checkpoint", checkpoint.step)

    def finish(self, ending: Ending, report: Sequence[Path]) -> str:
        self._called("finish", ending.code)
        return "there"

    def _called(self, what: str, number: int) -> None:
        self.calls.append(f"{what} {number}")
        if what == self.fails_at:
            raise ConnectionError("refused, with planted-secret-value")


def refuse() -> Tracker:
    raise TimeoutError("planted-secret-value timed out")


def tracking(root: Path, *services: Service, again: Sequence[str] = (), clock: Callable[[], float] = lambda: 0.0) -> Tracking:
    redactor = Redactor({}, {"A_KEY": "planted-secret-value"})
    config = RLConfig(output_dir=root, max_steps=9)
    makers = {service.name: lambda service=service: service for service in services} | {"bad": refuse}
    follow = partial(Follower, config, redactor, samples=0, interval=None)
    return Tracking(redactor, {name: (make, follow) for name, make in makers.items()}, again=again, clock=clock)


def write_lines(root: Path, *steps: int) -> None:
    with (root / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": step, "time": 1.0 * step, "loss": 0.5}) + "\n" for step in steps)


@pytest.mark.parametrize("fault", ["log", "checkpoint", "finish"])
def test_a_tracker_that_fails_is_told_of_once_and_left_out_while_others_go_on(
    fault: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    well, ill = Service("well"), Service("ill", fault)
    with caplog.at_level(logging.WARNING):
        following = tracking(tmp_path, ill, well)
        write_lines(tmp_path, 1)
        following.catch_up()
        (tmp_path / "checkpoints" / "step_1").mkdir(parents=True)
        (tmp_path / "checkpoints" / "step_1" / "meta.json").write_text("{}")
        following.catch_up()
        write_lines(tmp_path, 2)
        places = following.finish(Ending("done", "all steps done", 0))
    assert well.calls == ["log 1", "checkpoint 1", "log 2", "finish 0"]
    assert ill.calls[-1].startswith(fault)
    assert places == {"ill": None, "well": "there", "bad": None}
    assert caplog.text.count("ill stopped (ConnectionError: refused, with ***)") == 1
    assert caplog.text.count("bad stopped (TimeoutError: *** timed out)") == 1


def test_a_tracker_that_is_tried_again_waits_longer_each_time_and_then_takes_the_run_from_its_beginning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    times, now = list[float](), 0.0
    service = Service("service", "log")
    with caplog.at_level(logging.WARNING):
        following = tracking(tmp_path, service, again=("service",), clock=lambda: now)
        write_lines(tmp_path, 1, 2)
        for now in range(0, 2000, 10):
            before = len(service.calls)
            following.catch_up()
            times += [now] * (len(service.calls) - before)
    assert times == [0, 60, 180, 420, 900, 1500]
    assert set(service.calls) == {"log 1"}
    assert caplog.text.count("service does not answer as it should, and is tried again later") == 1
    service.calls.clear()
    service.fails_at, now = "", 2100
    following.catch_up()
    write_lines(tmp_path, 3)
    following.catch_up()
    assert service.calls == ["log 1", "log 2", "log 3"]
    assert "service goes on; what it lacked has been sent" in caplog.text
    assert not following.is_over


def test_a_tracker_that_is_tried_again_has_a_last_try_at_the_end(tmp_path: Path):
    service = Service("service", "log")
    following = tracking(tmp_path, service, again=("service",))
    write_lines(tmp_path, 1)
    following.catch_up()
    service.fails_at = ""
    assert following.finish(Ending())["service"] == "there"
    assert service.calls == ["log 1", "log 1", "finish 130"]


def test_once_all_trackers_have_stopped_nothing_is_left_to_follow(tmp_path: Path):
    following = tracking(tmp_path)
    assert not following.is_over
    following.catch_up()
    assert following.is_over


def test_the_ending_that_one_process_was_told_is_known_to_a_later_one_that_is_told_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def ending(line: str) -> Ending:
        monkeypatch.setattr("sys.stdin", io.StringIO(line))
        leash = Leash(1e6, tmp_path / "ending")
        assert leash.ended.wait(60)
        return leash.ending

    done = Ending("done", "all steps done", 0)
    assert ending("").outcome == "killed"
    assert ending(done.line()) == done
    assert ending("") == done


def test_what_is_left_when_a_run_ends_is_still_told(tmp_path: Path):
    service = Service("service")
    following = tracking(tmp_path, service)
    write_lines(tmp_path, 1, 2)
    following.finish(Ending())
    assert service.calls == ["log 1", "log 2", "finish 130"]


def test_an_ending_is_read_as_it_was_written_and_anything_else_is_a_killed_run():
    ending = Ending("failed", "trainer ended with exit code 1", 1, {"verdict": "flat", "best_held_out_reward": 0.5})
    assert Ending.parse(ending.line()) == ending
    assert [Ending.parse(line).outcome for line in ("", '{"outcome": "do', '{"surprise": 1}')] == ["killed"] * 3


def test_a_memory_that_cannot_be_read_is_a_fresh_one(tmp_path: Path):
    path = tmp_path / "tracking" / "wandb.json"
    memory = Memory.load(path)
    assert memory.next_row() == 0
    memory.sent(StepRecord(1, 5.0, {}))
    again = Memory.load(path)
    assert (again.is_new(StepRecord(1, 5.0, {})), again.is_new(StepRecord(2, 6.0, {})), again.next_row()) == (False, True, 1)
    path.write_text("torn {")
    assert Memory.load(path).rows == 0


def test_a_memory_of_checkpoints_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("turnwise.monitor.tracking.REMEMBERED", 2)
    memory = Memory.load(tmp_path / "memory.json")
    for step in (8, 9, 10, 11):
        assert memory.lacks(Checkpoint(step, tmp_path, 1.0, False))
        memory.has(Checkpoint(step, tmp_path, 1.0, False))
        assert not memory.lacks(Checkpoint(step, tmp_path, 1.0, False))
    assert set(Memory.load(memory.path).checkpoints) == {"10", "11"}
