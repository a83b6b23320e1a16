"""Is there anything in the reward to learn from? Advantages are differences inside a group of rollouts of one task."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from turnwise.diagnose.context import Context
from turnwise.diagnose.core import Check, Finding
from turnwise.diagnose.notes import Notes
from turnwise.orchestrator.advantage import FloatArray
from turnwise.orchestrator.environments import EnvSetup
from turnwise.orchestrator.filters import FinishedGroup
from turnwise.orchestrator.overlong import COMPONENT as OVERLONG
from turnwise.orchestrator.types import Rollout

Value = Callable[[Rollout], float]

EQUAL = 1e-6  # rewards nearer to each other than this are equal
FEW = 0.25  # share of groups with variance, below which most of the sampling is for nothing
FAINT = 0.01  # share of the variance inside groups, below which a component does not steer
ROUNDING = 1e-6


@dataclass(frozen=True)
class Component:
    """What one component of one environment's reward did."""

    name: str
    factor: float  # 0 where it does not pay under the configured mode
    outcome: bool
    mean: float
    std: float  # inside groups, pooled
    varies: int  # groups in which it differs
    share: float  # of the variance of the reward inside groups; they sum to 1


def look(context: Context) -> Finding:
    """Compare the rewards inside each group, as totals or turn by turn as the run does."""
    groups = [judged.group for judged in context.groups if len(judged.group.valid) > 1]
    per_turn = context.config.orchestrator.advantage.per_turn
    notes, lines, data = Notes(), list[str](), dict[str, object]()
    for setup in context.setups:
        own = [group for group in groups if group.task.env.name == setup.name]
        if own:
            _judge(setup, own, notes, per_turn=per_turn)
            components = measured(setup, own)
            lines += _table(setup.name if len(context.setups) > 1 else "", components)
            data[setup.name] = [vars(component) for component in components]
    moving = sum(varies(group, per_turn=per_turn) for group in groups)
    rewards = [rollout.reward for group in groups for rollout in group.valid]
    data |= {"groups": len(groups), "with_variance": moving, "mean": fmean(rewards), "min": min(rewards), "max": max(rewards)}
    summary = f"rewards differ inside {moving} of {len(groups)} groups; mean {fmean(rewards):.3g}, {_span(rewards)}"
    return notes.finding(summary, data, lines)


def varies(group: FinishedGroup, *, per_turn: bool) -> bool:
    """Whether the rollouts of a group were paid differently."""
    return _spread([rollout.reward for rollout in group.valid]) > EQUAL or (
        per_turn and len({tuple(round(turn.reward, 6) for turn in rollout.turns) for rollout in group.valid}) > 1
    )


def measured(setup: EnvSetup, groups: Sequence[FinishedGroup]) -> list[Component]:
    """Every component that was paid or is declared, those that steer most first.

    A component's share is its covariance with the reward inside groups over the variance of the reward there.
    """
    names = sorted(set(setup.component_names) | {name for g in groups for r in g.valid for name in r.components})
    totals = _centred(groups, lambda rollout: rollout.reward)
    variance = float(totals @ totals)
    found: list[Component] = []
    for name in names:
        factor = factor_of(setup, name)
        values = _centred(groups, lambda rollout, name=name: rollout.components.get(name, 0.0))
        varied = sum(_spread([r.components.get(name, 0.0) for r in group.valid]) > EQUAL for group in groups)
        mean = fmean(r.components.get(name, 0.0) for group in groups for r in group.valid)
        share = factor * float(values @ totals) / variance if variance > EQUAL**2 else 0.0
        std = float(np.sqrt(values @ values / max(1, len(values) - len(groups))))
        found.append(Component(name, factor, name in setup.outcome_components, mean, std, varied, share))
    return sorted(found, key=lambda component: (-abs(component.share), component.name))


def factor_of(setup: EnvSetup, name: str) -> float:
    """What a component is multiplied with before it is paid; 0 where it is not."""
    reward = setup.config.reward
    if name == OVERLONG:
        return 1.0
    pays = reward.mode == "dense" or name in setup.outcome_components
    return reward.weights.get(name, 1.0) if pays else 0.0


def _judge(setup: EnvSetup, groups: Sequence[FinishedGroup], notes: Notes, *, per_turn: bool) -> None:
    rollouts = [rollout for group in groups for rollout in group.valid]
    _composed_right(setup, rollouts, notes)
    moving = [group for group in groups if varies(group, per_turn=per_turn)]
    if not moving:
        notes.fail(_nothing(setup, rollouts, len(groups)), _remedy(setup, groups))
    elif len(moving) < FEW * len(groups):
        still = f"only {len(moving)} of {len(groups)} groups of {setup.name} have rewards that differ"
        notes.warn(f"{still}, {_extremes(groups, moving)}", _remedy(setup, groups))
    elif outside := _without_outcome(setup, groups):
        notes.warn(outside, "expect the form to improve first; pay the outcome in smaller parts, or raise its weight")


