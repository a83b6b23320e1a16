"""The environment: one question, one reply."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from turnwise.envs.base import Step, Task, TextEnv
from turnwise.envs.gsm8k.scoring import Scoring, is_correct, marked_answer, true_answer
from turnwise.envs.suggest import did_you_mean
from turnwise.envs.tasks import Row, SplitSpec, check_rows, data_folder, read_hub, read_jsonl, select

HUB_ID = "openai/gsm8k"
INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
FIELDS = ("question", "answer")

TaskSource = str | Path | Sequence[Mapping[str, Any]]


class GSM8K(TextEnv):
    """Solve a grade-school word problem in one reply; the answer is a number after ####."""

    component_names = frozenset({"answer", "format"})
    outcome_components = frozenset({"answer"})

    def __init__(
        self,
        *,
        dataset: str | Path = HUB_ID,
        train: TaskSource = "train",
        validation: TaskSource = "test",
        scoring: Scoring = "strict",
        format_reward: float = 0.0,
        instruction: str = INSTRUCTION,
        system_prompt: str = "",
    ) -> None:
        """Set up; tasks are read when they are first asked for.

        Args:
            dataset: hub id (`"id"` or `"id,configuration"`), or a folder that holds `train.jsonl` and `test.jsonl`.
                For the default, `gsm8k/` in the folder that TURNWISE_DATA names is taken before the hub.
            train: training tasks: a split of `dataset` (`"train[:256]"`), the path of a JSONL file, or a list of rows.
            validation: held-out tasks, likewise.
            scoring: `strict` wants `#### number`; `flexible` takes the last number.
            format_reward: paid as component `format` for a reply that has `#### number`, right or wrong; 0 leaves it out.
            instruction: follows the question, after a space.
            system_prompt: none in the field's setting.

        Raises:
            ValueError: for an unknown scoring.
        """
        super().__init__()
        if scoring not in ("strict", "flexible"):
            raise ValueError(f"args.scoring = {scoring!r} must be 'strict' or 'flexible'")
        self.dataset, self.sources = dataset, {"train": train, "validation": validation}
        self.scoring: Scoring = scoring
        self.format_reward = format_reward
        self.instruction = instruction
        self.system_prompt = system_prompt
        self.max_turns = 1
        self.truth = ""
        self.metrics: dict[str, float] = {}
        self._rows: dict[str, tuple[Row, ...]] = {}

    def tasks(self, split: str) -> Sequence[Task]:
        """The rows of `split`: "id", "question" and "answer".

        Raises:
            ValueError: for an unknown split, a broken file, or a data set that cannot be loaded.
        """
        if split not in self.sources:
            raise ValueError(
                f"GSM8K has no split {split!r}.{did_you_mean(split, self.sources)} Known: {', '.join(self.sources)}."
            )
        if split not in self._rows:
            self._rows[split] = self._read(split)
        return self._rows[split]

    def begin(self, task: Task) -> str:
        missing = [name for name in FIELDS if name not in task]
        if missing:
            raise ValueError(f"GSM8K task {task.get('id')!r} lacks the field {missing[0]!r}")
        try:
            self.truth = true_answer(str(task["answer"]))
        except ValueError as error:
            raise ValueError(f"GSM8K task {task.get('id')!r}: {error}") from error
        self.metrics = {}
        return f"{task['question']} {self.instruction}".strip()

    def step(self, action: str) -> Step:
        self.turn += 1
        correct = is_correct(action, self.truth, scoring=self.scoring)
        marked = marked_answer(action) is not None
        self.metrics = {
            "acc": float(correct),
            "acc_strict": float(is_correct(action, self.truth, scoring="strict")),
            "acc_flexible": float(is_correct(action, self.truth, scoring="flexible")),
            "valid_format_rate": float(marked),
        }
        components = {"answer": float(correct)}
        if self.format_reward:
            components["format"] = self.format_reward * marked
        return self.end("Correct." if correct else f"The answer is {self.truth}.", components=components)

    def closing_components(self) -> dict[str, float]:
        return {"answer": 0.0}

    def episode_metrics(self) -> dict[str, float]:
        return dict(self.metrics)

    def _read(self, split: str) -> tuple[Row, ...]:
        source = self.sources[split]
        if not isinstance(source, str | Path):
            return select(check_rows(source, required=FIELDS, source=f"args.{split}"), SplitSpec(split), prefix="gsm8k")
        file, is_file, part = str(source).partition(".jsonl")
        if is_file:
            path = Path(f"{file}.jsonl").expanduser()
            return select(read_jsonl(path, required=FIELDS), SplitSpec.parse(path.stem + part), prefix="gsm8k")
        wanted = SplitSpec.parse(str(source))
        folder = _local_folder(str(self.dataset))
        if folder is not None:
            return select(read_jsonl(folder / f"{wanted.name}.jsonl", required=FIELDS), wanted, prefix="gsm8k")
        hub = f"{HUB_ID},main" if self.dataset == HUB_ID else str(self.dataset)
        return select(read_hub(hub, wanted, required=FIELDS), SplitSpec(wanted.name), prefix="gsm8k")


def _local_folder(dataset: str) -> Path | None:
    if dataset != HUB_ID:
        folder = Path(dataset).expanduser()
        return folder if folder.is_dir() else None
    data = data_folder()
    return data / "gsm8k" if data is not None and (data / "gsm8k").is_dir() else None
