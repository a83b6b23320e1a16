"""Finished groups -> batches: what fills a place, what is dropped, and when a run has nothing to learn from."""

from dataclasses import dataclass, field

from turnwise.config import RLConfig
from turnwise.orchestrator.environments import EnvSetup
from turnwise.orchestrator.filters import Fate, FinishedGroup, JudgedGroup, NoSignal, explain_no_signal, judge
from turnwise.orchestrator.samples import to_samples
from turnwise.transport import Batch, Progress, Sample


@dataclass
class BatchBuilder:
    """Collects judged groups until they make a batch.

    Groups that errored or are too old never take a place and are replaced. Groups of equal reward take one, so that a batch
    without dynamic sampling may hold fewer samples; with dynamic sampling they are replaced too. A batch in which nothing
    carries signal is no step: its places are filled again, at most `filters.max_rounds` times.
    """

    config: RLConfig
    step: int  # of the batch being filled
    taken: list[JudgedGroup] = field(default_factory=list[JudgedGroup])  # groups in a place
    judged: list[JudgedGroup] = field(default_factory=list[JudgedGroup])  # everything this batch accounts for
    rounds: int = 1  # fillings of all places; all before the last were without signal

    @property
    def groups_per_batch(self) -> int:
        return self.config.orchestrator.batch_size // self.config.orchestrator.rollouts_per_example

    @property
    def oldest_allowed(self) -> int:
        """Oldest policy version that this batch may hold: (step - 1) - version <= max_staleness."""
        return self.step - 1 - self.config.orchestrator.max_staleness

    @property
    def free_places(self) -> int:
        return self.groups_per_batch - len(self.taken)

    @property
    def rollouts(self) -> int:
        """Rollouts in their places so far."""
        return sum(len(judged.group.rollouts) for judged in self.taken)

    def capacity(self, served_version: int, max_steps: int) -> int:
        """Groups that may be open now: none that would be too old when trained on, none beyond the last batch."""
        last_batch = min(self.newest_batch(served_version), max_steps)
        return self.groups_per_batch * (last_batch - self.step + 1) - len(self.taken)

    def newest_batch(self, version: int) -> int:
        """The last batch that a rollout which begins with this version may be in: (batch - 1) - version <= max_staleness."""
        return version + self.config.orchestrator.max_staleness + 1

    def add(self, group: FinishedGroup) -> JudgedGroup:
        """Judge a group and give it a place if it gets one.

        Raises:
            NoSignal: `filters.max_rounds` batches' worth of groups in a row carried none, or could not fill a batch.
        """
        settings = self.config.orchestrator
        judged = judge(group, settings.advantage, oldest_allowed=self.oldest_allowed)
        self.judged.append(judged)
        equal = judged.fate is Fate.EQUAL
        if judged.fate is Fate.SIGNAL or (equal and not settings.filters.dynamic_sampling):
            self.taken.append(judged)
        self._check_rounds()
        if not self.free_places and not any(taken.fate is Fate.SIGNAL for taken in self.taken):
            self.taken.clear()
            self.rounds += 1
        return judged

    def drop_stale(self, group: FinishedGroup) -> None:
        """Account for a group that was broken off because its policy had become too old."""
        silent = judge(group, self.config.orchestrator.advantage, oldest_allowed=self.step)
        self.judged.append(JudgedGroup(group, silent.advantages, Fate.STALE))

    @property
    def complete(self) -> bool:
        return self.free_places <= 0

    def build(self, samples: list[Sample], progress: Progress, metrics: dict[str, float]) -> Batch:
        """The batch of `self.samples()`. Groups come in the order of their numbers, whoever of them was done first."""
        return Batch(
            step=self.step,
            samples=samples,
            rollout_ids=[r.rollout_id for judged in self.in_order() for r in judged.group.rollouts],
            num_rollouts=len({sample.rollout_id for sample in samples}),
            temperature=self.config.orchestrator.sampling.temperature,
            progress=progress,
            metrics=metrics,
            max_completion_tokens=max((self._most_tokens(judged.group.task.env) for judged in self.taken), default=0),
        )

    def samples(self) -> list[Sample]:
        """What the trainer gets of the groups in their places."""
        keep_equal = not self.config.orchestrator.filters.zero_variance
        kept = [j for j in sorted(self.taken, key=lambda j: j.group.id) if j.fate is Fate.SIGNAL or keep_equal]
        return [
            sample
            for judged in kept
            for rollout, advantages in zip(judged.group.rollouts, judged.advantages, strict=True)
            if rollout.ok
            for sample in to_samples(rollout, [float(value) for value in advantages])
        ]

    def in_order(self) -> list[JudgedGroup]:
        return sorted(self.judged, key=lambda judged: judged.group.id)

    def next(self) -> "BatchBuilder":
        """An empty batch after this one."""
        return BatchBuilder(self.config, self.step + 1)

    def _most_tokens(self, env: EnvSetup) -> int:
        return min(self.config.seq_len, env.max_turns * self.config.orchestrator.sampling.max_tokens)

    def _check_rounds(self) -> None:
        """Whether this batch has used up the patience: `max_rounds` batches' worth of groups."""
        filters = self.config.orchestrator.filters
        fates = [judged.fate for judged in self.judged]
        signal, equal = fates.count(Fate.SIGNAL), fates.count(Fate.EQUAL)
        hopeless = not self.complete if filters.dynamic_sampling else not signal
        if hopeless and signal + equal >= filters.max_rounds * self.groups_per_batch:
            needed = self.groups_per_batch if filters.dynamic_sampling else 1
            per_turn = self.config.orchestrator.advantage.per_turn
            raise NoSignal(explain_no_signal(self.judged, rounds=filters.max_rounds, needed=needed, per_turn=per_turn))
