"""The statistics of the canary alarm, on simulated engines: right ones are left alone, wrong ones are found."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.orchestrator.evidence import MOST_VERSIONS, Blocks, Evidence, Shown, shown
from turnwise.transport import Canary

Served = Callable[["World"], np.ndarray]  # logprobs that an engine serves, without its own noise


@dataclass
class World:
    """A policy that moves by `change` nats a token and version, and what trainer and engine say of it, each with its rounding.

    Tokens differ: certain ones hardly move and are hardly rounded. `heavy` draws from Student's t with 4 degrees of freedom.
    """

    rng: np.random.Generator
    change: float
    trainer_noise: float
    engine_noise: float
    tokens: int = 256
    heavy: bool = False

    def __post_init__(self) -> None:
        self.adapter = 0.0

    def _draw(self, size: float) -> np.ndarray:
        values = self.rng.standard_t(4, self.tokens) / np.sqrt(2) if self.heavy else self.rng.normal(size=self.tokens)
        return size * self.scale * values

    def step(self, served: Served) -> tuple[list[Blocks], list[Blocks]]:
        """One version: two canaries against the version before, and against the base model."""
        step, adapter = [], []
        self.adapter = float(np.hypot(self.adapter, self.change))  # what many steps in all directions add up to
        for _ in range(2):
            self.scale = self.rng.gamma(0.7, 1 / 0.7, self.tokens)
            self.moved, self.earlier = self._draw(self.change), self._draw(np.sqrt(self.adapter**2 - self.change**2))
            base, before, now = (
                exact + self._draw(self.trainer_noise) for exact in (0 * self.moved, self.earlier, self.earlier + self.moved)
            )
            engine = served(self) + self._draw(self.engine_noise)
            canary = Canary([0] * (self.tokens + 1), list(now), list(before), list(base))
            step.append(Blocks.of(list(engine), canary, canary.before))
            adapter.append(Blocks.of(list(engine), canary, canary.base))
        return step, adapter


def right(world: World) -> np.ndarray:
    return world.earlier + world.moved


def version_before(world: World) -> np.ndarray:
    return world.earlier


def no_adapter(world: World) -> np.ndarray:
    return 0 * world.moved


def half_adapter(world: World) -> np.ndarray:
    return (world.earlier + world.moved) / 2


def wrong_adapter(world: World) -> np.ndarray:
    return world.rng.permutation(world.earlier + world.moved)


def versions_until_alarm(world: World, served: Served, *, most: int, healthy: int = 0) -> int | None:
    """Versions of the fault after which it is found, behind `healthy` right ones; None when it is not."""
    step, adapter = Evidence(), Evidence()
    for version in range(1, healthy + most + 1):
        parts = world.step(served if version > healthy else right)
        step.add(parts[0])
        adapter.add(parts[1])
        if step.against() is not None or adapter.against() is not None:
            return version - healthy
    return None


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.floats(-6, 0).map(lambda power: 10.0**power),
    st.sampled_from([0.0, 1e-6, 0.01, 0.05, 0.1]),
    st.sampled_from([1e-6, 0.05, 0.3]),
    st.sampled_from([16, 40, 256]),
    st.booleans(),
)
def test_a_right_engine_never_raises_the_alarm_whatever_step_and_noise(
    seed: int, change: float, trainer_noise: float, engine_noise: float, tokens: int, heavy: bool
):
    """From steps that cannot be told from noise, where nothing can be judged, to steps of a nat a token."""
    world = World(np.random.default_rng(seed), change, trainer_noise, engine_noise, tokens, heavy)
    assert versions_until_alarm(world, right, most=50) is None


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize(("change", "noise"), [(0.0, 0.05), (0.005, 0.05), (0.03, 0.05)])
def test_a_thousand_versions_of_rounding_noise_raise_no_alarm(change: float, noise: float, heavy: bool):
    world = World(np.random.default_rng(7), change, noise, noise, 64, heavy)
    assert versions_until_alarm(world, right, most=1000) is None


@pytest.mark.parametrize("healthy", [0, 40])
@pytest.mark.parametrize("served", [version_before, no_adapter, wrong_adapter])
@pytest.mark.parametrize(("change", "noise", "most"), [(0.01, 1e-6, 3), (0.1, 0.05, 6), (0.04, 0.05, 60)])
def test_an_engine_that_serves_something_else_is_found(served: Served, change: float, noise: float, most: int, healthy: int):
    """Within a few versions where the step is larger than rounding, and when evidence has added up where it is not."""
    found = [
        versions_until_alarm(World(np.random.default_rng(seed), change, noise, noise), served, most=most, healthy=healthy)
        for seed in range(5)
    ]
    assert None not in found


@pytest.mark.parametrize("healthy", [10, 40])
def test_half_of_an_adapter_is_found_once_the_adapter_changes_much(healthy: int):
    found = [
        versions_until_alarm(World(np.random.default_rng(seed), 0.1, 0.05, 0.05), half_adapter, most=5, healthy=healthy)
        for seed in range(5)
    ]
    assert None not in found


def test_noise_of_the_trainer_draws_right_and_wrong_shares_towards_one_half_from_both_sides():
    """(C + s^2) / (C + 2 s^2) and s^2 / (C + 2 s^2), as the page says; the engine's own noise draws nowhere."""
    change, noise = 0.06, 0.05
    for served, expected in ((right, change**2 + noise**2), (version_before, noise**2)):
        world = World(np.random.default_rng(3), change, noise, 0.2, tokens=4000)
        evidence = Evidence()
        for _ in range(40):
            evidence.add(world.step(served)[0])
        found = evidence.everything()
        assert found is not None
        assert found.share == pytest.approx(expected / (change**2 + 2 * noise**2), abs=4 * found.error)
        assert found.error < 0.02


