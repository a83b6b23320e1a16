"""What changed on held-out tasks between the first and the last evaluation, and what of it is more than chance."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from turnwise.report.run import Run

SIGNIFICANT = 3.0  # standard errors of a difference; with tens of metrics, two would name a chance find in most runs
FORMAT_WORDS = ("format", "valid")  # components that a model earns by the shape of its reply alone

Verdict = Literal["rose", "fell", "unchanged", "unknown"]


@dataclass(frozen=True)
class Change:
    """A held-out metric before and after training."""

    name: str  # val-core/<env>/reward or val-aux/<env>/<component or metric>
    kind: Literal["reward", "component", "metric"]
    before: float
    after: float
    stderr: float | None  # of the difference; None where an evaluation gave none

    @property
    def difference(self) -> float:
        return self.after - self.before

    @property
    def standard_errors(self) -> float | None:
        """The difference in standard errors; infinite when every rollout gave the same before, and the same after."""
        if self.stderr is None:
            return None
        if self.stderr == 0:
            return 0.0 if self.difference == 0 else math.copysign(math.inf, self.difference)
        return self.difference / self.stderr

    @property
    def verdict(self) -> Verdict:
        z = self.standard_errors
        if self.difference == 0 or (z is not None and abs(z) < SIGNIFICANT):
            return "unchanged"
        if z is None:
            return "unknown"
        return "rose" if z > 0 else "fell"

    def as_dict(self) -> dict[str, Any]:
        """For JSON: an infinite ratio becomes null."""
        z = self.standard_errors
        ratio = z if z is not None and math.isfinite(z) else None
        return asdict(self) | {"difference": self.difference, "standard_errors": ratio, "verdict": self.verdict}


def changes(run: Run) -> list[Change]:
    """Every held-out metric that both the first and the last evaluation report: rewards, components, then the rest.

    Empty with fewer than two evaluations. The standard error of a difference takes the two evaluations as independent;
    on the same tasks the true one is smaller, so a verdict errs on the side of "unchanged".
    """
    if len(run.eval_steps) < 2:
        return []
    first, last = (run.metrics[step] for step in (run.eval_steps[0], run.eval_steps[-1]))
    components = run.components()
    found = [
        _change(name, components, first, last)
        for name in sorted(first.keys() & last.keys())
        if name.startswith("val-") and name.endswith(("/mean", "/share"))
    ]
    return sorted(found, key=lambda change: ("reward", "component", "metric").index(change.kind))


def _change(full_name: str, components: set[str], first: dict[str, float], last: dict[str, float]) -> Change:
    name = full_name.rsplit("/", 1)[0]
    what = name.rsplit("/", 1)[-1]
    core = name.startswith("val-core/")
    kind = "reward" if core and what == "reward" else "component" if not core and what in components else "metric"
    errors = [values.get(f"{name}/stderr") for values in (first, last)]
    stderr = None if errors[0] is None or errors[1] is None else math.hypot(errors[0], errors[1])
    return Change(name, kind, first[full_name], last[full_name], stderr)


def conclusion(found: list[Change]) -> str:
    """The table in words: did the held-out reward rise, by which components, and was it the format alone."""
    if not found:
        return "There are not two evaluations to compare."
    return " ".join(
        _conclusion_of(env, found) for env in sorted({change.name.split("/", 1)[1].rsplit("/", 1)[0] for change in found})
    )


def _conclusion_of(env: str, found: list[Change]) -> str:
    own = [change for change in found if change.name.split("/", 1)[1].rsplit("/", 1)[0] == env]
    reward = next((change for change in own if change.kind == "reward"), None)
    if reward is None:
        return f"**{env}**: no reward was evaluated."
    amount = f"from {reward.before:.3f} to {reward.after:.3f}{_in_errors(reward)}"
    parts = {
        word: [c.name.rsplit("/", 1)[-1] for c in own if c.kind == "component" and c.verdict == word]
        for word in ("rose", "fell", "unchanged")
    }
    detail = "; ".join(f"{word}: {', '.join(names)}" for word, names in parts.items() if names)
    detail = f" Components that {detail}." if detail else ""
    if reward.verdict == "rose" and format_alone(own):
        return f"**{env}**: the held-out reward rose {amount}, by **format alone**: no other component rose.{detail}"
    word = {"rose": "rose", "fell": "**fell**", "unchanged": "did not change beyond chance:", "unknown": "went"}[reward.verdict]
    return f"**{env}**: the held-out reward {word} {amount}.{detail}"


def format_alone(found: list[Change]) -> bool:
    """True when components rose, and all that did pay for the shape of a reply."""
    rose = [change.name.rsplit("/", 1)[-1] for change in found if change.kind == "component" and change.verdict == "rose"]
    return bool(rose) and all(any(word in name for word in FORMAT_WORDS) for name in rose)


def _in_errors(change: Change) -> str:
    z = change.standard_errors
    if z is None:
        return " (without standard errors)"
    return "" if math.isinf(z) else f" ({z:+.1f} standard errors)"


def table(found: list[Change]) -> str:
    """The changes as a Markdown table."""
    rows = ["| held-out | kind | before | after | difference | standard errors | verdict |", "|---|---|---:|---:|---:|---:|---|"]
    for change in found:
        z = change.standard_errors
        ratio = "?" if z is None else ("±∞" if math.isinf(z) else f"{z:+.1f}")
        verdict = {"rose": "**rose**", "fell": "**fell**", "unchanged": "unchanged", "unknown": "no standard error"}[
            change.verdict
        ]
        values = f"{change.before:.4g} | {change.after:.4g} | {change.difference:+.4g} | {ratio}"
        rows.append(f"| {change.name} | {change.kind} | {values} | {verdict} |")
    return "\n".join(rows)
