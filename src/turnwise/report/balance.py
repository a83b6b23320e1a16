"""Who waited for whom, in one sentence, and which key would change it."""

from dataclasses import dataclass

from turnwise.report.run import Run

IDLE = 0.25  # share of the time from which a side is called idle
HELD = 0.1  # share of the places for rollouts
STALE = 1.5  # versions; one is what working at the same time costs
WARM_UP = 2  # steps left out at the start of a run that has a few more: compilation, first caches
FEWEST_STEPS = 6


@dataclass(frozen=True)
class Balance:
    """Shares of the time of a run's steps, without the first ones."""

    trainer_idle: float
    engine_idle: float
    held_by_staleness: float  # of the places for rollouts
    held_by_load: float
    env: float  # of a rollout's time
    staleness: float  # versions, of what was trained on
    max_staleness: int

    @classmethod
    def of(cls, run: Run) -> "Balance | None":
        """None where the run did not measure both sides."""
        trainer, engine = _mean(run, "perf/trainer_idle/share"), _mean(run, "perf/engine_idle/share")
        if trainer is None or engine is None:
            return None
        rollout, env = _mean(run, "timing/rollout_s") or 0.0, _mean(run, "timing/env_s") or 0.0
        return cls(
            trainer,
            engine,
            _mean(run, "perf/held_by_staleness/share") or 0.0,
            _mean(run, "perf/held_by_load/share") or 0.0,
            env / rollout if rollout else 0.0,
            _mean(run, "staleness/mean") or 0.0,
            int(run.config.get("orchestrator", {}).get("max_staleness", 1)),
        )

    @property
    def even(self) -> bool:
        """Whether both sides were busy."""
        return max(self.trainer_idle, self.engine_idle) < IDLE

    @property
    def verdict(self) -> str:
        """One sentence, without a full stop."""
        trainer, engine = f"{self.trainer_idle:.0%}", f"{self.engine_idle:.0%}"
        if self.both_idle:
            return f"trainer and engines waited for each other: the trainer idled {trainer}, the engines {engine} of the time"
        if self.even:
            return f"neither side was the bottleneck: the trainer idled {trainer}, the engines {engine} of the time"
        if self.engine_idle > self.trainer_idle:
            return f"the trainer was the bottleneck: it idled {trainer} while the engines idled {engine}"
        return f"the engines were the bottleneck: they idled {engine} while the trainer idled {trainer}"

    @property
    def both_idle(self) -> bool:
        return min(self.trainer_idle, self.engine_idle) >= IDLE

    @property
    def remedy(self) -> str:
        """What to change, by key."""
        if self.both_idle and self.held_by_staleness >= HELD:
            return f"raise orchestrator.max_staleness (it is {self.max_staleness}), so that both work at the same time"
        if self.both_idle:
            return (
                f"rollouts spend {self.env:.0%} of their time in environments: raise orchestrator.max_inflight, so that others "
                "use the engines meanwhile, or make the environments faster"
            )
        if self.engine_idle > self.trainer_idle:
            more = "give the trainer more GPUs (gpus.trainer) and the engines fewer (gpus.inference)"
            if self.staleness < STALE:
                return more
            return (
                f"{more}; and lower orchestrator.max_staleness to 1: rollouts were {self.staleness:.1f} versions old because "
                "batches waited for the trainer, which is as fast with newer ones"
            )
        more = "give the engines more GPUs (gpus.inference) and the trainer fewer (gpus.trainer)"
        if self.held_by_load >= HELD:
            return more
        if self.staleness >= STALE:
            return (
                f"{more}; or lower orchestrator.max_inflight: rollouts were {self.staleness:.1f} versions old, and fewer at a "
                "time are newer, which costs no time while the engines stay busy"
            )
        key = "max_staleness" if self.held_by_staleness >= HELD else "max_inflight"
        return f"{more}; or raise orchestrator.{key}, if the engines decode faster with more rollouts at a time"


def _mean(run: Run, name: str) -> float | None:
    """Over the run's steps, each weighted by its duration."""
    steps, values = run.series(name)
    first = run.train_steps[WARM_UP] if len(run.train_steps) >= FEWEST_STEPS else 0
    known = [
        (run.metrics[step].get("timing/step_s", 1.0), value) for step, value in zip(steps, values, strict=True) if step >= first
    ]
    seconds = sum(weight for weight, _ in known)
    return sum(weight * value for weight, value in known) / seconds if seconds else None
