"""What checks look at: made when first asked for, once, by the code that a run uses."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from turnwise.config import RLConfig
from turnwise.launch.models import Progress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turnwise.diagnose.probe_report import ProbeReport
    from turnwise.diagnose.session import Session
    from turnwise.orchestrator.chat import Chat
    from turnwise.orchestrator.environments import EnvSetup
    from turnwise.orchestrator.filters import JudgedGroup
    from turnwise.transport import Batch


class Context:
    """The user's configuration and everything derived from it.

    Args:
        config: as the user wrote it, checked, not resolved.
        scratch: a folder for whatever is written; nothing of the user's run is touched.
        say: told what takes long.
    """

    def __init__(self, config: RLConfig, scratch: Path, say: Progress) -> None:
        self.given = config
        self.scratch = scratch
        self.say = say

    @cached_property
    def config(self) -> RLConfig:
        """Resolved, with `output_dir` in the scratch folder. Raises CheckFailed."""
        raise NotImplementedError

    @cached_property
    def setups(self) -> "list[EnvSetup]":
        """The training environments. Raises CheckFailed."""
        raise NotImplementedError

    @cached_property
    def chat(self) -> "Chat":
        """The model's chat. Raises CheckFailed."""
        raise NotImplementedError

    @cached_property
    def session(self) -> "Session":
        """Running engines, with a client and an event loop. Raises CheckFailed."""
        raise NotImplementedError

    @cached_property
    def groups(self) -> "Sequence[JudgedGroup]":
        """Rollouts of the untrained policy, judged as in a run. Raises CheckFailed."""
        raise NotImplementedError

    @cached_property
    def batch(self) -> "Batch":
        """What the trainer gets of those groups. Raises CheckFailed when none carries signal."""
        raise NotImplementedError

    @cached_property
    def probe(self) -> "ProbeReport":
        """What the trainer's processes measured on that batch. Raises CheckFailed."""
        raise NotImplementedError

    def close(self) -> None:
        """End what was started."""
