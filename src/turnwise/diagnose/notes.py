"""Collects what a check notices while it looks at one thing after the other; the gravest decides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from turnwise.diagnose.core import Finding, Verdict


@dataclass
class Notes:
    """Faults, warnings, and their remedies, in the order in which they were found."""

    faults: list[str] = field(default_factory=list[str])
    warnings: list[str] = field(default_factory=list[str])
    remedies: list[str] = field(default_factory=list[str])

    def fail(self, evidence: str, remedy: str = "") -> None:
        """It cannot learn as it is."""
        self.faults.append(evidence.rstrip("."))
        self._advise(remedy)

    def warn(self, evidence: str, remedy: str = "") -> None:
        """It can learn, but something is likely to disappoint."""
        self.warnings.append(evidence.rstrip("."))
        self._advise(remedy)

    def finding(self, summary: str, data: Mapping[str, Any] | None = None, lines: Sequence[str] = ()) -> Finding:
        """The verdict. Faults speak for themselves; without any, the evidence is the summary, and the warnings after it."""
        verdict = Verdict.FAIL if self.faults else Verdict.WARN if self.warnings else Verdict.PASS
        told = [*self.faults, *self.warnings] if self.faults else [summary, *self.warnings]
        return Finding(verdict, "; ".join(told), "; ".join(self.remedies), data or {}, tuple(lines))

    def _advise(self, remedy: str) -> None:
        if remedy and remedy not in self.remedies:
            self.remedies.append(remedy)
