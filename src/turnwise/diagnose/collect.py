"""Rollouts of the untrained policy, and the batch that the trainer would get of them: by the code of a run."""

import asyncio
import time
from collections.abc import Sequence

from turnwise.config import RLConfig
from turnwise.diagnose.core import CheckFailed
from turnwise.diagnose.session import Session
from turnwise.launch.models import Progress as Say
from turnwise.orchestrator.batches import BatchBuilder
from turnwise.orchestrator.buffer import TaskBuffer
from turnwise.orchestrator.chat import Chat
from turnwise.orchestrator.environments import EnvSetup
from turnwise.orchestrator.filters import FinishedGroup, JudgedGroup, NoSignal, judge
from turnwise.orchestrator.rollout import Player, RolloutSpec
from turnwise.orchestrator.scheduler import Scheduler, TooManyErrors
from turnwise.orchestrator.types import Rollout
from turnwise.transport import Batch, Progress

MOST_ROLLOUTS, FEWEST_ROLLOUTS = 64, 32  # unless the user says how many
FEWEST_GROUPS = 2
PATIENCE_S = 60.0  # when the fewest rollouts have taken longer, they have to do


def group_counts(config: RLConfig, rollouts: int | None) -> tuple[int, int]:
    """Groups to play at first, and those in all if that was quick.

    They are the groups of `rollouts`, or of two batches within bounds that keep it a matter of seconds to minutes.
    """
    settings = config.orchestrator
    most = rollouts or max(FEWEST_ROLLOUTS, min(MOST_ROLLOUTS, 2 * settings.batch_size))
    least = rollouts or FEWEST_ROLLOUTS
    return (
        max(FEWEST_GROUPS, least // settings.rollouts_per_example),
        max(FEWEST_GROUPS, most // settings.rollouts_per_example),
    )


def play_groups(
    config: RLConfig, setups: Sequence[EnvSetup], chat: Chat, session: Session, rollouts: int | None, say: Say
) -> list[JudgedGroup]:
    """The first groups of a run, with its tasks, seeds and sampling settings, judged as in a run.

    Args:
        rollouts: how many to play, to whole groups; chosen here when None.

    Raises:
        CheckFailed: most rollouts end with an error.
    """
    try:
        finished = session.run(_finished(config, setups, chat, session, group_counts(config, rollouts), say))
    except* TooManyErrors as failed:
        raise CheckFailed(str(failed.exceptions[0]), "mend the environment or the engine that the reasons name") from None
    return [judge(group, config.orchestrator.advantage, oldest_allowed=0) for group in finished]


def build_batch(config: RLConfig, groups: Sequence[JudgedGroup]) -> Batch:
    """The first batch, of as many of these groups as fill it; smaller than configured where they do not.

    Raises:
        CheckFailed: none of them carries signal.
    """
    builder = BatchBuilder(config, 1)
    try:
        for judged in groups:
            if not builder.complete:
                builder.add(judged.group)
    except NoSignal as error:
        raise CheckFailed(str(error)) from error
    samples = builder.samples()
    if not any(any(sample.advantages) for sample in samples):
        raise CheckFailed(f"none of {len(groups)} groups carries signal, so there is no batch to train on")
    return builder.build(samples, Progress(), {})


async def _finished(
    config: RLConfig, setups: Sequence[EnvSetup], chat: Chat, session: Session, counts: tuple[int, int], say: Say
) -> list[FinishedGroup]:
    """The groups in the order of their numbers."""
    settings, (first, every) = config.orchestrator, counts
    player = Player.of(config, chat, session.threads)
    done, began = 0, time.monotonic()

    async def play(spec: RolloutSpec) -> Rollout:
        nonlocal done
        generate = session.policy.generator(temperature=settings.sampling.temperature, affinity=spec.rollout_id)
        rollout = await player.play(spec, generate)
        done += rollout.ok
        say(f"{done} of {every * settings.rollouts_per_example} rollouts")
        return rollout

    buffer = TaskBuffer(setups, settings.buffer, config.seed)
    async with asyncio.TaskGroup() as tasks:
        scheduler = Scheduler(settings, buffer, play, tasks, seed=config.seed, version=lambda: 0)
        scheduler.set_capacity(first)
        finished = [await scheduler.finished.get() for _ in range(first)]
        if time.monotonic() - began < PATIENCE_S:
            scheduler.set_capacity(every)
            finished += [await scheduler.finished.get() for _ in range(every - first)]
        scheduler.close()
    return sorted(finished, key=lambda group: group.id)
