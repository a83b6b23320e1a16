"""Which rollouts run when: order, places, retries, errors, stragglers, stale groups, resume."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from support.rollouts import echo_setup, make_config, make_rollout
from turnwise.config import BufferConfig
from turnwise.orchestrator.buffer import TaskBuffer
from turnwise.orchestrator.rollout import RolloutSpec
from turnwise.orchestrator.scheduler import FEWEST_GROUPS, Scheduler, TooManyErrors
from turnwise.orchestrator.types import Rollout, StopReason
from turnwise.orchestrator.waits import Blocked
from turnwise.transport import Progress

Play = Callable[[RolloutSpec], Awaitable[Rollout]]


class Games:
    """Rollouts that end when the test says so."""

    def __init__(self) -> None:
        self.running: dict[str, asyncio.Future[Rollout]] = {}
        self.specs: list[RolloutSpec] = []
        self.peak = 0

    async def play(self, spec: RolloutSpec) -> Rollout:
        self.specs.append(spec)
        future = self.running[spec.rollout_id] = asyncio.get_running_loop().create_future()
        self.peak = max(self.peak, len(self.running))
        try:
            return await future
        finally:
            self.running.pop(spec.rollout_id, None)

    async def end(self, rollout_id: str, reward: float = 0.0, error: str | None = None, reason: StopReason | None = None) -> None:
        group, index = (int(part) for part in rollout_id.removeprefix("g").split("-"))
        rollout = make_rollout(reward, group=group, index=index, error=error)
        self.running[rollout_id].set_result(replace(rollout, stop_reason=reason) if reason else rollout)
        await settle()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def make_scheduler(
    group: asyncio.TaskGroup,
    play: Play,
    version: Callable[[], int] = lambda: 0,
    admits: Callable[[int], bool] = lambda inflight: True,
    now: Callable[[], float] = lambda: 0.0,
    **orchestrator: object,
) -> Scheduler:
    config = make_config(**orchestrator)
    buffer = TaskBuffer([echo_setup()], BufferConfig(), config.seed)
    return Scheduler(config.orchestrator, buffer, play, group, seed=config.seed, version=version, admits=admits, now=now)


async def test_groups_are_issued_in_order_up_to_the_capacity():
    games = Games()
    async with asyncio.TaskGroup() as group:
        scheduler = make_scheduler(group, games.play)
        await settle()
        assert not games.running
        scheduler.set_capacity(2)
        await settle()
        assert sorted(games.running) == ["g0-0", "g0-1", "g1-0", "g1-1"]
        scheduler.close()


async def test_a_finished_group_keeps_its_place_until_it_is_settled():
    games = Games()
    async with asyncio.TaskGroup() as group:
        scheduler = make_scheduler(group, games.play)
        scheduler.set_capacity(1)
        await settle()
        await games.end("g0-0")
        await games.end("g0-1", 1.0)
        finished = scheduler.finished.get_nowait()
        assert [r.rollout_id for r in finished.rollouts] == ["g0-0", "g0-1"]
        assert (games.running, scheduler.pending) == ({}, [0])
        scheduler.settle(finished)
        scheduler.pump()
        await settle()
        assert (sorted(games.running), scheduler.pending) == (["g1-0", "g1-1"], [1])
        scheduler.close()


async def test_no_more_than_max_inflight_run_at_a_time_and_the_oldest_go_first():
    games = Games()
    async with asyncio.TaskGroup() as group:
        scheduler = make_scheduler(group, games.play, max_inflight=3)
        scheduler.set_capacity(4)
        await settle()
        assert sorted(games.running) == ["g0-0", "g0-1", "g1-0"]
        await games.end("g0-1")
        assert sorted(games.running) == ["g0-0", "g1-0", "g1-1"]
        assert (games.peak, scheduler.inflight) == (3, 3)
        scheduler.close()


async def test_saturated_engines_hold_new_rollouts_and_what_is_in_progress_goes_on():
    games, limit = Games(), 100
    async with asyncio.TaskGroup() as group:
        scheduler = make_scheduler(group, games.play, admits=lambda inflight: inflight < limit)
        limit = 3
        scheduler.set_capacity(2)
        await settle()
        assert sorted(games.running) == ["g0-0", "g0-1", "g1-0"]
        limit = 1
        await games.end("g0-0")
        await games.end("g0-1")
        assert (sorted(games.running), scheduler.waits.state) == (["g1-0"], Blocked.LOAD)
        assert scheduler.finished.get_nowait().id == 0
        limit = 2
        scheduler.pump()
        await settle()
        assert sorted(games.running) == ["g1-0", "g1-1"]
        scheduler.close()


async def test_the_reason_that_holds_the_next_rollout_back_is_known():
    games, admitted = Games(), True
    async with asyncio.TaskGroup() as group:
        scheduler = make_scheduler(group, games.play, admits=lambda inflight: admitted, max_inflight=4)
        scheduler.set_capacity(3)
        assert (scheduler.waits.state, scheduler.waits.weight) == (Blocked.INFLIGHT, 0.0)
        await settle()
        await games.end("g0-0")
        await games.end("g0-1")
        scheduler.settle(scheduler.finished.get_nowait())
        admitted = False
        scheduler.set_capacity(2, Blocked.STALENESS)  # groups 1 and 2 are open, and all of their rollouts begun
        await games.end("g1-0")
        assert (scheduler.waits.state, scheduler.waits.weight) == (Blocked.STALENESS, 0.25)
        scheduler.set_capacity(0, Blocked.EVALUATION)
        assert scheduler.waits.state is Blocked.EVALUATION
        scheduler.set_capacity(3)
        assert scheduler.waits.state is Blocked.LOAD
        scheduler.close()
        scheduler.pump()
        assert scheduler.waits.state is Blocked.END


async def test_an_errored_rollout_is_tried_again_with_another_seed_and_both_are_kept():
    games = Games()
    async with asyncio.TaskGroup() as group:
        scheduler = make_scheduler(group, games.play)
        scheduler.set_capacity(1)
        await settle()
        await games.end("g0-0", error="boom")
        await games.end("g0-1", 1.0)
        await games.end("g0-0", 0.5)
        finished = scheduler.finished.get_nowait()
        assert [r.reward for r in finished.rollouts] == [0.5, 1.0]
        assert [r.error for r in finished.failed_attempts] == ["boom"]
        attempts = [spec for spec in games.specs if spec.rollout_id == "g0-0"]
        assert [spec.attempt for spec in attempts] == [0, 1]
        assert attempts[0].sampling_seed != attempts[1].sampling_seed
        assert attempts[0].env_seed == attempts[1].env_seed
        scheduler.close()


async def test_retries_are_bounded_and_the_group_goes_on_without_the_rollout():
    games = Games()
    async with asyncio.TaskGroup() as group:
        scheduler = make_scheduler(group, games.play, max_error_retries=1)
        scheduler.set_capacity(1)
        await settle()
        await games.end("g0-1", 1.0)
        await games.end("g0-0", error="first")
        await games.end("g0-0", error="second")
        finished = scheduler.finished.get_nowait()
        assert [r.error for r in finished.rollouts] == ["second", None]
        assert [r.error for r in finished.failed_attempts] == ["first"]
        scheduler.close()


async def test_a_straggler_is_not_tried_again():
    games = Games()
    async with asyncio.TaskGroup() as group:
        scheduler = make_scheduler(group, games.play)
        scheduler.set_capacity(1)
        await settle()
        await games.end("g0-1", 1.0)
        await games.end("g0-0", error="too slow", reason=StopReason.STRAGGLER)
        assert scheduler.finished.get_nowait().rollouts[0].stop_reason is StopReason.STRAGGLER
        scheduler.close()


async def test_a_slow_rollout_does_not_keep_other_groups_from_finishing():
    games = Games()
    async with asyncio.TaskGroup() as group:
        scheduler = make_scheduler(group, games.play)
        scheduler.set_capacity(3)
        await settle()
        await games.end("g0-0")  # g0-1 hangs on
        for rollout in ("g2-0", "g2-1", "g1-1", "g1-0"):
            await games.end(rollout)
        assert [scheduler.finished.get_nowait().id for _ in range(2)] == [2, 1]
        scheduler.close()


@pytest.mark.parametrize(("max_staleness", "factor", "begun"), [(1, 2.0, {"g9-0", "g9-1"}), (1, None, set()), (0, 2.0, set())])
async def test_another_group_begins_in_place_of_one_that_takes_twice_as_long_as_others(
    max_staleness: int, factor: float | None, begun: set[str]
):
    games, clock = Games(), 0.0
    async with asyncio.TaskGroup() as group:
        settings = {"max_staleness": max_staleness, "straggler_factor": factor, "max_inflight": 9}
        scheduler = make_scheduler(group, games.play, now=lambda: clock, **settings)
        for number in range(FEWEST_GROUPS):  # each takes 10 seconds
            scheduler.set_capacity(1)
            await settle()
            clock += 10
            await games.end(f"g{number}-0")
            await games.end(f"g{number}-1")
            scheduler.settle(scheduler.finished.get_nowait())
        scheduler.pump()
        await settle()
        assert sorted(games.running) == ["g8-0", "g8-1"]
        clock += 20
        scheduler.pump()
        await settle()
        assert sorted(games.running) == ["g8-0", "g8-1"]
        clock += 0.1
        scheduler.pump()
        await settle()
        assert set(games.running) == {"g8-0", "g8-1", *begun}
        clock += 100
        scheduler.pump()
        await settle()
        assert set(games.running) == {"g8-0", "g8-1", *begun}  # not all can be late
        scheduler.close()


async def test_mostly_errors_end_the_run_with_the_reasons():
    async def fail(spec: RolloutSpec) -> Rollout:
        await asyncio.sleep(0)
        return make_rollout(group=spec.group_id, error=f"reason {spec.group_id}")

    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            make_scheduler(group, fail, max_inflight=4).set_capacity(8)
    (error,) = {str(e): e for e in caught.value.exceptions if isinstance(e, TooManyErrors)}.values()
    assert "8 of the last 8 rollouts ended with an error" in str(error)
    assert "orchestrator.max_error_share = 0.5" in str(error)
    assert "reason 0" in str(error)


async def test_some_errors_do_not_end_the_run():
    count = 0

    async def sometimes(spec: RolloutSpec) -> Rollout:
        nonlocal count
        count += 1
        await asyncio.sleep(0)
        return make_rollout(group=spec.group_id, index=0, error="now and then" if count % 3 == 0 else None)

    async with asyncio.TaskGroup() as group:
        scheduler = make_scheduler(group, sometimes)
        scheduler.set_capacity(30)
        finished = [await scheduler.finished.get() for _ in range(30)]
        scheduler.close()
    assert all(r.ok for f in finished for r in f.rollouts)


async def test_groups_that_began_with_a_policy_too_old_are_broken_off_and_make_room():
    games, version = Games(), 0
    async with asyncio.TaskGroup() as group:
        scheduler = make_scheduler(group, games.play, version=lambda: version, max_inflight=4)
        scheduler.set_capacity(2)
        await settle()
        await games.end("g0-0")
        await games.end("g1-0")
        await games.end("g1-1")
        version = 3
        stale = scheduler.drop_older_than(3)
        assert [(f.id, len(f.rollouts)) for f in stale] == [(0, 1)]  # group 1 is finished and is judged as such
        for one in stale:
            scheduler.settle(one)
        scheduler.set_capacity(2)
        await settle()
        assert sorted(games.running) == ["g2-0", "g2-1"]
        assert scheduler.inflight == 2
        assert scheduler.drop_older_than(3) == []
        scheduler.close()


async def test_a_group_whose_last_rollout_is_about_to_end_its_task_is_finished_and_not_dropped():
    async def play(spec: RolloutSpec) -> Rollout:
        return make_rollout(0.0, group=spec.group_id, index=int(spec.rollout_id[-1]))

    async with asyncio.TaskGroup() as group:
        scheduler = make_scheduler(group, play)
        scheduler.set_capacity(1)
        finished = await scheduler.finished.get()  # resumes before the done callback of the last task
        assert scheduler.open[0].tasks
        assert scheduler.drop_older_than(1) == []
        scheduler.settle(finished)
        scheduler.close()


async def test_a_resumed_run_issues_what_was_pending_first_and_repeats_its_seeds():
    games, before = Games(), Games()
    async with asyncio.TaskGroup() as group:
        old = make_scheduler(group, before.play)
        old.set_capacity(4)
        await settle()
        old.close()
    async with asyncio.TaskGroup() as group:
        scheduler = make_scheduler(group, games.play, max_inflight=100)
        scheduler.restore(Progress(next_group=4, pending=[1, 3]))
        assert scheduler.pending == [1, 3]
        scheduler.set_capacity(3)
        await settle()
        assert sorted(games.running) == ["g1-0", "g1-1", "g3-0", "g3-1", "g4-0", "g4-1"]
        known = {spec.rollout_id: spec.sampling_seed for spec in before.specs}
        assert all(known[s.rollout_id] == s.sampling_seed for s in games.specs if s.group_id < 4)
        scheduler.close()


async def test_an_exception_in_a_rollout_ends_the_run_and_starts_nothing_more():
    started = 0

    async def broken(spec: RolloutSpec) -> Rollout:
        nonlocal started
        started += 1
        await asyncio.sleep(0)
        raise RuntimeError("a bug")

    with pytest.raises(ExceptionGroup, match="unhandled errors"):
        async with asyncio.TaskGroup() as group:
            make_scheduler(group, broken, max_inflight=2).set_capacity(50)
    assert started == 2


async def test_an_outage_is_played_again_however_often_and_counts_as_no_error():
    games = Games()
    async with asyncio.TaskGroup() as group:
        scheduler = make_scheduler(group, games.play, max_error_retries=1, max_error_share=0.1, max_inflight=2)
        scheduler.set_capacity(1)
        await settle()
        for _ in range(40):
            await games.end("g0-0", error="engine down", reason=StopReason.OUTAGE)
        assert "g0-0" in games.running
        assert [spec.attempt for spec in games.specs if spec.rollout_id == "g0-0"] == list(range(41))
        await games.end("g0-0", reward=1.0)
        while games.running:
            await games.end(next(iter(games.running)))
        finished = scheduler.finished.get_nowait()
        scheduler.close()
    assert finished.rollouts[0].reward == 1.0
    assert len(finished.failed_attempts) == 40
