"""The rules of Wordle: the feedback of a guess, and what the guesses so far have proven."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

GREEN, YELLOW, GREY = "G", "Y", "-"


def feedback(guess: str, answer: str) -> str:
    """The mask of a guess, one of `G`, `Y`, `-` a letter.

    Greens come first; then yellows from left to right, each letter at most as often as the answer has it beyond its greens.

    Raises:
        ValueError: when the words differ in length.
    """
    pairs = list(zip(guess, answer, strict=True))
    unmatched = Counter(wanted for letter, wanted in pairs if letter != wanted)
    mask: list[str] = []
    for letter, wanted in pairs:
        if letter == wanted:
            mask.append(GREEN)
        elif unmatched[letter] > 0:
            unmatched[letter] -= 1
            mask.append(YELLOW)
        else:
            mask.append(GREY)
    return "".join(mask)


def fits(word: str, history: Iterable[tuple[str, str]]) -> bool:
    """Whether `word` can still be the answer after these (guess, mask) pairs."""
    return all(feedback(guess, word) == mask for guess, mask in history)


@dataclass(frozen=True)
class Knowledge:
    """What a list of guesses with their masks proves about the answer."""

    pattern: tuple[str | None, ...]  # the letter of each position, where it is known
    counts: dict[str, int]  # how often a letter occurs at least; only letters that occur
    refuted: frozenset[tuple[int, str]]  # positions where a letter that occurs was yellow or grey
    dead: frozenset[str]  # letters that do not occur

    @classmethod
    def of(cls, history: Iterable[tuple[str, str]], length: int) -> "Knowledge":
        """Gather it from (guess, mask) pairs of `length` letters."""
        pattern: list[str | None] = [None] * length
        counts: Counter[str] = Counter()
        missed: set[tuple[int, str]] = set()
        for guess, mask in history:
            counts |= Counter(letter for letter, mark in zip(guess, mask, strict=True) if mark != GREY)
            for position, (letter, mark) in enumerate(zip(guess, mask, strict=True)):
                if mark == GREEN:
                    pattern[position] = letter
                else:
                    missed.add((position, letter))
        counts |= Counter(letter for letter in pattern if letter is not None)
        dead = frozenset(letter for _, letter in missed if letter not in counts)
        return cls(tuple(pattern), dict(counts), frozenset(pair for pair in missed if pair[1] in counts), dead)

    @property
    def unplaced(self) -> dict[str, int]:
        """Letters that occur, as often as their places are not known."""
        placed = Counter(letter for letter in self.pattern if letter is not None)
        return {letter: count - placed[letter] for letter, count in self.counts.items() if count > placed[letter]}

    @property
    def has_hits(self) -> bool:
        """Whether any green or yellow is known."""
        return bool(self.counts)

    @property
    def solved_share(self) -> float:
        """0 when nothing is known, 1 when every place is: a letter in place counts fully, a letter out of place half."""
        greens = sum(letter is not None for letter in self.pattern)
        return (greens + 0.5 * sum(self.unplaced.values())) / len(self.pattern)

    def honoured_share(self, guess: str) -> float:
        """Share of the known greens and yellows that `guess` honours; 1 when none is known.

        A green is honoured by the letter at its place; a yellow by the letter elsewhere than where it is refuted.
        """
        greens = [guess[position] == letter for position, letter in enumerate(self.pattern) if letter is not None]
        free = Counter(
            letter
            for position, letter in enumerate(guess)
            if self.pattern[position] is None and (position, letter) not in self.refuted
        )
        yellows = sum(min(free[letter], count) for letter, count in self.unplaced.items())
        clues = len(greens) + sum(self.unplaced.values())
        return (sum(greens) + yellows) / clues if clues else 1.0

    def dead_letters(self, guess: str) -> int:
        """How many letters of `guess` are known not to occur."""
        return sum(letter in self.dead for letter in guess)
