"""A chat, threads and a scripted policy for tests of single rollouts."""

from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest

from turnwise.inference.client import Completion
from turnwise.orchestrator.chat import TemplateChat, load_chat
from turnwise.orchestrator.env_threads import EnvThreads
from turnwise.orchestrator.rollout import Generate, Player

Reply = str | Callable[[Sequence[int]], str]


@pytest.fixture(scope="session")
def tiny_chat(tiny_model: Path) -> TemplateChat:
    chat = load_chat(str(tiny_model))
    assert isinstance(chat, TemplateChat)
    return chat


@pytest.fixture
async def env_threads() -> AsyncIterator[EnvThreads]:
    pool = EnvThreads()
    yield pool
    pool.close()


@pytest.fixture
def player(tiny_chat: TemplateChat, env_threads: EnvThreads) -> Player:
    return Player(tiny_chat, env_threads, seq_len=512, max_tokens=32)


@pytest.fixture
def policy_saying(tiny_chat: TemplateChat) -> Callable[..., Generate]:
    """Makes a policy that says texts in turn, the last one again and again, cut at the token limit like an engine's."""

    def make(*texts: str, version: int = 0, calls: list[tuple[list[int], int, int]] | None = None) -> Generate:
        said = 0

        async def generate(prompt: Sequence[int], max_tokens: int, seed: int) -> Completion:
            nonlocal said
            if calls is not None:
                calls.append((list(prompt), max_tokens, seed))
            text = texts[min(said, len(texts) - 1)]
            said += 1
            whole = [*tiny_chat.encoder.encode(text, "\ufdef"), tiny_chat.stop_ids[0]]
            ids = tuple(whole[:max_tokens])
            return Completion(ids, (-0.5,) * len(ids), "stop" if len(ids) == len(whole) else "length", ((version, len(ids)),))

        return generate

    return make
