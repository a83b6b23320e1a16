"""The limit on rollouts in flight: when it comes, how far down, how it goes away, and that nothing is stuck behind it."""

import math

from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.inference.load import EngineLoad
from turnwise.orchestrator.admission import FULL_CACHE, Admission

SHARE = 0.25

loads = st.builds(
    EngineLoad,
    running=st.integers(0, 600).map(float),
    waiting=st.integers(0, 600).map(float),
    kv_cache_usage=st.floats(0, 1),
    preemptions=st.integers(0, 600).map(float),
)
told = st.lists(st.one_of(st.none(), loads), min_size=1, max_size=4)


def make(most: int = 1000, share: float = SHARE) -> Admission:
    return Admission(max_waiting_share=share, most=most)


def test_engines_without_a_queue_set_no_limit() -> None:
    admission = make()
    admission.update([EngineLoad(running=100), EngineLoad()], 100)
    assert admission.limit is None
    assert admission.allows(999)


def saturate(admission: Admission, loads: list[EngineLoad], inflight: int) -> None:
    """Two reports that say the same."""
    admission.update(loads, inflight)
    admission.update(loads, inflight)


def test_what_waits_beyond_the_share_comes_off_the_rollouts_in_flight() -> None:
    admission = make()
    saturate(admission, [EngineLoad(running=80, waiting=50), EngineLoad(running=20, waiting=5)], 180)
    assert admission.limit == 180 - (55 - 25)
    assert not admission.allows(180)
    assert not admission.allows(150)
    assert admission.allows(149)


def test_a_queue_that_drains_slowly_is_not_counted_twice() -> None:
    admission = make()
    admission.update([EngineLoad(running=200, waiting=110)], 510)
    for inflight, waiting in ((500, 100), (490, 90), (480, 80)):
        admission.update([EngineLoad(running=200, waiting=waiting)], inflight)
        assert admission.limit == 450


def test_between_half_and_the_whole_of_the_share_the_limit_stays() -> None:
    admission = make()
    saturate(admission, [EngineLoad(running=100, waiting=45)], 145)
    assert admission.limit == 125
    for waiting in (25, 20, 13):
        admission.update([EngineLoad(running=100, waiting=waiting)], 120)
        assert admission.limit == 125
    admission.update([EngineLoad(running=100, waiting=12)], 112)
    assert admission.limit == 125 + 13


def test_a_limit_that_would_reach_the_most_there_may_be_is_lifted() -> None:
    admission = make(most=150)
    saturate(admission, [EngineLoad(running=100, waiting=45)], 150)
    assert admission.limit == 130
    admission.update([EngineLoad(running=100)], 110)
    assert admission.limit is None


def test_a_moment_in_which_requests_arrive_together_holds_nobody() -> None:
    admission = make()
    for _ in range(3):
        admission.update([EngineLoad(running=0, waiting=500)], 500)
        assert admission.limit is None
        admission.update([EngineLoad(running=500)], 500)
        assert admission.limit is None


def test_of_two_queues_in_a_row_the_shorter_counts() -> None:
    for queues in ((100, 45), (45, 100)):
        admission = make()
        for waiting in queues:
            admission.update([EngineLoad(running=100, waiting=waiting)], 200)
        assert admission.limit == 180


def test_a_full_cache_counts_only_while_requests_are_thrown_out_of_it() -> None:
    admission = make()
    for preemptions, expected in ((5, None), (5, None), (8, None), (10, 98), (10, 98)):
        admission.update([EngineLoad(running=100, kv_cache_usage=FULL_CACHE, preemptions=preemptions)], 100)
        assert admission.limit == expected
    admission.update([EngineLoad(running=98, kv_cache_usage=0.9, preemptions=10)], 98)
    assert admission.limit == 98 + 24


def test_preemptions_with_room_in_the_cache_set_no_limit() -> None:
    admission = make()
    for preemptions in (0, 9):
        admission.update([EngineLoad(running=100, kv_cache_usage=0.9, preemptions=preemptions)], 100)
    assert admission.limit is None


def test_an_engine_that_falls_silent_lifts_the_limit() -> None:
    admission = make()
    saturate(admission, [EngineLoad(running=10, waiting=90)], 100)
    assert not admission.allows(100)
    admission.update([EngineLoad(running=10, waiting=90), None], 100)
    assert admission.allows(100)


def test_an_infinite_share_sets_no_limit_ever() -> None:
    admission = make(share=math.inf)
    for preemptions in (0, 9):
        admission.update([EngineLoad(running=0, waiting=500, kv_cache_usage=1, preemptions=preemptions)], 500)
    assert admission.limit is None


@given(st.lists(st.tuples(told, st.integers(0, 2000)), max_size=20), st.floats(0, 4))
def test_with_nothing_in_flight_one_may_always_begin(history: list[tuple[list[EngineLoad | None], int]], share: float) -> None:
    admission = make(share=share)
    for engines, inflight in history:
        admission.update(engines, inflight)
        assert admission.allows(0)


@given(
    st.lists(st.tuples(st.lists(loads, min_size=1, max_size=4), st.integers(1, 2000)), min_size=1, max_size=20), st.floats(0, 4)
)
def test_while_the_queue_stays_too_long_none_begins_beside_those_in_flight(
    history: list[tuple[list[EngineLoad], int]], share: float
) -> None:
    admission, before = make(share=share), False
    for engines, inflight in history:
        admission.update(engines, inflight)
        too_long = sum(e.waiting for e in engines) > share * sum(e.running for e in engines)
        assert not (before and too_long and admission.allows(inflight))
        before = too_long


@given(
    capacity=st.integers(20, 300),
    most=st.integers(1, 900),
    turns=st.integers(1, 5),
    share=st.floats(0.05, 1),
    grown=st.integers(20, 300),
)
@settings(deadline=None)
def test_the_queue_settles_at_its_share_and_the_engine_stays_full(
    capacity: int, most: int, turns: int, share: float, grown: int
) -> None:
    """First with an engine that runs `capacity` requests at a time, then with one that runs `grown`."""
    admission, engine = make(most, share), Engine(turns)
    for engine.capacity in (capacity, grown):
        settled = 150 + 5 * turns * most // engine.capacity  # to drain a queue of all rollouts, or to raise the limit
        for _ in range(settled):
            engine.play(admission, most)
        for _ in range(20):
            engine.play(admission, most)
            assert engine.running == min(engine.capacity, most)
            assert engine.waiting <= share * engine.capacity + 1


class Engine:
    """Plays rollouts of some turns, one request after the other, in rounds; no time passes in environments."""

    def __init__(self, turns: int) -> None:
        self.capacity, self.turns = 1, turns
        self.rollouts: list[int] = []  # turns left of each in flight; the first `capacity` run, the others wait

    @property
    def running(self) -> int:
        return min(self.capacity, len(self.rollouts))

    @property
    def waiting(self) -> int:
        return len(self.rollouts) - self.running

    def play(self, admission: Admission, most: int) -> None:
        """Report the load, end a fifth of the requests that run, queue their next turns, and begin what may begin."""
        admission.update([EngineLoad(running=self.running, waiting=self.waiting)], len(self.rollouts))
        ended = self.rollouts[: math.ceil(self.running / 5)]
        self.rollouts = self.rollouts[len(ended) :] + [left - 1 for left in ended if left > 1]
        while len(self.rollouts) < most and admission.allows(len(self.rollouts)):
            self.rollouts.append(self.turns)
