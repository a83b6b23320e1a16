"""Rollouts as rows of a table: picked over the range of rewards, as text with what each turn earned."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from turnwise.monitor.secrets import Redactor

COLUMNS = ("step", "env", "task", "rollout", "reward", "components", "turns", "tokens", "stop_reason", "conversation")
MESSAGE_LIMIT = 2_000  # characters of one message
CONVERSATION_LIMIT = 20_000

Row = tuple[int, str, str, str, float, str, int, int, str, str]  # as COLUMNS names them
Record = Mapping[str, Any]  # a rollout of trajectories/step_N.jsonl or evals/step_N.json


def read_trajectories(path: Path) -> list[Record]:
    """Rollouts of a step that count, without their tokens; none where there is no file.

    Raises:
        ValueError: a line is no JSON object.
    """
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as lines:
        records = (json.loads(line) for line in lines)
        return [{key: value for key, value in record.items() if key != "samples"} for record in records if not record["error"]]


def read_evaluation(path: Path) -> list[Record]:
    """Evaluated rollouts that count; none where there is no file. Raises ValueError when it is no JSON."""
    if not path.exists():
        return []
    rollouts: list[Record] = json.loads(path.read_text(encoding="utf-8"))["rollouts"]
    return [record for record in rollouts if not record["error"]]


def pick(records: Iterable[Record], count: int) -> list[Record]:
    """`count` of them, from the best to the worst in equal distances; the best alone for one."""
    ranked = sorted(records, key=lambda record: -float(record["reward"]))
    if len(ranked) <= count:
        return ranked
    return [ranked[round(place * (len(ranked) - 1) / max(1, count - 1))] for place in range(count)]


def row(step: int, record: Record, redactor: Redactor) -> Row:
    """A rollout as a row of the table."""
    turns, earned = record["turns"], {name: value for name, value in record["components"].items() if value}
    return (
        step,
        str(record["env"]),
        str(record["task_id"]),
        str(record["rollout_id"]),
        float(record["reward"]),
        _signed(earned),
        turns if isinstance(turns, int) else len(turns),
        int(record["tokens"]),
        str(record["stop_reason"]),
        redactor.text(conversation(record)),
    )


def conversation(record: Record) -> str:
    """The messages; above each reply what it earned, where that was recorded."""
    messages: Sequence[Mapping[str, Any]] = record["messages"]
    turns: Sequence[Mapping[str, Any]] = record["turns"] if isinstance(record["turns"], list) else ()
    replies = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    of_reply = dict(zip(replies[len(replies) - len(turns) :], turns, strict=False))  # replies before are worked examples
    parts: list[str] = []
    for index, message in enumerate(messages):
        head = str(message["role"])
        if (turn := of_reply.get(index)) is not None:
            head += f", {turn['reward']:+.3f} ({_signed(turn['components']) or 'nothing'}; {turn['sampled_tokens']} tokens)"
        parts.append(f"[{head}]\n{_clipped(str(message.get('raw') or message['content']), MESSAGE_LIMIT)}")
    return _clipped("\n\n".join(parts), CONVERSATION_LIMIT)


def _signed(components: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:+.3g}" for name, value in components.items() if value)


def _clipped(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"
