"""Data sets of reasoning-gym: a question, one reply, and the data set's own score."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from turnwise.adapters.answers import bounded_text, finite_number
from turnwise.adapters.global_random import OwnRandomness
from turnwise.adapters.packages import optional_package
from turnwise.adapters.seeds import rows_of, seed_of, seeded_splits
from turnwise.envs.base import Step, Task, TextEnv
from turnwise.envs.suggest import did_you_mean

COMPOSITE = "composite"
DRAWS_GLOBALLY = {"list_functions", "pool_matrix"}  # from the process's generators, whatever the seed of the data set
TAGS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
INSTRUCTION = "Give the final answer between <answer> and </answer>."

Extraction = Literal["tags", "last_line", "whole"]


class ReasoningGym(TextEnv):
    """A data set of reasoning-gym: `reasoning_gym:leg_counting`; several by weight: `reasoning_gym:composite`."""

    component_names = frozenset({"score", "format"})
    outcome_components = frozenset({"score"})
    max_turns = 1

    def __init__(
        self,
        *,
        source: str,
        dataset: Mapping[str, Any] | None = None,
        datasets: Sequence[Mapping[str, Any]] | None = None,
        extraction: Extraction = "tags",
        format_reward: float = 0.0,
        instruction: str = INSTRUCTION,
        system_prompt: str = "",
        show_answer: bool = False,
        scoring_errors: Literal["raise", "wrong"] = "raise",
        num_train: int = 1024,
        num_validation: int = 128,
        seed: int = 0,
    ) -> None:
        """Make the data sets; an entry is made when its episode begins.

        Args:
            source: name of a data set, or `composite`.
            dataset: its options, such as `{max_animals = 3}`; without `seed` and `size`, which the tasks say.
            datasets: of a composite: tables with `name`, `weight` (1 when left out) and `config`, the options.
            extraction: where the answer is, see `read_answer`.
            format_reward: paid as component `format` for a reply with tags; 0 leaves it out.
            instruction: follows the question on a line of its own.
            system_prompt: none when not given.
            show_answer: say the right answer after a wrong one; the episode is over then.
            scoring_errors: what an exception of the data set's own `score_answer` is: a failure, whose rollout is repeated, or
                (`wrong`) a score of 0, counted in the metric `scoring_error_rate`. Some data sets raise on answers that they
                cannot read.
            num_train: training tasks.
            num_validation: held-out tasks, with seeds that no training task has.
            seed: of the first task.

        Raises:
            ValueError: for an unknown data set, or arguments that do not fit.
        """
        super().__init__()
        if extraction not in ("tags", "last_line", "whole"):
            raise ValueError(f"args.extraction = {extraction!r} must be 'tags', 'last_line' or 'whole'")
        if scoring_errors not in ("raise", "wrong"):
            raise ValueError(f"args.scoring_errors = {scoring_errors!r} must be 'raise' or 'wrong'")
        self.source, self.instruction, self.scoring_errors = source, instruction, scoring_errors
        self.extraction: Extraction = extraction
        self.system_prompt, self.show_answer = system_prompt, show_answer
        self.format_reward = finite_number(format_reward, what="args.format_reward")
        self.splits = seeded_splits(f"reasoning_gym/{source}", num_train=num_train, num_validation=num_validation, seed=seed)
        self.options = _options(source, dataset or {}, datasets)
        self.names = [table["name"] for table in self.options["datasets"]] if source == COMPOSITE else [source]
        self.datasets = {split: self._make(rows.first, rows.size) for split, rows in self.splits.items() if rows.size}
        self.dataset: Any = None
        self.entry: dict[str, Any] = {}
        self.metrics: dict[str, float] = {}

    def tasks(self, split: str) -> Sequence[Task]:
        """Rows of "id" and "seed": entry i of a data set is made from its seed + i, which is the task's.

        Raises:
            ValueError: for an unknown split.
        """
        return rows_of(self.splits, split, source=f"reasoning_gym:{self.source}")

    def begin(self, task: Task) -> str:
        seed = seed_of(task, source=f"reasoning_gym:{self.source}")
        self.metrics = {} if self.scoring_errors == "raise" else {"scoring_error_rate": 0.0}
        self.dataset, index = self._place(seed)
        if DRAWS_GLOBALLY.isdisjoint(self.names):
            self.entry = self.dataset[index]
        else:
            with OwnRandomness(seed)():
                self.entry = self.dataset[index]
        question = bounded_text(self.entry["question"], what=f"the question of reasoning_gym:{self.source}, seed {seed}")
        return f"{question.strip()}\n{self.instruction}".strip()

    def step(self, action: str) -> Step:
        self.turn += 1
        answer, tagged = read_answer(action, self.extraction)
        score = self._score(answer)
        self.metrics |= {"acc": float(score >= 1), "score": score, "valid_format_rate": float(tagged)}
        if self.source == COMPOSITE:
            self.metrics[f"score_{self.entry['metadata']['source_dataset']}"] = score
        components = {"score": score}
        if self.format_reward:
            components["format"] = self.format_reward * tagged
        right = self.entry["answer"] if self.show_answer and score < 1 else None
        told = "Correct." if score >= 1 else "Not correct." if right is None else f"Not correct. The answer is {right}."
        return self.end(told, components=components)

    def closing_components(self) -> dict[str, float]:
        return {"score": 0.0}

    def episode_metrics(self) -> dict[str, float]:
        return dict(self.metrics)

    def _score(self, answer: str | None) -> float:
        what = f"score_answer of reasoning_gym:{self.source}"
        try:
            score = self.dataset.score_answer(answer=answer, entry=self.entry)
        except Exception as error:
            if self.scoring_errors == "raise":
                raise RuntimeError(
                    f"{what} failed on the answer {str(answer)[:80]!r}: {type(error).__name__}: {error} (where that is how it "
                    "treats answers that it cannot read, args.scoring_errors = 'wrong' scores them 0)"
                ) from error
            score, self.metrics["scoring_error_rate"] = 0.0, 1.0
        return finite_number(score, what=what)

    def _place(self, seed: int) -> tuple[Any, int]:
        for split, dataset in self.datasets.items():
            rows = self.splits[split]
            if rows.first <= seed < rows.first + rows.size:
                return dataset, seed - rows.first
        return self._make(seed, 1), 0

    def _make(self, seed: int, size: int) -> Any:
        gym = optional_package("reasoning_gym", extra="reasoning-gym")
        known: Sequence[str] = list(gym.factory.DATASETS)
        for name in self.names:
            if name not in known:
                raise ValueError(f"reasoning_gym has no data set {name!r}.{did_you_mean(name, known)}")
        options = dict(self.options)
        if self.source == COMPOSITE:
            spec = optional_package("reasoning_gym.composite", extra="reasoning-gym").DatasetSpec
            options["datasets"] = [spec(**table) for table in self.options["datasets"]]
        try:
            return gym.create_dataset(self.source, seed=seed, size=size, **options)
        except (TypeError, ValueError, AssertionError, KeyError) as error:
            raise ValueError(f"reasoning_gym:{self.source} cannot be made with the options {self.options}: {error}") from error


def read_answer(reply: str, extraction: Extraction) -> tuple[str | None, bool]:
    """The answer in a reply, and whether it stands between tags.

    Args:
        reply: of the policy.
        extraction: `tags`: between the last `<answer>` and `</answer>`, and where there are none the last line that is not
            empty; `last_line`: that line always; `whole`: all of the reply.

    Returns:
        The answer without white space around it, None for an empty one; and whether the reply has tags.
    """
    tagged = TAGS.findall(reply)
    if extraction == "whole":
        answer = reply.strip()
    elif tagged and extraction == "tags":
        answer = tagged[-1].strip()
    else:
        answer = next((line.strip() for line in reversed(reply.splitlines()) if line.strip()), "")
    return answer or None, bool(tagged)


def _options(source: str, dataset: Mapping[str, Any], datasets: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    if (datasets is not None) != (source == COMPOSITE):
        raise ValueError(f"reasoning_gym:{source}: args.datasets belongs to 'reasoning_gym:composite', which needs it")
    for name in ("seed", "size"):
        if name in dataset:
            raise ValueError(f"args.dataset.{name} cannot be given; args.seed, num_train and num_validation say which entries")
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in dataset.items()}
    return options if datasets is None else {**options, "datasets": [_spec(table) for table in datasets]}


def _spec(table: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(table) - {"name", "weight", "config"})
    if unknown or "name" not in table:
        raise ValueError(f"args.datasets holds {dict(table)!r}; each table has a name, and may have weight and config")
    return {"name": table["name"], "weight": table.get("weight", 1.0), "config": dict(table.get("config", {}))}
