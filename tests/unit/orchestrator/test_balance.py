"""Idle engines, empty places and queues, by a clock that the test turns."""

import pytest

from turnwise.inference import replicas as replicas_module
from turnwise.inference.load import EngineLoad
from turnwise.inference.replicas import Replica
from turnwise.orchestrator.balance import Balance
from turnwise.orchestrator.waits import Blocked, StateClock


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(replicas_module.time, "monotonic", made)
    return made


def make(clock: Clock, engines: int = 1, **levels: float) -> tuple[Balance, list[Replica], StateClock[Blocked]]:
    replicas = [Replica(f"http://{index}") for index in range(engines)]
    waits = StateClock(Blocked.END, clock)
    return Balance(replicas, waits, lambda: levels, clock), replicas, waits


def test_weighted_seconds_are_added_up_by_state(clock: Clock) -> None:
    waits = StateClock("a", clock)
    clock.now += 1
    waits.enter("b", 0.5)
    clock.now += 4
    waits.enter("a")
    clock.now += 2
    assert waits.take() == {"a": 2.0, "b": 2.0}  # the first second had no weight yet
    clock.now += 3
    waits.enter("b")
    clock.now += 1
    assert waits.take() == {"a": 3.0, "b": 1.0}


def test_an_engine_is_idle_while_it_has_no_request_and_each_is_counted_by_itself(clock: Clock) -> None:
    balance, (first, second), _ = make(clock, engines=2)
    first.sent()
    balance.begin()
    clock.now += 1
    first.sent()
    second.sent()
    clock.now += 2
    first.returned()
    second.returned()
    clock.now += 5
    first.returned()
    clock.now += 2
    metrics = balance.take()
    assert metrics["perf/engine_idle/0/share"] == pytest.approx(0.2)
    assert metrics["perf/engine_idle/1/share"] == pytest.approx(0.8)
    assert metrics["perf/engine_idle/share"] == pytest.approx(0.5)


def test_a_single_engine_has_one_line(clock: Clock) -> None:
    balance, _, _ = make(clock)
    balance.begin()
    clock.now += 1
    assert {name for name in balance.take() if "idle" in name} == {"perf/engine_idle/share"}


def test_a_step_takes_up_where_the_last_one_ended(clock: Clock) -> None:
    balance, (engine,), _ = make(clock)
    balance.begin()
    clock.now += 3
    engine.sent()
    clock.now += 1
    assert balance.take()["perf/engine_idle/share"] == pytest.approx(0.75)
    clock.now += 4
    assert balance.take()["perf/engine_idle/share"] == 0.0


def test_what_comes_before_the_first_policy_and_after_the_last_batch_is_left_out(clock: Clock) -> None:
    balance, (engine,), waits = make(clock)
    waits.enter(Blocked.STALENESS)
    clock.now += 50
    balance.tick()
    assert balance.take() == {}
    balance.begin()
    engine.sent()
    waits.enter(Blocked.INFLIGHT, 0.0)
    clock.now += 2
    engine.returned()
    balance.end()
    clock.now += 50
    metrics = balance.take()
    assert metrics["perf/engine_idle/share"] == 0.0
    assert metrics["perf/held_by_staleness/share"] == 0.0
    assert balance.take() == {}


def test_places_kept_empty_are_told_by_their_reason(clock: Clock) -> None:
    balance, _, waits = make(clock)
    balance.begin()
    for reason, weight in ((Blocked.INFLIGHT, 0.0), (Blocked.STALENESS, 0.5), (Blocked.LOAD, 0.25), (Blocked.EVALUATION, 1.0)):
        waits.enter(reason, weight)
        clock.now += 2.5
    metrics = balance.take()
    assert metrics["perf/held_by_staleness/share"] == pytest.approx(0.125)
    assert metrics["perf/held_by_load/share"] == pytest.approx(0.0625)
    assert metrics["perf/held_by_evaluation/share"] == pytest.approx(0.25)


def test_levels_are_averaged_over_the_looks_of_a_step(clock: Clock) -> None:
    levels = {"queue/inflight/mean": 0.0}
    balance = Balance([Replica("http://0")], StateClock(Blocked.END, clock), lambda: levels, clock)
    balance.begin()
    for value in (2.0, 4.0, 9.0):
        clock.now += 1
        levels["queue/inflight/mean"] = value
        balance.tick()
    assert balance.take()["queue/inflight/mean"] == 5.0


def test_counters_of_the_engines_are_told_by_step(clock: Clock) -> None:
    balance, _, _ = make(clock, engines=2)
    balance.begin()
    start = EngineLoad(running=4, prefix_queries=100, prefix_hits=50, preemptions=2)
    balance.loads([start, EngineLoad()])
    balance.loads(
        [EngineLoad(running=8, waiting=2, kv_cache_usage=0.5, prefix_queries=200, prefix_hits=125, preemptions=3), start]
    )
    clock.now += 1
    metrics = balance.take()
    assert metrics["queue/engine_running/mean"] == 8.0  # (4 + 12) / 2
    assert metrics["queue/engine_waiting/mean"] == 1.0
    assert metrics["engine/kv_cache_usage/max"] == 0.5
    assert metrics["engine/preemptions/count"] == 3.0
    assert metrics["engine/prefix_cache_hits/share"] == pytest.approx(125 / 200)
    balance.loads([EngineLoad(running=1), None])  # one was silent: no sum of both
    clock.now += 1
    metrics = balance.take()
    assert metrics["queue/engine_running/mean"] == 12.0
    assert metrics["engine/preemptions/count"] == 0.0
    assert "engine/prefix_cache_hits/share" not in metrics
