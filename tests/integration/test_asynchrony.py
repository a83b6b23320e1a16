"""Who waits for whom, counted in turns of a simulation and not in seconds.

The orchestrator is whole and real, and so are its files and its HTTP. Engine and trainer do nothing until the test grants it: in
each turn the engine may answer some requests and the trainer may do a part of a step, and before the next turn everything that
follows from it has happened.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from support.fake_trainer import publish
from support.orchestrated import batches, make_config, metrics, until
from support.rollouts import Echo
from support.scripted_engine import ScriptedEngine
from turnwise.config import RLConfig
from turnwise.inference.client import InferenceClient
from turnwise.orchestrator.loop import Orchestrator
from turnwise.orchestrator.rollout import derive_seed
from turnwise.orchestrator.waits import Blocked
from turnwise.transport import BatchLog, Progress, RunDir, WeightsStore

GROUP = 4
STEPS = 10


class OneTurn(Echo):
    """One reply and it is over."""

    def __init__(self) -> None:
        super().__init__(turns=1, tasks=100)


class ThreeTurns(Echo):
    """Three replies and it is over."""

    def __init__(self) -> None:
        super().__init__(turns=3, tasks=100)


class Grants(ScriptedEngine):
    """Answers what it is told to; replies of a group have different lengths, so that their rewards differ."""

    def __init__(self) -> None:
        super().__init__(script=lambda body: [65] * (1 + self.places.get(body["seed"], (0, 0, 0))[1]))
        self.held: dict[tuple[int, int, int], asyncio.Future[None]] = {}  # (group, rollout, turn)
        self.places = {
            derive_seed(derive_seed(0, "rollout", group, index, 0), turn): (group, index, turn)
            for group in range(20 * STEPS)
            for index in range(GROUP)
            for turn in range(3)
        }

    async def _finish(self, body: dict[str, Any], ids: Sequence[int]) -> str:
        place = self.places.get(body["seed"])
        if place is not None:  # evaluations go through
            self.held[place] = asyncio.get_running_loop().create_future()
            try:
                await self.held[place]
            finally:
                del self.held[place]
        return "length"

    def grant(self, most: int, allowed: Callable[[tuple[int, int, int]], bool]) -> int:
        """Answer the oldest requests that are allowed; returns how many there were."""
        places = sorted(place for place in self.held if allowed(place))[:most]
        for place in places:
            self.held[place].set_result(None)
        return len(places)


@dataclass
class Simulation:
    """A run, turn by turn."""

    run: Orchestrator
    engine: Grants
    store: WeightsStore
    log: BatchLog
    turn: int = 0
    version: int = 0  # newest that the trainer has published
    training: int = 0  # step that the trainer is at; 0: none
    left: int = 0  # turns until it is done
    engine_idle: list[int] = field(default_factory=list[int])  # turns in which there was nothing to do
    trainer_idle: list[int] = field(default_factory=list[int])

    async def play(
        self, *, answers: int, train_turns: int, allowed: Callable[[tuple[int, int, int]], bool] = lambda place: True
    ) -> None:
        """One turn: the engine answers at most `answers` requests, the trainer does 1 / `train_turns` of a step."""
        await self.settled()
        if not self.training and self.log.path(self.version + 1).exists():
            self.training, self.left = self.version + 1, train_turns
        if not self.training:
            self.trainer_idle.append(self.turn)
        if not self.engine.grant(answers, allowed):
            self.engine_idle.append(self.turn)
        self.turn += 1
        self.run.scheduler.pump()  # as each second does, when the engines have told their load
        if self.training:
            self.left -= 1
            if not self.left:
                self.version, self.training = self.training, 0
                publish(self.store, self.version)

    async def play_to_the_end(self, **turn: Any) -> None:
        while not self.over:
            assert self.turn < 50 * STEPS, "nothing moves any more"
            await self.play(**turn)

    async def settled(self) -> None:
        """Wait until all that follows from the turn before has happened."""
        await until(self._quiet)

    def _quiet(self) -> bool:
        scheduler, builder = self.run.scheduler, self.run.maker.builder
        return (
            self.run.policy.version == self.run.trained == self.version
            and scheduler.finished.empty()
            and not builder.complete
            and scheduler.inflight == len(self.engine.held)
            and not any(held.done() for held in self.engine.held.values())
            and scheduler.capacity == builder.capacity(self.version, self.run.max_steps)
            and len(self.log.steps()) == builder.step - 1
        )

    @property
    def over(self) -> bool:
        return self.version == self.run.max_steps


@asynccontextmanager
async def simulation(config: RLConfig) -> AsyncIterator[Simulation]:
    """A run whose first version is published. Broken off with the block if it is not over by then."""
    store, log = WeightsStore(RunDir(config.output_dir).weights), BatchLog(RunDir(config.output_dir).batches)
    publish(store, 0)
    async with Grants() as engine, InferenceClient([engine.url], model="base", request_timeout_s=60, max_retries=0) as client:
        run = Orchestrator(config, client, resume_step=0, progress=Progress(), next_batch=1)
        simulated = Simulation(run, engine, store, log)
        run.scheduler.now = lambda: float(simulated.turn)
        running = asyncio.create_task(run.run())
        try:
            yield simulated
            if simulated.over:
                await running
        finally:
            running.cancel()
            await asyncio.wait([running])


def one_turn(model: Path, out: Path, *, max_staleness: int, groups: int = 2, **orchestrator: Any) -> RLConfig:
    """Batches of `groups` groups of four rollouts of one turn."""
    settings = {"batch_size": groups * GROUP, "env": [{"id": f"{__name__}:OneTurn"}], "max_staleness": max_staleness}
    return make_config(model, out, max_steps=STEPS, orchestrator={**settings, **orchestrator})


async def test_engine_and_trainer_work_at_the_same_time_and_never_both_wait(tiny_model: Path, tmp_path: Path):
    """Both need two turns for a batch. One turn after the other they need four; side by side, two and the first batch's."""
    took: dict[int, int] = {}
    for staleness in (0, 1, 2):
        config = one_turn(tiny_model, tmp_path / str(staleness), max_staleness=staleness)
        async with simulation(config) as run:
            await run.play_to_the_end(answers=GROUP, train_turns=2)
        took[staleness] = run.turn
        assert not set(run.engine_idle) & set(run.trainer_idle)
        if staleness:
            assert run.trainer_idle == [0, 1]  # until the first batch is there
            assert run.engine_idle == [run.turn - 2, run.turn - 1]  # no batch is left to be made
    assert took == {0: 4 * STEPS, 1: 2 * STEPS + 2, 2: 2 * STEPS + 2}


