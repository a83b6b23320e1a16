"""A context of checks whose artefacts are put there by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.rollouts import make_config
from turnwise.config import RLConfig
from turnwise.diagnose.collect import build_batch
from turnwise.diagnose.context import Context
from turnwise.orchestrator.environments import EnvSetup, load_setups
from turnwise.orchestrator.filters import FinishedGroup, judge


def context_of(
    groups: Sequence[FinishedGroup],
    folder: Path,
    *,
    setups: Sequence[EnvSetup] | None = None,
    batch: bool = True,
    **settings: Any,
) -> Context:
    """Groups that were played somehow, judged by the real code; `settings` go into `[orchestrator]`."""
    config: RLConfig = make_config(**{"rollouts_per_example": 2, "batch_size": 64, **settings})
    context = Context(config, folder, lambda text: None)
    context.config = config
    context.setups = list(setups) if setups is not None else load_setups(config.orchestrator.env, "train")
    context.groups = [judge(group, config.orchestrator.advantage, oldest_allowed=0) for group in groups]
    if batch:
        context.batch = build_batch(config, context.groups)
    return context
