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
from turnwise.orchestrator.types import Rollout, StopReason
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


def assert_trained_on_what_was_sampled(rollout: Rollout, samples: Sequence[Sample]) -> None:
    """Of a game whose number 3 was found with the second reply, the first being 1."""
    assert (rollout.error, rollout.stop_reason) == (None, StopReason.TERMINATED)
    assert [message["content"] for message in rollout.messages] == ["Say 3.", "1", "higher", "3"]
    assert rollout.turns[-1].components == {"exact": 1.0, "short": 0.25}
    assert rollout.turns[1].prompt_ids[: len(rollout.turns[0].prompt_ids)] == rollout.turns[0].prompt_ids
    (sample,) = samples
    trained = [token for token, chosen in zip(sample.token_ids, sample.loss_mask, strict=True) if chosen]
    assert trained == [token for turn in rollout.turns for token in turn.sampled_ids]
    assert [logprob for logprob, chosen in zip(sample.logprobs, sample.loss_mask, strict=True) if chosen] == [-0.5] * len(trained)
