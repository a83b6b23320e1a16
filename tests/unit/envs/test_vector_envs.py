"""Our environments as vector environments of gymnasium."""

from copy import deepcopy
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import create_shared_memory, read_from_shared_memory, write_to_shared_memory
from hypothesis import given
from hypothesis import strategies as st

from turnwise.envs import FreeText, make
from turnwise.envs.shared_text import ROOM, SharedTexts

WORDS = ("crane", "<guess>slate</guess> é ☃", "zzzzz")
ONE_STEP_MORE = 7  # of a game of six guesses: with it the next game begins


def vector(mode: str) -> VectorEnv[Any, Any, Any]:
    return gymnasium.make_vec("turnwise/wordle", num_envs=3, vectorization_mode=mode)


@pytest.fixture
def played(request: pytest.FixtureRequest) -> list[Any]:
    """One game in each of three environments, and the beginning of the next."""
    envs = vector(request.param)
    try:
        return [envs.reset(seed=[1, 2, 3]), *(envs.step(WORDS) for _ in range(ONE_STEP_MORE))]
    finally:
        envs.close()


# Python 3.12 warns of every fork beside threads, which other tests of the process have started
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("played", ["sync", "async"], indirect=True)
def test_a_vector_of_games_is_the_games_side_by_side(played: list[Any]):
    for index, word in enumerate(WORDS):
        env = make("wordle")
        observation, info = env.reset(seed=index + 1)
        (observations, infos), *steps = played
        assert observations[index] == observation
        assert infos["task_id"][index] == info["task_id"]
        for observations, rewards, terminations, truncations, infos in steps[:-1]:
            observation, reward, terminated, truncated, info = env.step(word)
            assert (observations[index], rewards[index]) == (observation, reward)
            assert (terminations[index], truncations[index]) == (terminated, truncated)
            for kind in ("reward_components", "metrics"):
                assert {name: infos[kind][name][index] for name in info[kind]} == info[kind]
        observation, info = env.reset()
        observations, rewards, terminations, _, infos = steps[-1]
        assert (observations[index], rewards[index], terminations[index]) == (observation, 0.0, False)
        assert infos["task_id"][index] == info["task_id"]


def shared(texts: list[str]) -> SharedTexts:
    space = FreeText()
    memory = create_shared_memory(space, n=len(texts))
    for index, text in enumerate(texts):
        write_to_shared_memory(space, index, "x" * 40, memory)  # what stood there before
        write_to_shared_memory(space, index, text, memory)
    read = read_from_shared_memory(space, memory, n=len(texts))
    assert isinstance(read, SharedTexts)
    return read


@given(text=st.text(alphabet=st.characters(codec=None, categories=None), max_size=50))
def test_any_text_is_shared_as_it_is(text: str):
    assert list(shared([text, "other"])) == [text, "other"]


def test_what_is_shared_is_read_anew_and_a_copy_stays():
    texts = shared(["first", "second"])
    copy = deepcopy(texts)
    np.asarray(texts._rows)[0, :8].view(np.uint64)[0] = 2  # another process writes a shorter text
    assert (texts[0], copy, texts[0:2]) == ("fi", ("first", "second"), ("fi", "second"))


def test_a_text_beyond_the_memory_is_an_error_that_says_what_to_do():
    assert len(shared(["x" * ROOM])[0]) == ROOM
    with pytest.raises(ValueError, match=f"has {ROOM + 1} bytes, .* vector_kwargs=.*'shared_memory': False"):
        shared(["é" + "x" * (ROOM - 1)])
