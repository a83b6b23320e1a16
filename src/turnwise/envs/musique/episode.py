"""What has happened in an episode: which paragraphs were shown, what was answered, and what that is worth."""

from dataclasses import dataclass, field

from turnwise.envs.musique.data import Question
from turnwise.envs.musique.retrieval import Corpus
from turnwise.envs.musique.scoring import exact_match, support_f1, token_f1


@dataclass(frozen=True)
class Scores:
    """Of an answer; `support` is None where the question has no answer to support."""

    exact: float
    f1: float
    support: float | None


@dataclass
class Episode:
    """One question being worked on."""

    question: Question
    corpus: Corpus
    unanswerable_answer: str
    supporting: frozenset[int] = field(init=False)  # positions in the corpus; below 0 where it lacks the paragraph
    shown: set[int] = field(default_factory=set[int])  # in part or whole
    whole: set[int] = field(default_factory=set[int])  # to their end
    useless_calls: int = 0
    clean_replies: int = 0  # whose calls could all be run
    scores: Scores | None = None

    def __post_init__(self) -> None:
        places = [self.corpus.position(self.question.paragraphs[position]) for position in sorted(self.question.supporting)]
        self.supporting = frozenset(-1 - number if place is None else place for number, place in enumerate(places))

    @property
    def truths(self) -> tuple[str, ...]:
        return self.question.truths if self.question.answerable else (self.unanswerable_answer,)

    def show(self, positions: list[int], *, whole: set[int]) -> float | None:
        """Note that paragraphs are shown, those of `whole` to their end.

        Returns:
            The share of the supporting paragraphs that is shown for the first time; None where nothing at all is new.
        """
        new = [position for position in positions if position not in self.shown]
        if not new and whole <= self.whole:
            self.useless_calls += 1
            return None
        self.shown.update(new)
        self.whole |= whole
        return len(self.supporting.intersection(new)) / max(1, len(self.supporting))

    def answer(self, text: str, cited: list[int]) -> Scores:
        """Score the final answer, as the data set's evaluation does; to an unanswerable question by whether it says so."""
        question = self.question
        exact = exact_match(text, self.truths)
        f1 = token_f1(text, self.truths) if question.answerable else exact  # no credit for a word in common with "no answer"
        support = support_f1(cited, self.supporting) if question.answerable else None
        self.scores = Scores(exact, f1, support)
        return self.scores

    def metrics(self) -> dict[str, float]:
        scores = self.scores or Scores(0.0, 0.0, 0.0 if self.question.answerable else None)
        metrics = {"acc": scores.exact, "f1": scores.f1, "answered": float(self.scores is not None)}
        if scores.support is not None:
            metrics["support_f1"] = scores.support
        if self.supporting:
            metrics["supporting_found"] = len(self.supporting & self.shown) / len(self.supporting)
        return {**metrics, "useless_calls": float(self.useless_calls)}
