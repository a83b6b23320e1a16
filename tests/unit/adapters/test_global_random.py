"""Own randomness for code that draws from global generators."""

import random
from threading import Event, Thread

import numpy as np
import pytest

from turnwise.adapters import global_random
from turnwise.adapters.global_random import OwnRandomness


def draw() -> tuple[float, float]:
    return random.random(), float(np.random.random())


def test_a_seed_says_all_that_is_drawn_from_both_generators():
    first, again = OwnRandomness(4), OwnRandomness(4)
    with first():
        a = draw()
    random.random()
    with first():
        b = draw()
    with again():
        assert (draw(), draw()) == (a, b)


def test_a_trial_leaves_the_state_as_it_was():
    own = OwnRandomness(4)
    with own(keep=False):
        tried = draw()
    with own():
        assert draw() == tried


def test_the_generators_are_given_back_after_an_exception_too():
    random.seed(1)
    expected = draw()[0]
    random.seed(1)
    with pytest.raises(KeyError), OwnRandomness(9)():
        raise KeyError("game over")
    assert draw()[0] == expected
    with OwnRandomness(9)():  # and are free again
        draw()


def test_a_game_that_hangs_is_named_as_the_reason(monkeypatch: pytest.MonkeyPatch):
    held, over = Event(), Event()

    def hang() -> None:
        with OwnRandomness(1)():
            held.set()
            over.wait(30)

    thread = Thread(target=hang)
    thread.start()
    assert held.wait(30)
    monkeypatch.setattr(global_random, "WAIT_S", 0.01)
    with pytest.raises(TimeoutError, match="another episode has held the global random generators"), OwnRandomness(2)():
        pytest.fail("two episodes had the generators at once")
    over.set()
    thread.join()
