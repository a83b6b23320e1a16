"""The environment: an episode in a container, from the first look at the files to the score of what was submitted."""

import shlex
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from turnwise.config import EnvConfig, RLConfig
from turnwise.containers import DATA, ContainerGone, Ending, EngineDown, Pools, TransferRefused
from turnwise.envs.base import Outage, Step, TextEnv
from turnwise.envs.base import Task as Row
from turnwise.envs.mlgym.catalogue import Catalogue
from turnwise.envs.mlgym.editor import Editor
from turnwise.envs.mlgym.episode import Opened, Progress
from turnwise.envs.mlgym.evaluation import DATA_FOLDER, WORKSPACE, evaluate, take_submission
from turnwise.envs.mlgym.examples import worked_examples
from turnwise.envs.mlgym.hints import context_hint, time_hint
from turnwise.envs.mlgym.prompts import SYSTEM, describe, footed, opening, told
from turnwise.envs.mlgym.protocol import QUICK_S, Command, FormatError, Kind, Refused, parse_action
from turnwise.envs.mlgym.quality import code_quality
from turnwise.envs.mlgym.task import Half, Verdict, clipped

COMPONENTS = frozenset({"improvement", "validate_used", "submitted", "final_score", "command_ok", "code_quality"})
SPLITS = {"train": 0, "validation": 10_000}  # first variant of each
FORMAT_ERRORS = 3  # in a row end the episode


@contextmanager
def _void_on_outage() -> Generator[None]:
    """A container engine that is down says nothing about the agent."""
    try:
        yield
    except EngineDown as error:
        raise Outage(str(error)) from error


