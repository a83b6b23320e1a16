"""Older spellings that experiment configs still carry, and what they are called now."""

from typing import Any

from turnwise.config.files import Tables, merge

RENAMED = {
    "inference_gpu_ids": "gpus.inference",
    "trainer_gpu_ids": "gpus.trainer",
    "container_gpu_ids": "gpus.containers",
    "inference.gpu_ids": "gpus.inference",
    "trainer.gpu_ids": "gpus.trainer",
    "inference.parallel.dp": "inference.dp",
    "inference.parallel.tp": "inference.tp",
    "inference.server.host": "inference.host",
    "inference.server.port": "inference.port",
    "orchestrator.rollouts_per_prompt": "orchestrator.rollouts_per_example",
    "orchestrator.group_size": "orchestrator.rollouts_per_example",
    "orchestrator.num_generations": "orchestrator.rollouts_per_example",
    "orchestrator.async_level": "orchestrator.max_staleness",
    "orchestrator.max_async_level": "orchestrator.max_staleness",
    "orchestrator.max_off_policy_steps": "orchestrator.max_staleness",
    "orchestrator.seq_len": "seq_len",
    "orchestrator.max_steps": "max_steps",
    "trainer.max_steps": "max_steps",
    "trainer.loss.type": "trainer.loss.kind",
    "trainer.optim.max_norm": "trainer.optim.max_grad_norm",
    "trainer.lr": "trainer.optim.lr",
    "orchestrator.sampling.max_completion_tokens": "orchestrator.sampling.max_tokens",
    "orchestrator.sampling.max_completion_length": "orchestrator.sampling.max_tokens",
    "model_name": "model.name",
}
"""Old dotted key -> new dotted key."""


def upgrade(tables: Tables) -> tuple[Tables, dict[str, str]]:
    """Tables with today's names, and which old key became which new one. Where both stand, the new name wins."""
    renamed: dict[str, str] = {}
    for old, new in RENAMED.items():
        value, rest = _take(tables, old.split("."))
        if value is _ABSENT:
            continue
        tables = merge(_nest(new.split("."), value), rest)
        renamed[old] = new
    return tables, renamed


def upgrade_flag(name: str) -> str:
    """Today's dotted name for the flag `--name` (snake case, without dashes)."""
    return RENAMED.get(name, name)


def notice(renamed: dict[str, str]) -> str:
    """The one notice about all older spellings of a command."""
    pairs = ", ".join(f"{old} is now {new}" for old, new in renamed.items())
    return f"Older spellings were accepted: {pairs}. Please rename them."


_ABSENT = object()


def _take(tables: Tables, path: list[str]) -> tuple[Any, Tables]:
    """The value at `path` and the tables without it (and without the tables this leaves empty)."""
    head, *tail = path
    if head not in tables:
        return _ABSENT, tables
    if not tail:
        return tables[head], {key: value for key, value in tables.items() if key != head}
    if not isinstance(tables[head], dict):
        return _ABSENT, tables
    value, rest = _take(tables[head], tail)
    if value is _ABSENT:
        return _ABSENT, tables
    kept = {key: inner for key, inner in tables.items() if key != head}
    return value, ({**kept, head: rest} if rest else kept)


def _nest(path: list[str], value: Any) -> Tables:
    for part in reversed(path):
        value = {part: value}
    return value