async def test_a_group_that_never_ends_costs_no_step_a_turn_and_is_dropped_when_it_is_too_old(tiny_model: Path, tmp_path: Path):
    """The trainer needs eight turns a batch, the engine two. Group 10 is not answered as long as the run lasts."""
    took: dict[str, int] = {}
    for name, slow, settings in (("none", -1, {}), ("replaced", 10, {}), ("waited for", 10, {"straggler_factor": None})):
        config = one_turn(tiny_model, tmp_path / name, max_staleness=1, **settings)
        async with simulation(config) as run:
            await run.play_to_the_end(answers=GROUP, train_turns=8, allowed=lambda place, slow=slow: place[0] != slow)
        took[name] = run.turn
        if name == "replaced":
            assert run.trainer_idle == [0, 1]
        made = batches(config)
        assert [batch.step for batch in made] == list(range(1, STEPS + 1))
        in_batches = {sample.group_id for batch in made for sample in batch.samples}
        assert len(in_batches) == 2 * STEPS
        assert (10 in in_batches) == (name == "none")
        assert sum(values.get("groups/stale/count", 0.0) for values in metrics(config).values()) == (name != "none")
    assert took["none"] == took["replaced"] == 2 + 8 * STEPS
    assert took["waited for"] > took["replaced"]