class MLGym(TextEnv):
    """Work on a machine-learning task in a container with a shell; validate, improve, submit."""

    component_names = COMPONENTS
    outcome_components = frozenset({"final_score"})
    uses_containers = True

    def __init__(
        self,
        *,
        tasks: Sequence[str] = ("titanic", "prisonersDilemma"),
        num_examples_per_task: int = 10,
        num_validation_per_task: int = 2,
        mlgym_root: str | Path | None = None,
        max_turns: int = 50,
        image: str = "python-science",
        gpus: int = 0,
        time_limit_s: float | None = None,
        max_validations: int = 5,
        validate_required: bool = False,
        validate_reward: float = 0.1,
        submit_reward: float = 0.1,
        command_reward: float = 0.0,
        quality_reward: float = 0.0,
        observation_chars: int = 3000,
        window: int = 100,
        shown_examples: int = 0,
        system_prompt: str = SYSTEM,
    ) -> None:
        """Set up; data is read when an episode begins.

        Args:
            tasks: names of built-in tasks, or of task files of `mlgym_root` (`configs/tasks/NAME.yaml`).
            num_examples_per_task: variants of each task in training; a built-in task divides its data anew in each.
            num_validation_per_task: variants held out.
            mlgym_root: a checkout in MLGym's layout, whose tasks come before the built-in ones.
            max_turns: replies of an episode.
            image: of the agent's and the evaluation's containers: a recipe's name or an image that the engine has.
            gpus: that each agent's container leases from `[gpus] containers`.
            time_limit_s: of a command that runs Python, and of an evaluation, seconds; the task's own when None.
            max_validations: calls of `validate` that are scored.
            validate_required: a submission without a validation before it scores nothing.
            validate_reward: paid once, for the first validation that has a score (component `validate_used`).
            submit_reward: paid for a submission that has a score (component `submitted`).
            command_reward: spread over the turns: paid for a command that works, taken for one that does not and for a reply
                without a single command (`command_ok`).
            quality_reward: paid at the end, times how tidy the Python files in the workspace are (`code_quality`).
            observation_chars: characters of a command's output that are shown: its beginning and its end.
            window: lines of a file that the editor shows.
            shown_examples: worked examples before the task, 0 to 3, as messages: a warm start for small models.
            system_prompt: instructions.

        Raises:
            ValueError: an unknown task, or a number out of its range.
        """
        super().__init__()
        if num_examples_per_task < 1 or num_validation_per_task < 1 or max_turns < 1:
            raise ValueError("args.num_examples_per_task, args.num_validation_per_task and args.max_turns must be at least 1")
        self.catalogue = Catalogue(None if mlgym_root is None else Path(mlgym_root).expanduser())
        self.catalogue.check(tasks)
        self.names = tuple(tasks)
        self.counts = {"train": num_examples_per_task, "validation": num_validation_per_task}
        self.max_turns, self.container_image, self.container_gpus, self.window = max_turns, image, gpus, window
        self.time_limit_s = time_limit_s
        self.max_validations, self.validate_required = max_validations, validate_required
        self.pays = {"validate": validate_reward, "submit": submit_reward, "command": command_reward, "quality": quality_reward}
        self.observation_chars = observation_chars
        self.system_prompt = system_prompt
        self.examples = worked_examples(shown_examples, WORKSPACE)
        self.progress = Progress()
        self._resources = ExitStack()
        self._open: Opened | None = None

    def tasks(self, split: str) -> Sequence[Row]:
        """One row a variant of each task: "id", "task", "variant".

        Raises:
            ValueError: an unknown split, or files that a built-in task needs are not there.
        """
        self.catalogue.check_data(self.names)
        if split not in SPLITS:
            raise ValueError(f"MLGym has no split {split!r}; there are {', '.join(SPLITS)}")
        variants = range(SPLITS[split], SPLITS[split] + self.counts[split])
        return [{"id": f"{name}/{variant}", "task": name, "variant": variant} for variant in variants for name in self.names]

    def plan_hints(self, config: RLConfig, table: EnvConfig) -> list[str]:
        limits = {name: self.time_limit_s or self.catalogue.time_limit_s(name) for name in self.names}
        turns = min(self.max_turns, table.max_turns or self.max_turns)
        hints = (context_hint(config, turns, self.observation_chars), time_hint(config, table, limits))
        return [hint for hint in hints if hint is not None]

    @_void_on_outage()
    def begin(self, task: Row) -> str:
        self.close()
        self.progress = Progress()
        chosen = self.catalogue.build(str(task["task"]), int(task["variant"]))
        if self.time_limit_s is not None:
            chosen = replace(chosen, time_limit_s=self.time_limit_s)
        box = self._resources.enter_context(self._pools.tasks.lease(self.container_image, gpus=self.container_gpus))
        box.put(chosen.workspace, WORKSPACE)
        box.put(chosen.data, DATA, protected=True)
        prepared = box.run(f"ln -s {DATA} {WORKSPACE}/{DATA_FOLDER} && cd {WORKSPACE}")
        if prepared.ending is not Ending.OK:
            raise ContainerGone(f"the workspace could not be prepared: {prepared.output}")
        self._open = Opened(chosen, box, Editor(box, window=self.window))
        return opening(chosen.description, told(chosen.baseline.get("validation", {})), self.max_turns)

    @_void_on_outage()
    def step(self, action: str) -> Step:
        self.turn += 1
        try:
            command = parse_action(action)
        except FormatError as error:
            return self._misread(str(error))
        except Refused as error:
            return self._answered(str(error), worked=False)
        self.progress.format_errors_in_a_row = 0
        if command.kind is Kind.SUBMIT:
            return self._submit()
        if command.kind is Kind.VALIDATE:
            return self._validate()
        if command.kind is Kind.SKIP:
            return self.answer(self._footed("Nothing was done."))
        if command.kind is Kind.FORFEIT:
            self.progress.ended("forfeit")
            return self.end("You gave up.")
        observation, worked = self._execute(command)
        return self._answered(observation, worked=worked)

    @_void_on_outage()
    def closing_components(self) -> dict[str, float]:
        """What is there is scored as if it had been submitted."""
        self.progress.ended("autosubmitted")
        components, _ = self._final()
        return components

    def episode_metrics(self) -> dict[str, float]:
        return self.progress.all_metrics()

    def typed(self, text: str) -> str | None:
        """A person types the command alone; `edit` and `insert` go on to their end mark."""
        if "```" in text:
            return text
        name = (text.split() or [""])[0]
        if name in ("edit", "insert") and text.rstrip().rpartition("\n")[2].strip() != f"end_of_{name}":
            return None
        return f"```\n{text}\n```"

    def close(self) -> None:
        """Give the container back."""
        self._open = None
        self._resources.close()

    def _misread(self, words: str) -> Step:
        p = self.progress
        p.format_errors, p.format_errors_in_a_row = p.format_errors + 1, p.format_errors_in_a_row + 1
        if p.format_errors_in_a_row >= FORMAT_ERRORS:
            self.progress.ended("format")
            ended = f"{words} That were {FORMAT_ERRORS} such replies in a row: the task is over."
            return self.end(ended, components=self._command_pay(worked=False))
        return self.answer(self._footed(words), components=self._command_pay(worked=False))

    def _execute(self, command: Command) -> tuple[str, bool]:
        """What a command shows, and whether it worked."""
        opened = self._opened
        if command.kind is Kind.EDITOR:
            try:
                return opened.editor.run(command, self._folder()), True
            except Refused as error:
                return str(error), False
        grammar = opened.box.run(f"bash -nc {shlex.quote(command.text)}", timeout_s=QUICK_S)
        if grammar.ending is not Ending.OK:
            return f"The command was not run, it is no valid shell command:\n{grammar.output.strip()}", False
        limit = opened.task.time_limit_s if command.trains else QUICK_S
        done = opened.box.run(command.text, timeout_s=limit)
        if done.new_session:
            opened.box.run(f"cd {WORKSPACE}")
        return describe(done, limit, self.observation_chars), done.ending is Ending.OK

    def _answered(self, observation: str, *, worked: bool) -> Step:
        p = self.progress
        p.commands, p.failed, p.format_errors_in_a_row = p.commands + 1, p.failed + (not worked), 0
        return self.answer(self._footed(observation), components=self._command_pay(worked=worked))

    def _command_pay(self, *, worked: bool) -> dict[str, float]:
        pay = self.pays["command"] / self.max_turns
        return {"command_ok": pay if worked else -pay} if pay else {}

    def _validate(self) -> Step:
        p = self.progress
        if p.validations >= self.max_validations:
            return self.answer(self._footed(f"All {self.max_validations} validations are used up; submit when you are done."))
        verdict = self._evaluated("validation")
        if verdict.scores is None:
            return self.answer(self._footed(f"There is no score: {verdict.words}."))
        p.validations += 1
        task = self._opened.task
        score = task.score(verdict.scores)
        gained = clipped(task.improvement(score, "validation")) if score is not None else 0.0
        before = max(0.0, p.best if p.best is not None else 0.0)
        p.best = gained if p.best is None else max(p.best, gained)
        components = {"improvement": max(0.0, gained - before)}
        if p.validations == 1:
            components["validate_used"] = self.pays["validate"]
        p.metrics |= {"validation_score": score or 0.0, "best_validation_improvement": p.best}
        base = told(task.baseline.get("validation", {}))
        words = f"Your score: {told(verdict.scores)}." + (f" The baseline: {base}." if base else "")
        return self.answer(self._footed(words), components=components)

    def _submit(self) -> Step:
        self.progress.ended("submitted")
        components, words = self._final()
        return self.end(words, components=components)

    def _final(self) -> tuple[dict[str, float], str]:
        """Components owed at the end, and what the agent is told."""
        quality = code_quality(self._opened.box, WORKSPACE) if self.pays["quality"] else None
        components = {} if quality is None else {"code_quality": self.pays["quality"] * quality}
        if self.validate_required and not self.progress.validations:
            return {**components, "final_score": 0.0}, "Nothing was scored: this task wants a validation before the submission."
        verdict = self._evaluated("test")
        task = self._opened.task
        score = None if verdict.scores is None else task.score(verdict.scores)
        self.progress.metrics["submission_found"] = float(verdict.found)
        if verdict.scores is None or score is None:
            return {**components, "final_score": 0.0}, f"There is no score: {verdict.words}."
        gained = clipped(task.improvement(score, "test"))
        self.progress.metrics |= {"score": score, "improvement": gained, "acc": float(gained > 0)}
        paid = {"final_score": gained, "submitted": self.pays["submit"]}
        return {**components, **paid}, f"Submitted. Your score: {told(verdict.scores)}."

    def _evaluated(self, half: Half) -> Verdict:
        opened = self._opened
        try:
            submission = take_submission(opened.box, opened.task)
        except TransferRefused as error:
            return Verdict(None, words=f"the submission cannot be taken: {error}")
        if submission is None:
            return Verdict(None, found=False, words=f"there is no {opened.task.submission.expected} in {WORKSPACE}")
        return evaluate(self._pools.evaluation, self.container_image, opened.task, half, submission)

    def _folder(self) -> str:
        return self._opened.box.run("pwd", timeout_s=QUICK_S).output.strip() or WORKSPACE

    def _footed(self, observation: str) -> str:
        file = self._opened.editor.opened
        left = self.max_turns - self.turn
        return footed(observation, left, self.max_turns, self._folder(), None if file is None else file.path)

    @property
    def _opened(self) -> Opened:
        if self._open is None:
            raise RuntimeError("MLGym: no episode is open; call reset() first")
        return self._open

    @property
    def _pools(self) -> Pools:
        if self.containers is None:
            raise ValueError("MLGym works in containers, and was given none; `rl` and `turnwise play` provide them")
        return self.containers
