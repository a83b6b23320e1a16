"""The environment: search, read, answer."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from turnwise.envs.base import Step, Task
from turnwise.envs.messages import AssistantMessage, Tool, ToolCall
from turnwise.envs.musique import prompts
from turnwise.envs.musique.corpora import shared_corpus
from turnwise.envs.musique.data import Question, TaskSource, keep, only_answerable, read_rows
from turnwise.envs.musique.episode import Episode
from turnwise.envs.musique.retrieval import Corpus, question_corpus
from turnwise.envs.suggest import did_you_mean
from turnwise.envs.tool_env import ToolEnv
from turnwise.envs.tools import Done, ToolError, tool

HUB_ID = "bdsaglam/musique"


@dataclass(frozen=True)
class Pays:
    """Sizes of the reward components, as the arguments name them."""

    em_reward: float
    support_reward: float
    citation_reward: float
    format_reward: float
    search_cost: float
    invalid_call_cost: float


class MuSiQue(ToolEnv):
    """Answer a question of two to four hops by searching and reading paragraphs, and cite those that support the answer."""

    component_names = frozenset({"answer_f1", "answer_em", "support_found", "citation", "format", "useless_call"})
    outcome_components = frozenset({"answer_f1", "answer_em"})

    def __init__(
        self,
        *,
        train: TaskSource = f"{HUB_ID},answerable,train",
        validation: TaskSource = f"{HUB_ID},answerable,validation",
        corpus: str | Path = "question",
        hops: Sequence[int] | None = None,
        answerable: bool | None = None,
        top_k: int = 3,
        max_k: int = 5,
        snippet_chars: int | None = 300,
        max_turns: int = 8,
        max_calls: int = 4,
        em_reward: float = 0.0,
        support_reward: float = 0.5,
        citation_reward: float = 0.25,
        format_reward: float = 0.1,
        search_cost: float = 0.02,
        invalid_call_cost: float = 0.05,
        offered_tools: Sequence[str] = ("search", "read", "answer"),
        unanswerable_answer: str = "unanswerable",
        without_call: Literal["remind", "end"] = "remind",
        shown_examples: int = 0,
        system_prompt: str | None = None,
    ) -> None:
        """Set up; rows are read when they are first asked for.

        Args:
            train: training tasks: `"bdsaglam/musique,answerable,train[:256]"` (hub id, configuration, split),
                `"file.jsonl[:80]"`, several joined by " + ", a list of such texts, or a list of rows. Files of `musique/` in
                the folder that TURNWISE_DATA names are taken before the hub.
            validation: held-out tasks, likewise.
            corpus: what is searched: `"question"` the paragraphs of the question itself, `"all"` those of all rows of both
                splits, or a JSONL file of paragraphs (or of rows that have some).
            hops: only questions of so many hops, for example `[2, 3]`.
            answerable: only answerable questions, or only unanswerable ones.
            top_k: paragraphs that a search shows when the call does not say how many.
            max_k: most paragraphs that a search shows.
            snippet_chars: characters of each paragraph that a search shows; all when not given.
            max_turns: replies of an episode.
            max_calls: calls of one reply that are run; with many, a reply could read every paragraph.
            em_reward: of an exact match, component `answer_em`. The F1 of the answer is paid whole, component `answer_f1`.
            support_reward: of all supporting paragraphs together, each paid when it is shown first, component `support_found`.
            citation_reward: times the F1 of the cited paragraphs, component `citation`.
            format_reward: times the share of replies whose calls could all be run, at the end, component `format`.
            search_cost: of a search or reading that shows nothing new, in component `useless_call`.
            invalid_call_cost: of a call that cannot be run, likewise. A component of size 0 is left out.
            offered_tools: the tools of the policy; `answer` is one of them. Fewer make a shorter prompt for a small model.
            unanswerable_answer: the right answer to an unanswerable question; the prompt names it where there may be some.
            without_call: whether a reply without calls is reminded of the tools, or ends the episode.
            shown_examples: worked examples before the question, 0 to 3, as conversations with calls and their answers: a warm
                start for models that hardly call tools.
            system_prompt: text in place of ours.

        Raises:
            ValueError: for a value out of range, naming the argument.
        """
        super().__init__()
        _check_ranges({"top_k": top_k, "max_k": max_k, "max_turns": max_turns, "max_calls": max_calls}, at_least=1)
        self.pays = Pays(em_reward, support_reward, citation_reward, format_reward, search_cost, invalid_call_cost)
        _check_ranges({**asdict(self.pays), "snippet_chars": snippet_chars or 0}, at_least=0)
        if top_k > max_k:
            raise ValueError(f"args.top_k = {top_k} must be at most args.max_k = {max_k}")
        if without_call not in ("remind", "end"):
            raise ValueError(f"args.without_call = {without_call!r} must be 'remind' or 'end'")
        self.sources: dict[str, TaskSource] = {"train": train, "validation": validation}
        self.corpus_source = str(corpus)
        self.hops, self.answerable = hops, answerable
        self.top_k, self.max_k, self.snippet_chars = top_k, max_k, snippet_chars
        self.max_turns, self.max_calls = max_turns, max_calls
        self.unanswerable_answer = unanswerable_answer
        self.ends_without_call = without_call == "end"
        sure = answerable is True or all(only_answerable(source) for source in self.sources.values())
        ours = prompts.system_prompt(max_turns, None if sure else unanswerable_answer)
        self.system_prompt = ours if system_prompt is None else system_prompt
        self.tools = _offered(offered_tools)
        self.examples = prompts.worked_examples(shown_examples, offered_tools)
        self._tasks: dict[str, tuple[Task, ...]] = {}
        self._shared: Corpus | None = None
        self._episode = Episode(Question("", ("",), True, (), frozenset()), Corpus(()), unanswerable_answer)

    def tasks(self, split: str) -> Sequence[Task]:
        """The rows of `split`, in the data set's own schema, each with a stable "id".

        Raises:
            ValueError: for an unknown split, a broken file, data that cannot be loaded, or filters that leave nothing.
        """
        if split not in self.sources:
            raise ValueError(
                f"MuSiQue has no split {split!r}.{did_you_mean(split, self.sources)} Known: {', '.join(self.sources)}."
            )
        if split not in self._tasks:
            rows = read_rows(self.sources[split], key=f"args.{split}")
            self._tasks[split] = keep(rows, hops=self.hops, answerable=self.answerable)
            self._corpus_of_all()  # half a minute for the whole data set, which no time limit of a rollout should meet
            if rows and not self._tasks[split]:
                raise ValueError(
                    f"args.hops = {self.hops} and args.answerable = {self.answerable} leave none of the {len(rows)} rows of "
                    f"args.{split}"
                )
        return self._tasks[split]

    def begin(self, task: Task) -> str:
        question = Question.of(task)
        corpus = self._corpus_of_all() or question_corpus(question.paragraphs)
        self._episode = Episode(question, corpus, self.unanswerable_answer)
        return prompts.opening(question.text)

    @tool
    def search(self, query: str, k: int | None = None) -> str:
        """Find paragraphs by the words of a query. Shows the number, the title and the beginning of each.

        Args:
            query: a few words that the paragraph should contain
            k: how many paragraphs to show
        """
        episode = self._episode
        positions = episode.corpus.search(query, min(max(1, k or self.top_k), self.max_k))
        limit = self.snippet_chars
        lengths = {position: len(episode.corpus.paragraphs[position].text) for position in positions}
        before = set(episode.shown)
        self._pay_for(episode.show(positions, whole={p for p, n in lengths.items() if limit is None or n <= limit}))
        return prompts.found(episode.corpus, positions, limit, before)

    @tool
    def read(self, paragraph: int | str) -> str:
        """Show the whole text of a paragraph.

        Args:
            paragraph: its number, or its title
        """
        corpus = self._episode.corpus
        position = _position(corpus, paragraph)
        self._pay_for(self._episode.show([position], whole={position}))
        return prompts.paragraph(corpus, position)

    @tool(name="answer")
    def give_answer(self, text: str, paragraphs: list[int] | None = None) -> str:
        """Give the final answer to the question. This ends the task.

        Args:
            text: the answer, in as few words as possible
            paragraphs: the numbers of the paragraphs that support it
        """
        scores = self._episode.answer(text, paragraphs or [])
        self.earn(answer_f1=scores.f1)
        self._earn_sized("answer_em", self.pays.em_reward, scores.exact)
        if scores.support is not None:
            self._earn_sized("citation", self.pays.citation_reward, scores.support)
        return Done(prompts.verdict(text, self._episode.truths, scores.exact, scores.f1))

    def respond(self, message: AssistantMessage, answers: Sequence[str], *, ended: bool = False) -> Step:
        self._episode.clean_replies += bool(message.tool_calls) and not self.invalid_calls_now
        if ended or any(isinstance(answer, Done) for answer in answers):
            self.earn(**{name: value for name, value in self.closing_components().items() if name not in self.earned})
        return super().respond(message, answers, ended=ended)

    def invalid_call(self, call: ToolCall) -> None:
        self._earn_sized("useless_call", self.pays.invalid_call_cost, -1.0)

    def closing_components(self) -> dict[str, float]:
        share = self._episode.clean_replies / max(1, self.turn)
        sized = {"answer_em": (self.pays.em_reward, 0.0), "format": (self.pays.format_reward, share)}
        return {"answer_f1": 0.0, **{name: size * value for name, (size, value) in sized.items() if size}}

    def episode_metrics(self) -> dict[str, float]:
        return {**self._episode.metrics(), **super().episode_metrics()}

    def _corpus_of_all(self) -> Corpus | None:
        """The corpus that all questions share; None where each has its own."""
        if self._shared is None and self.corpus_source != "question":
            self._shared = shared_corpus(self.corpus_source, self.sources)
        return self._shared

    def _pay_for(self, newly_found: float | None) -> None:
        if newly_found is None:
            self._earn_sized("useless_call", self.pays.search_cost, -1.0)
        elif self._episode.supporting:
            self._earn_sized("support_found", self.pays.support_reward, newly_found)

    def _earn_sized(self, name: str, size: float, value: float) -> None:
        if size:
            self.earn(**{name: size * value})


def _position(corpus: Corpus, paragraph: int | str) -> int:
    text = str(paragraph).strip().strip("[]")
    position = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else None
    if position is None or position >= len(corpus.paragraphs):
        position = corpus.by_title(str(paragraph))
    if position is None:
        hint = did_you_mean(str(paragraph)[:200], corpus.titles) if len(corpus.paragraphs) <= 1000 else ""
        raise ToolError(
            f"there is no paragraph {str(paragraph)[:80]!r}; give a number from 0 to {len(corpus.paragraphs) - 1}, or a "
            f"title.{hint}"
        )
    return position


def _offered(names: Sequence[str]) -> tuple[Tool, ...]:
    known = [tool.name for tool in MuSiQue.tools]
    for name in names:
        if name not in known:
            raise ValueError(f"args.offered_tools names {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    if "answer" not in names:
        raise ValueError(f"args.offered_tools = {list(names)} must hold 'answer': nothing else ends an episode well")
    return tuple(tool for tool in MuSiQue.tools if tool.name in names)


def _check_ranges(values: Mapping[str, float], *, at_least: int) -> None:
    for name, value in values.items():
        if not value >= at_least:
            raise ValueError(f"args.{name} = {value} must be at least {at_least}")