async def test_a_rollout_goes_on_under_newer_versions_and_each_of_its_tokens_says_which(tiny_model: Path, tmp_path: Path):
    """Group 0 plays its first turn with version 0 and its last with version 1; group 3 is still playing when it is too old."""
    several = {"batch_size": 2 * GROUP, "env": [{"id": f"{__name__}:ThreeTurns"}], "max_staleness": 1}
    config = make_config(tiny_model, tmp_path, max_steps=4, orchestrator=several)
    async with simulation(config) as run:

        def allowed(place: tuple[int, int, int]) -> bool:
            group, _, turn = place
            return (turn < 1 or run.version >= 1) if group == 0 else (turn < 1 + run.version if group == 3 else True)

        while not run.version:
            await run.play(answers=100, train_turns=1, allowed=allowed)
        await run.settled()
        assert sorted(run.engine.adapters) == ["v0", "v1"]  # the second turns of groups 0 and 3 began with version 0
        assert {place[2] for place in run.engine.held if place[0] in (0, 3)} == {1}
        await run.play_to_the_end(answers=100, train_turns=1, allowed=allowed)
    made = batches(config)
    assert {sample.group_id for sample in made[0].samples} == {1, 2}
    of_group = [sample for sample in made[1].samples if sample.group_id == 0]
    assert len(of_group) == GROUP
    for index, sample in enumerate(of_group):
        sampled = [version for version, mask in zip(sample.policy_versions, sample.loss_mask, strict=True) if mask]
        assert sampled == [0] * (2 * (1 + index)) + [1] * (1 + index)
        assert sample.oldest_version == 0
    assert all(sample.group_id != 3 for batch in made for sample in batch.samples)
    assert sum(values.get("groups/stale/count", 0.0) for values in metrics(config).values()) == 1
    assert all(batch.step - 1 - sample.oldest_version <= 1 for batch in made for sample in batch.samples)


async def test_the_accounts_say_who_waited_for_whom(tiny_model: Path, tmp_path: Path):
    """One slow trainer, one slow engine; what is empty in the first is full in the second."""
    slow_trainer = one_turn(tiny_model, tmp_path / "trainer", max_staleness=1)
    async with simulation(slow_trainer) as run:
        while run.version < 2:
            await run.play(answers=100, train_turns=20)
        await run.settled()
        assert (run.run.scheduler.waits.state, run.run.scheduler.inflight) == (Blocked.STALENESS, 2 * GROUP)
        while not run.log.path(4).exists():
            await run.play(answers=100, train_turns=20)
            await run.settled()
        assert (run.run.scheduler.waits.state, run.run.scheduler.waits.weight) == (Blocked.STALENESS, 1.0)
        assert run.run.client.replicas.all[0].load == 0
        slow = metrics(slow_trainer)
    assert [slow[step]["staleness/lag"] for step in (1, 2)] == [0.0, 1.0]
    slow_engine = one_turn(tiny_model, tmp_path / "engine", max_staleness=1)
    async with simulation(slow_engine) as run:
        await run.play_to_the_end(answers=1, train_turns=1)
    fast = metrics(slow_engine)
    assert all(fast[step]["staleness/lag"] == 0.0 for step in range(1, STEPS + 1))
    assert slow[2]["perf/engine_idle/share"] > 0
    always_busy = range(2, STEPS - 1)  # from its first request on the engine holds one at least, as long as batches are left
    assert [fast[step]["perf/engine_idle/share"] for step in always_busy] == pytest.approx([0.0] * len(always_busy), abs=1e-9)


async def test_saturated_engines_get_no_new_rollouts_and_the_run_goes_on_all_the_same(tiny_model: Path, tmp_path: Path):
    saturated = {"vllm:num_requests_running": 4.0, "vllm:num_requests_waiting": 100.0}
    config = one_turn(tiny_model, tmp_path, max_staleness=1, max_inflight=2 * GROUP)
    async with simulation(config) as run:
        scheduler, run.run.engines.interval_s = run.run.scheduler, 0.01
        await run.settled()
        assert (scheduler.inflight, scheduler.waits.state) == (2 * GROUP, Blocked.INFLIGHT)
        run.engine.load = saturated
        await until(lambda: run.run.admission.limit == 0)
        await run.play(answers=GROUP, train_turns=1)
        await run.settled()
        assert (scheduler.inflight, scheduler.waits.state) == (GROUP, Blocked.LOAD)
        run.engine.load = {}
        await until(lambda: scheduler.inflight == 2 * GROUP)
        run.engine.load = saturated
        await until(lambda: run.run.admission.limit == 0)
        await run.play_to_the_end(answers=100, train_turns=1)
    assert [batch.step for batch in batches(config)] == list(range(1, STEPS + 1))
    assert sum(values.get("perf/held_by_load/share", 0.0) for values in metrics(config).values()) > 0


async def test_an_engine_that_tells_no_load_is_served_as_before(tiny_model: Path, tmp_path: Path):
    config = one_turn(tiny_model, tmp_path, max_staleness=1)
    async with simulation(config) as run:
        run.engine.metrics = False
        await run.play_to_the_end(answers=GROUP, train_turns=2)
    assert run.turn == 2 * STEPS + 2
