"""A rollout of an environment of others through the orchestrator's own player, with replies by script."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from turnwise.config import EnvConfig
from turnwise.inference.client import Completion
from turnwise.orchestrator.chat import load_chat
from turnwise.orchestrator.env_threads import EnvThreads
from turnwise.orchestrator.environments import load_setups
from turnwise.orchestrator.rollout import Player, RolloutSpec
from turnwise.orchestrator.samples import to_samples
from turnwise.orchestrator.types import Rollout
from turnwise.transport.messages import Sample


async def played(
    env_id: str, args: Mapping[str, Any], texts: Sequence[str], *, model: Path, index: int = 0
) -> tuple[Rollout, list[Sample]]:
    """The rollout of training task `index` and its samples; every sampled token has the log-probability -0.5."""
    chat, threads = load_chat(str(model)), EnvThreads()
    (setup,) = load_setups([EnvConfig(id=env_id, args=dict(args))], "train")
    replies = iter(texts)

    async def generate(prompt: Sequence[int], max_tokens: int, seed: int) -> Completion:
        ids = (*chat.encoder.encode(next(replies), "\ufdef"), chat.stop_ids[0])  # type: ignore[attr-defined]
        return Completion(ids, (-0.5,) * len(ids), "stop", ((0, len(ids)),))

    try:
        spec = RolloutSpec("g0-0", 0, setup, setup.tasks[index], env_seed=1, sampling_seed=2)
        rollout = await Player(chat, threads, seq_len=512, max_tokens=32).play(spec, generate)
        return rollout, to_samples(rollout, [1.0] * len(rollout.turns))
    finally:
        threads.close()
