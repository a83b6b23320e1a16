"""Batches as an orchestrator would write them, with random tokens: for tests of the trainer."""

import random
from collections.abc import Callable

from turnwise.config import RLConfig
from turnwise.transport import NOT_SAMPLED, Batch, Progress, Sample

ConfigOf = Callable[..., RLConfig]  # what the fixture `config_of` of the trainer's tests is
VOCABULARY = 256  # ordinary tokens of the tiny model


def make_sample(
    rng: random.Random,
    *,
    prompt: list[int] | None = None,
    turns: int = 2,
    rollout: str = "r0",
    group: int = 0,
    version: int = 0,
    advantage: float | None = None,
    logprob: float = -5.5,
) -> Sample:
    """A rollout of some turns: prompt, then replies in the mask with observations between them."""
    tokens = list(prompt) if prompt is not None else [rng.randrange(VOCABULARY) for _ in range(rng.randint(4, 12))]
    mask = [False] * len(tokens)
    for turn in range(turns):
        if turn:
            observation = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 5))]
            tokens += observation
            mask += [False] * len(observation)
        reply = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 9))]
        tokens += reply
        mask += [True] * len(reply)
    weight = rng.uniform(-1.5, 1.5) if advantage is None else advantage
    return Sample(
        token_ids=tokens,
        loss_mask=mask,
        logprobs=[logprob + rng.uniform(-0.3, 0.3) if chosen else 0.0 for chosen in mask],
        advantages=[weight if chosen else 0.0 for chosen in mask],
        policy_versions=[version if chosen else NOT_SAMPLED for chosen in mask],
        rollout_tokens=sum(mask),
        rollout_id=rollout,
        group_id=group,
        task_id=f"task-{group}",
    )


def make_batch(
    step: int, *, groups: int = 2, group_size: int = 3, seed: int = 0, prompt_tokens: int = 24, **options: float
) -> Batch:
    """A batch whose groups share a prompt, the same for the same arguments."""
    rng = random.Random(f"{seed}/{step}")
    samples: list[Sample] = []
    for group in range(groups):
        prompt = [rng.randrange(VOCABULARY) for _ in range(prompt_tokens)]
        number = (step - 1) * groups + group
        samples += [
            make_sample(rng, prompt=prompt, rollout=f"g{number}-{i}", group=number, version=step - 1, **options)  # pyright: ignore[reportArgumentType]
            for i in range(group_size)
        ]
    return Batch(
        step=step,
        samples=samples,
        rollout_ids=[sample.rollout_id for sample in samples],
        num_rollouts=len(samples),
        temperature=0.8,
        progress=Progress(next_group=step * groups),
        max_completion_tokens=32,
    )