def _composed_right(setup: EnvSetup, rollouts: Sequence[Rollout], notes: Notes) -> None:
    """Rewards are what their components and the reward table make of them."""
    for rollout in rollouts:
        expected = sum(factor_of(setup, name) * value for name, value in rollout.components.items())
        if abs(expected - rollout.reward) > ROUNDING * max(1.0, abs(expected)):
            notes.fail(
                f"rollout {rollout.rollout_id} of {setup.name} was paid {rollout.reward:.6g}, and its components come to "
                f"{expected:.6g}"
            )
            return


def _nothing(setup: EnvSetup, rollouts: Sequence[Rollout], groups: int) -> str:
    """Why no group carries signal."""
    rewards = [rollout.reward for rollout in rollouts]
    if _spread(rewards) <= EQUAL:
        made = ", ".join(f"{name} {value:.3g}" for name, value in _means(setup, rollouts).items() if abs(value) > EQUAL)
        return (
            f"all {len(rollouts)} rollouts of {setup.name} have the reward {rewards[0]:.4g} ({made or 'nothing is paid'}): "
            "it starts there and cannot move"
        )
    return (
        f"rewards of {setup.name} differ between tasks ({_span(rewards)}) and in none of {groups} groups of one task, so that no "
        "advantage differs from 0"
    )


def _extremes(groups: Sequence[FinishedGroup], moving: Sequence[FinishedGroup]) -> str:
    """Where the equal groups stand among all rewards seen."""
    rewards = [rollout.reward for group in groups for rollout in group.valid]
    equal = [group.valid[0].reward for group in groups if group not in moving]
    floor, ceiling = (sum(abs(value - end) <= EQUAL for value in equal) for end in (min(rewards), max(rewards)))
    return f"{floor} stand at the lowest reward seen ({min(rewards):.3g}) and {ceiling} at the highest ({max(rewards):.3g})"


def _without_outcome(setup: EnvSetup, groups: Sequence[FinishedGroup]) -> str:
    """What to say where the outcome takes no part in the differences; empty where it does, or where nothing else is paid."""
    components = measured(setup, groups)
    outcome = [component for component in components if component.outcome and component.factor]
    if not outcome or sum(abs(component.share) for component in outcome) > FAINT:
        return ""
    rest = ", ".join(f"{c.name} {c.share:.0%}" for c in components if abs(c.share) > FAINT)
    names = ", ".join(component.name for component in outcome)
    return f"the outcome of {setup.name} ({names}) hardly differs inside any group: what differs is {rest or 'nothing that pays'}"


def _remedy(setup: EnvSetup, groups: Sequence[FinishedGroup]) -> str:
    """What would bring differences, judged by what was seen."""
    both = {
        "dense": [r.reward_dense for g in groups for r in g.valid],
        "sparse": [r.reward_sparse for g in groups for r in g.valid],
    }
    other = "dense" if setup.config.reward.mode == "sparse" else "sparse"
    advice: list[str] = []
    if any(_spread([getattr(r, f"reward_{other}") for r in g.valid]) > EQUAL for g in groups) and _spread(both[other]) > EQUAL:
        advice.append(f'reward.mode = "{other}", under which rewards do differ')
    if all(len({tuple(r.replies()) for r in group.valid}) == 1 for group in groups):
        advice.append("a higher orchestrator.sampling.temperature, since all replies to a task are the same")
    return "try " + "; ".join([*advice, "tasks that are neither always nor never solved; more orchestrator.rollouts_per_example"])


def _means(setup: EnvSetup, rollouts: Sequence[Rollout]) -> Mapping[str, float]:
    names = sorted({name for rollout in rollouts for name in rollout.components})
    return {name: factor_of(setup, name) * fmean(r.components.get(name, 0.0) for r in rollouts) for name in names}


def _centred(groups: Sequence[FinishedGroup], value: Value) -> FloatArray:
    """Values of all valid rollouts, each less the mean of its group."""
    parts = [np.asarray([value(rollout) for rollout in group.valid]) for group in groups]
    return np.concatenate([part - part.mean() for part in parts])


def _spread(values: Sequence[float]) -> float:
    return max(values) - min(values)


def _span(values: Sequence[float]) -> str:
    return f"from {min(values):.3g} to {max(values):.3g}"


def _table(title: str, components: Sequence[Component]) -> list[str]:
    width = max([len(component.name) for component in components] + [9])
    rows = [f"{title or 'component':<{width}}  factor    mean  std in groups  varies in  share of variance"]
    for c in components:
        mark = "*" if c.outcome else " "
        rows.append(f"{c.name:<{width}}{mark} {c.factor:>6.3g}  {c.mean:>6.3f}  {c.std:>13.3f}  {c.varies:>9}  {c.share:>17.0%}")
    return [*rows, "* outcome"]


REWARD = Check("reward", "Do rewards differ inside groups, and by what?", ("rollouts",), look)
