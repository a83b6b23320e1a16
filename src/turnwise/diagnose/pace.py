"""How long a step and a run take, from what was measured on a few rollouts and one step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from turnwise.config import RLConfig
from turnwise.diagnose.probe_report import ProbeReport
from turnwise.orchestrator.filters import Fate, JudgedGroup
from turnwise.transport import Batch


@dataclass(frozen=True)
class Played:
    """Rollouts that were played side by side."""

    rollouts: int
    tokens: int  # sampled
    seconds: float  # from the first that began to the last that was done

    @classmethod
    def of(cls, groups: Sequence[JudgedGroup]) -> Self:
        """Of all rollouts of some groups, with attempts that failed."""
        every = [r for judged in groups for r in (*judged.group.rollouts, *judged.group.failed_attempts)]
        begun = min(rollout.timing["started"] for rollout in every)
        done = max(rollout.timing["started"] + rollout.timing["total_s"] for rollout in every)
        return cls(len(every), sum(rollout.sampled_tokens for rollout in every), done - begun)

    def seconds_for(self, rollouts: float) -> float:
        """Of as many rollouts at this rate; where engines still have room, more of them side by side go faster."""
        return self.seconds * rollouts / self.rollouts


@dataclass(frozen=True)
class Pace:
    """Where the time of a run goes, in seconds."""

    rollouts_s: float  # a step's rollouts
    train_s: float  # a step's passes and updates
    publish_s: float
    swap_s: float
    beside: bool  # the next rollouts are played while the trainer works, on other devices
    pauses: bool  # engines sample nothing while they take new weights
    steps: int
    evaluations: int
    evaluation_s: float

    @property
    def step_s(self) -> float:
        """One step."""
        train = self.train_s + self.publish_s
        if not self.beside:
            return self.rollouts_s + train + self.swap_s
        return max(self.rollouts_s + (self.swap_s if self.pauses else 0.0), train)

    @property
    def total_s(self) -> float:
        """The run without its start; evaluations beside training are counted as if they took time of their own."""
        return self.steps * self.step_s + self.evaluations * self.evaluation_s

    @property
    def shares(self) -> dict[str, float]:
        """Of the work of a step, the slowest first; more than 1 in all where it is done side by side."""
        parts = {"rollouts": self.rollouts_s, "training": self.train_s, "publication": self.publish_s, "weight swap": self.swap_s}
        ordered = sorted(parts.items(), key=lambda part: -part[1])
        return {name: seconds / self.step_s for name, seconds in ordered} if self.step_s > 0 else dict.fromkeys(parts, 0.0)


def works_beside(config: RLConfig) -> bool:
    """Whether rollouts and training really overlap: where they may, and compute on devices of their own."""
    apart = bool(config.gpus.inference or config.gpus.trainer) and not config.gpus.shared
    return config.orchestrator.max_staleness > 0 and apart


def evaluation_count(config: RLConfig) -> int:
    """Evaluations of a run: before the first step, at the interval, and at the end."""
    steps, settings = config.max_steps or 1, config.orchestrator.eval
    at_interval = range(settings.interval, steps, settings.interval) if settings.interval else range(0)
    return settings.at_start + len(at_interval) + 1


def pace_of(
    config: RLConfig, groups: Sequence[JudgedGroup], batch: Batch, report: ProbeReport, *, swap_s: float, held_out: int
) -> Pace:
    """The pace of a run, scaled from what was measured.

    Args:
        config: resolved.
        groups: that were played.
        batch: made of them.
        report: of the trainer's processes; with gradient, cost and publication.
        swap_s: of one version.
        held_out: rollouts of an evaluation.
    """
    settings = config.orchestrator
    played = Played.of(groups)
    assert report.gradient is not None
    assert report.cost is not None
    assert report.published is not None
    dynamic = settings.filters.dynamic_sampling
    needed = settings.batch_size / (signal_share(groups) if dynamic else 1.0)
    placed = batch.num_rollouts if dynamic else len(batch.rollout_ids)  # rollouts of which the batch was made
    tokens = report.cost.batch_tokens * settings.batch_size / placed
    passes = tokens / report.setting.ranks / training_rate(report)
    updates = config.trainer.updates_per_batch
    return Pace(
        rollouts_s=played.seconds_for(needed),
        train_s=updates * (passes + report.cost.update_s),
        publish_s=report.published.seconds,
        swap_s=swap_s,
        beside=works_beside(config),
        pauses=config.trainer.model.lora is None,
        steps=config.max_steps or 1,
        evaluations=evaluation_count(config),
        evaluation_s=played.seconds_for(held_out),
    )


def training_rate(report: ProbeReport) -> float:
    """Inputs that a rank computes in a second, forward and backward.

    Of the batch; or of the rehearsal, where that was faster: it has larger micro-batches and compiles nothing any more.
    """
    assert report.gradient is not None
    assert report.cost is not None
    rate = report.cost.tokens / report.setting.ranks / report.gradient.seconds
    rehearsed = report.rehearsal
    return max(rate, rehearsed.budget / rehearsed.seconds) if rehearsed and rehearsed.seconds > 0 else rate


def signal_share(groups: Sequence[JudgedGroup]) -> float:
    """Of the groups that can be in a batch, those that carry signal; one of them at least."""
    fates = [judged.fate for judged in groups]
    usable = fates.count(Fate.SIGNAL) + fates.count(Fate.EQUAL)
    return max(1, fates.count(Fate.SIGNAL)) / max(1, usable)
