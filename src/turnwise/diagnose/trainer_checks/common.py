"""What checks of the trainer have in common: where their numbers come from, and how names and shares are told."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from turnwise.diagnose.core import Check, Finding, Verdict
from turnwise.diagnose.probe_report import ProbeReport

if TYPE_CHECKING:
    from turnwise.diagnose.context import Context

NAMES = 3  # that are shown of a longer list
HELPS = "What helps: "  # before the remedy in what ended a process


def of_probe(name: str, question: str, needs: Sequence[str], judge: Callable[[ProbeReport], Finding]) -> Check:
    """A check whose verdict is a function of the probe's report."""

    def run(context: "Context") -> Finding:
        return judge(context.probe)

    return Check(name, question, tuple(needs), run)


def unmeasured(report: ProbeReport, what: str) -> Finding:
    """The trainer's processes ended before they came to it."""
    why, _, remedy = (report.failure or "the trainer's processes ended before it").partition(HELPS)
    during = f" (while {report.stage} was measured)" if report.stage else ""
    log = f"read the log, {report.log}" if report.log else ""
    return Finding(Verdict.FAIL, f"{what} was not measured: {why.rstrip()}{during}", remedy or log, lines=tuple(report.tail))


def listed(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
    return f"{', '.join(names[:NAMES])}{more}"


def percent(share: float) -> str:
    """`0.84 %`, `100 %`."""
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"


def rounded(value: float) -> str:
    """To one digit, as one would type it."""
    return f"{float(f'{value:.1g}'):g}"


def by_kind(values: Mapping[str, float], what: str) -> tuple[str, ...]:
    """Values of tensors as lines, those of the same tensor in every layer together."""
    kinds: dict[str, list[float]] = {}
    for name, value in values.items():
        kinds.setdefault(kind_of(name), []).append(value)
    return tuple(f"{kind:<28} {len(some):>4} tensors, {what} {min(some):.1e} to {max(some):.1e}" for kind, some in kinds.items())


def kind_of(name: str) -> str:
    """`model.layers.3.self_attn.q_proj.lora_A` as `self_attn.q_proj.lora_A`."""
    parts = name.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(part for part in parts[numbers[0] + 1 :] if not part.isdigit()) if numbers else name
