"""Worked examples: short episodes of tasks that do not exist, as messages before the first observation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from turnwise.envs.mlgym.prompts import footed, opening

Message = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """An episode: what the task is, what its baseline scores, and each command with what it shows."""

    description: str
    baseline: str
    turns: tuple[tuple[str, str], ...]  # (command, what it shows); the last one ends the episode


EXAMPLES = (
    Example(
        "Predict which mushrooms in `data/test.csv` are poisonous. Write `submission.csv` with the columns `Id`, `Poisonous`.",
        "accuracy 0.7012",
        (
            ("python3 baseline.py", "[no output]"),
            ("validate", "Your score: accuracy 0.7012. The baseline: accuracy 0.7012."),
            ("submit", ""),
        ),
    ),
    Example(
        "Predict the price of each car in `data/test.csv`. Write `submission.csv` with the columns `Id`, `Price`.",
        "r2 0.4417",
        (
            ("ls", "baseline.py\ndata"),
            ("python3 baseline.py", "[no output]"),
            ("validate", "Your score: r2 0.4417. The baseline: r2 0.4417."),
            ("submit", ""),
        ),
    ),
    Example(
        "Tell which of the letters in `data/test.csv` are vowels. Write `submission.csv` with the columns `Id`, `Vowel`.",
        "accuracy 0.8077",
        (
            ("head -n 2 data/test.csv", "Id,Letter\n1,q"),
            ("python3 baseline.py && ls", "baseline.py\ndata\nsubmission.csv"),
            ("validate", "Your score: accuracy 0.8077. The baseline: accuracy 0.8077."),
            ("submit", ""),
        ),
    ),
)


def worked_examples(count: int, folder: str) -> tuple[Message, ...]:
    """The first `count` examples as messages. The last command has no answer: user and assistant take turns strictly.

    Args:
        count: 0 to 3.
        folder: the workspace, as the environment names it.

    Raises:
        ValueError: there are not so many.
    """
    if not 0 <= count <= len(EXAMPLES):
        raise ValueError(f"args.shown_examples = {count} must be from 0 to {len(EXAMPLES)}")
    return tuple(message for example in EXAMPLES[:count] for message in _messages(example, folder))


def _messages(example: Example, folder: str) -> Sequence[Message]:
    turns = len(example.turns)
    shown = [opening(example.description, example.baseline, turns)]
    shown += [footed(told, turns - done, turns, folder) for done, (_, told) in enumerate(example.turns, start=1)]
    pairs = zip(shown, example.turns, strict=False)  # what the last command shows is left out
    return [
        message
        for observation, (command, _) in pairs
        for message in (
            {"role": "user", "content": observation},
            {"role": "assistant", "content": f"```\n{command}\n```"},
        )
    ]
