"""Games of textarena, the real one or the fake, and what they answer to replies by script."""

from typing import Any

from turnwise.adapters.textarena import TextArena
from turnwise.envs import make


def game(name: str, **args: Any) -> TextArena:
    """A game by its id in textarena."""
    env = make(f"textarena:{name}", args)
    assert isinstance(env, TextArena)
    return env


def replay(env: TextArena, replies: list[str], row: int = 0) -> list[Any]:
    """The first observation, and the answers to the replies until the game is over."""
    trace: list[Any] = [env.reset(options={"task": env.tasks("train")[row]})[0]]
    for reply in replies:
        trace.append(env.step(reply))
        if env.over:
            break
    return trace