def test_the_standard_error_is_the_spread_of_the_share():
    """Over many worlds; the textbook error of a slope would be little more than half of it, since tokens differ."""
    shares, errors = [], []
    for seed in range(400):
        found = shown(Blocks.join(World(np.random.default_rng(seed), 0.1, 0.02, 0.05).step(right)[0]), 1)
        assert found is not None
        shares.append(found.share)
        errors.append(found.error)
    assert np.mean(errors) == pytest.approx(np.std(shares), rel=0.15)


def test_few_blocks_and_a_single_large_one_prove_nothing():
    few = Shown(share=0.0, error=0.001, blocks=15.9, floor=0.5, versions=1)
    assert not few.wrong
    assert Shown(share=0.0, error=0.001, blocks=16.0, floor=0.5, versions=1).wrong
    square = np.full(100, 1e-4)
    square[3] = 50.0  # one token that moved by 7 nats
    found = shown(Blocks(0 * square, square, square), 1)
    assert found is not None
    assert found.blocks < 1.01
    assert not found.wrong


@pytest.mark.parametrize(("share", "floor", "wrong"), [(0.6, 0.5, False), (0.6, 1.0, True), (0.8, 1.0, False), (0.4, -1.0, True)])
def test_the_limit_is_half_way_between_one_half_and_what_noise_leaves(share: float, floor: float, wrong: bool):
    assert Shown(share, error=0.005, blocks=100, floor=floor, versions=1).wrong == wrong


def test_the_floor_is_one_half_for_a_step_and_near_one_for_an_adapter_of_many_steps():
    now, before, base = [-1.0] * 160, [-1.1] * 160, [-2.0] * 160
    canary = Canary([0] * 161, now, before, base)
    step, adapter = (shown(Blocks.of(now, canary, origin), 1) for origin in (before, base))
    assert step is not None
    assert adapter is not None
    assert (step.floor, step.limit) == (pytest.approx(0.5), pytest.approx(0.5))
    assert (adapter.floor, adapter.limit) == (pytest.approx(0.995), pytest.approx(0.7475))


def test_without_a_change_there_is_nothing_to_show():
    still = [-1.0] * 20
    evidence = Evidence()
    assert evidence.everything() is None
    evidence.add([Blocks.of([-2.0] * 20, Canary([0] * 21, still, still), still)])
    assert evidence.everything() is None
    assert evidence.against() is None


def test_a_single_block_has_no_standard_error():
    canary = Canary([0] * 6, [-1.0] * 5, [-2.0] * 5)
    found = shown(Blocks.of([-1.0] * 5, canary, canary.before), 1)
    assert found is not None
    assert (found.share, found.error) == (1.0, np.inf)


def test_old_versions_are_forgotten():
    evidence, canary = Evidence(), Canary([0] * 161, [-1.0] * 160, [-2.0] * 160)
    for version in range(MOST_VERSIONS + 40):
        served = [-1.0] * 160 if version >= 40 else [-5.0] * 160
        evidence.add([Blocks.of(served, canary, canary.before)])
    found = evidence.everything()
    assert found is not None
    assert (found.share, found.versions) == (1.0, MOST_VERSIONS)


def test_logprobs_of_different_tokens_are_refused():
    with pytest.raises(ValueError, match="logprobs of 3, 2 and 2 tokens"):
        Blocks.of([-1.0, -1.0, -1.0], Canary([0, 1, 2], [-1.0, -1.0], [-1.0, -1.0]), [-1.0, -1.0])
