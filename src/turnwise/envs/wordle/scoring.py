"""What a guess earns, and the metrics of a game.

Over an episode of T turns the components lie within

    format      -0.6 .. +0.2    the form that was asked for +0.2/T; another form -0.3/T .. +0.1/T, the nearer the
                                better; no guess at all -0.6/T
    valid_word  -0.4 .. +0.2    a word of the list +0.2/T, anything else -0.4/T
    feedback    -0.5 .. +0.5    of valid guesses from the second on, up to +-0.5/T; of a repeated one -0.5/T
    progress     0   .. +0.4    what a guess newly reveals; 0.4 in all once the word is found
    win          0   .. +2.4    from 2.4 in one turn down to 1.0 in T turns

so that a game earns between -1 and +3, and always more the sooner it is won: a further turn can earn at most 0.9/T more,
and costs 1.4/(T-1).
"""

from dataclasses import dataclass, field

from turnwise.envs.wordle.parse import Guess
from turnwise.envs.wordle.rules import Knowledge

FORMAT_GOOD, FORMAT_NEAR, FORMAT_FAR, FORMAT_MISSING = 0.2, 0.1, -0.3, -0.6
WORD_GOOD, WORD_BAD = 0.2, -0.4
FEEDBACK = 0.5
PROGRESS = 0.4
WIN_FIRST, WIN_LAST = 2.4, 1.0
DEAD_LETTERS_WORST = 2  # with that many dead letters a guess is as bad as it gets

COMPONENTS = frozenset({"format", "valid_word", "feedback", "progress", "win"})


def format_reward(guess: Guess, max_turns: int) -> float:
    """Component `format` of one guess.

    Graded, because an untrained small model hardly ever gives the form that was asked for: chatter that happens to hold a
    word must not look as good as an attempt.
    """
    if guess.word is None:
        return FORMAT_MISSING / max_turns
    if guess.strict:
        return FORMAT_GOOD / max_turns
    return (FORMAT_FAR + (FORMAT_NEAR - FORMAT_FAR) * guess.nearness) / max_turns


def feedback_reward(word: str, knowledge: Knowledge, max_turns: int, *, repeated: bool) -> float:
    """Component `feedback` of a guess, given what was known before it.

    The mean of the share of greens and yellows honoured and of the avoidance of dead letters, as far as either is known,
    mapped from 0..1 to -1..+1; 0 when nothing is known. A repetition ignores all feedback, whatever it honours.
    """
    if repeated:
        return -FEEDBACK / max_turns
    scores: list[float] = []
    if knowledge.has_hits:
        scores.append(knowledge.honoured_share(word))
    if knowledge.dead:
        scores.append(1.0 - min(knowledge.dead_letters(word), DEAD_LETTERS_WORST) / DEAD_LETTERS_WORST)
    return FEEDBACK / max_turns * (2.0 * sum(scores) / len(scores) - 1.0) if scores else 0.0


def win_reward(turn: int, max_turns: int) -> float:
    """Component `win` of finding the word in `turn` of `max_turns` turns."""
    if max_turns == 1:
        return WIN_LAST
    return WIN_LAST + (WIN_FIRST - WIN_LAST) * (max_turns - turn) / (max_turns - 1)


@dataclass
class Tally:
    """Counts of one game, and the metrics made of them."""

    turns: int = 0
    strict: int = 0
    invalid: int = 0
    guesses: int = 0  # replies that held a word, known or not
    with_hits: int = 0  # guesses made when a green or yellow was known,
    used_hits: int = 0  # and those among them that honoured all of them and were valid and new
    with_dead: int = 0  # guesses made when a dead letter was known,
    reused_dead: int = 0  # and those among them that held one
    words: set[str] = field(default_factory=set[str])

    def count(self, guess: Guess, knowledge: Knowledge, *, valid: bool) -> bool:
        """Count one guess, given what was known before it; returns whether its word was guessed before."""
        word = guess.word
        repeated = word is not None and word in self.words
        self.turns += 1
        self.strict += guess.strict
        self.invalid += not valid
        self.guesses += word is not None
        if knowledge.has_hits:
            self.with_hits += 1
            self.used_hits += word is not None and valid and not repeated and knowledge.honoured_share(word) == 1.0
        if knowledge.dead:
            self.with_dead += 1
            self.reused_dead += word is not None and knowledge.dead_letters(word) > 0
        if word is not None:
            self.words.add(word)
        return repeated

    def metrics(self, *, won: bool) -> dict[str, float]:
        """Rates over the guesses so far; those over no guess at all, and `guesses_to_win` of a game not won, are left out."""
        rates = {
            "valid_format_rate": (self.strict, self.turns),
            "invalid_word_rate": (self.invalid, self.turns),
            "feedback_usage_rate": (self.used_hits, self.with_hits),
            "dead_letter_reuse_rate": (self.reused_dead, self.with_dead),
            "distinct_guess_rate": (len(self.words), self.guesses),
        }
        metrics = {name: count / total for name, (count, total) in rates.items() if total}
        metrics["win_rate"] = float(won)
        if won:
            metrics["guesses_to_win"] = float(self.turns)
        return metrics
