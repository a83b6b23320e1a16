"""What `turnwise.adapters.reasoning_gym` uses of reasoning-gym 0.1: data sets by name, entries by index, their own scores."""

import random
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any


class Sums:
    """Additions; exact answers score 1, those that hold the right one a part."""

    def __init__(self, seed: int, size: int, terms: int = 2, score: Any = None, crash: bool = False) -> None:
        if terms < 1:
            raise AssertionError("terms must be positive")
        self.seed, self.size, self.terms, self.score, self.crash = seed, size, terms, score, crash

    def __getitem__(self, index: int) -> dict[str, Any]:
        assert index < self.size
        rng = random.Random(self.seed + index)
        numbers = [rng.randrange(1000) for _ in range(self.terms)]
        return {
            "question": " + ".join(map(str, numbers)) + " = ",
            "answer": str(sum(numbers)),
            "metadata": {"source_dataset": "sums"},
        }

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> Any:
        if self.crash:
            raise ValueError("invalid literal for int()")
        if self.score is not None:
            return self.score[0]
        if not answer:
            return 0.0
        return 1.0 if answer == entry["answer"] else len(entry["answer"]) / len(answer) if entry["answer"] in answer else 0.0


class Lists(Sums):
    """Draws from the process's generator, as one of theirs does."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"question": str(random.random()), "answer": "1", "metadata": {"source_dataset": "list_functions"}}


@dataclass
class DatasetSpec:
    name: str
    weight: float
    config: dict[str, Any]


class Composite:
    def __init__(self, seed: int, size: int, datasets: list[DatasetSpec]) -> None:
        self.seed, self.weights = seed, [spec.weight for spec in datasets]
        self.parts = [DATASETS[spec.name](seed=seed + k + 1, size=size, **spec.config) for k, spec in enumerate(datasets)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return random.Random(self.seed + index).choices(self.parts, weights=self.weights)[0][index]

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> Any:
        return self.parts[0].score_answer(answer, entry)


DATASETS: dict[str, Any] = {"sums": Sums, "list_functions": Lists, "composite": Composite}


def modules() -> dict[str, ModuleType]:
    fake: Any = ModuleType("reasoning_gym")
    fake.create_dataset = lambda name, **options: DATASETS[name](**options)
    fake.factory = SimpleNamespace(DATASETS=DATASETS)
    composite: Any = ModuleType("reasoning_gym.composite")
    composite.DatasetSpec = DatasetSpec
    fake.composite = composite
    return {"reasoning_gym": fake, "reasoning_gym.composite": composite}
