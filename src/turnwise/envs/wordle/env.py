"""The game."""

from collections.abc import Mapping, Sequence
from typing import Literal

from turnwise.envs.base import Step, Task, TextEnv
from turnwise.envs.suggest import did_you_mean
from turnwise.envs.wordle.parse import Guess, read_guess
from turnwise.envs.wordle.prompts import Board, make_style
from turnwise.envs.wordle.rules import Knowledge, feedback
from turnwise.envs.wordle.scoring import (
    COMPONENTS,
    PROGRESS,
    WORD_BAD,
    WORD_GOOD,
    Tally,
    feedback_reward,
    format_reward,
    win_reward,
)
from turnwise.envs.wordle.words import WordSource, allowed_words, read_words, split_tasks


class Wordle(TextEnv):
    """Find a hidden five-letter word in six guesses, each answered with a mark a letter."""

    component_names = COMPONENTS
    outcome_components = frozenset({"win"})

    def __init__(
        self,
        *,
        answers: WordSource | None = None,
        allowed: WordSource | None = None,
        validation_answers: WordSource | None = None,
        num_train: int | None = None,
        num_validation: int | None = None,
        seed: int = 0,
        max_turns: int = 6,
        style: str = "plain",
        history: Literal["all", "last"] = "all",
        shortlist: int | None = None,
        system_prompt: str | None = None,
        templates: Mapping[str, str] | None = None,
    ) -> None:
        """Set up the game; nothing is drawn before `reset`.

        Args:
            answers: words to be found: path of a text file or a list; ours when not given. `["frost"]` is a single puzzle.
            allowed: words that may be guessed, beside the answers; ours when not given.
            validation_answers: held-out words of your own; then `answers` are the training words.
            num_train: training words; all but the held-out ones when not given.
            num_validation: held-out words; when not given a tenth, at most 100 and what `num_train` leaves.
            seed: of the split.
            max_turns: guesses of a game; an invalid one counts.
            style: name of a set of prompts, see `prompts.STYLES`.
            history: show the masks of all guesses after each guess, or of the last one only.
            shortlist: words among which the answer is, drawn anew for each game from the answer's own split and named in the
                prompt, for small models; the rules stay as they are. Needs a style that shows it, such as "shortlist".
            system_prompt: text in place of the style's; `{length}` and `{max_turns}` are filled in.
            templates: texts in place of single templates of the style, by name.

        Raises:
            ValueError: for word lists, numbers or templates that do not fit, naming the argument.
        """
        super().__init__()
        if max_turns < 1:
            raise ValueError(f"args.max_turns = {max_turns} must be at least 1")
        if history not in ("all", "last"):
            raise ValueError(f"args.history = {history!r} must be 'all' or 'last'")
        self.max_turns = max_turns
        self.show_all = history == "all"
        pool = read_words(answers, key="answers", default="answers.txt")
        self.length = len(pool[0])
        held_out = read_words(validation_answers, key="validation_answers") if validation_answers is not None else None
        self.splits = split_tasks(pool, held_out, num_train, num_validation, seed)
        self.allowed = allowed_words(read_words(allowed, key="allowed", default="allowed.txt"), pool + (held_out or ()))
        self.style = make_style(style, system_prompt=system_prompt, templates=templates)
        self.shortlist_size = self._checked_shortlist(shortlist)
        self.shortlist: tuple[str, ...] = ()
        self.answer_word = ""
        self.played: list[tuple[str, str]] = []  # (guess, mask) of the valid guesses
        self.tally = Tally()
        self.system_prompt = self._board().fill(self.style.system, self.style)

    def tasks(self, split: str) -> Sequence[Task]:
        if split not in self.splits:
            raise ValueError(f"Wordle has no split {split!r}.{did_you_mean(split, self.splits)} Known: {', '.join(self.splits)}.")
        return self.splits[split]

    def begin(self, task: Task) -> str:
        answer = str(task.get("answer", "")).lower()
        if len(answer) != self.length or not (answer.isascii() and answer.isalpha()):
            raise ValueError(f"Wordle task {dict(task)!r}: 'answer' must be a word of {self.length} letters")
        self.answer_word, self.played, self.tally = answer, [], Tally()
        self.shortlist = self._draw_shortlist(answer)
        return self._board().fill(self.style.opening, self.style)

    def step(self, action: str) -> Step:
        self.turn += 1
        guess = read_guess(action, length=self.length, form=self.style.reply)
        components = self._play(guess)
        won, lost = guess.word == self.answer_word, self.turn == self.max_turns
        if won:
            components["win"] = win_reward(self.turn, self.max_turns)
            return self.win(self._board().fill(self.style.won, self.style), components=components)
        observation = self._describe(guess, last=lost)
        return self.end(observation, components=components) if lost else self.answer(observation, components=components)

    def episode_metrics(self) -> dict[str, float]:
        return self.tally.metrics(won=bool(self.played) and self.played[-1][0] == self.answer_word)

    def _checked_shortlist(self, shortlist: int | None) -> int:
        if (shortlist is not None) != self.style.names_shortlist:
            raise ValueError(
                f"args.shortlist = {shortlist} does not fit the style: give both a number of words and templates that show "
                'them by {candidates} or {shortlist}, such as style = "shortlist", or neither'
            )
        fewest = min(len(rows) for rows in self.splits.values() if rows)
        if shortlist is not None and not 2 <= shortlist <= fewest:
            raise ValueError(f"args.shortlist = {shortlist} must be from 2 to {fewest}, the words of the smallest split")
        return shortlist or 0

    def _draw_shortlist(self, answer: str) -> tuple[str, ...]:
        if not self.shortlist_size:
            return ()
        split = next((rows for rows in self.splits.values() if any(row["answer"] == answer for row in rows)), ())
        others = [row["answer"] for row in (split or self.splits["train"]) if row["answer"] != answer]
        drawn = self.np_random.choice(len(others), size=self.shortlist_size - 1, replace=False)
        words = [answer, *(others[int(index)] for index in drawn)]
        return tuple(words[int(index)] for index in self.np_random.permutation(len(words)))

    def _play(self, guess: Guess) -> dict[str, float]:
        """Score a guess and, where it is a word that may be played, put it on the board."""
        known = self._knowledge()
        word = guess.word or ""
        valid = word in self.allowed or word == self.answer_word
        repeated = self.tally.count(guess, known, valid=valid)
        components = dict.fromkeys(sorted(COMPONENTS), 0.0)
        components["format"] = format_reward(guess, self.max_turns)
        components["valid_word"] = (WORD_GOOD if valid else WORD_BAD) / self.max_turns
        if valid:
            components["feedback"] = feedback_reward(word, known, self.max_turns, repeated=repeated)
            self.played.append((word, feedback(word, self.answer_word)))
            components["progress"] = PROGRESS * (self._knowledge().solved_share - known.solved_share)
        return components

    def _describe(self, guess: Guess, *, last: bool) -> str:
        board, style = self._board(), self.style
        lines: list[str] = []
        invalid = not self.played or guess.word != self.played[-1][0]
        if invalid:
            lines.append(board.fill(style.no_guess if guess.word is None else style.unknown_word, style, guess=guess.word or ""))
        shown = self.played if self.show_all else [] if invalid else self.played[-1:]
        lines += [board.fill(style.scored, style, guess=word, mask=mask) for word, mask in shown]
        if self.played and not last:
            lines.append(board.fill(style.summary, style))
        lines.append(board.fill(style.lost if last else style.ask, style))
        return "\n".join(line for line in lines if line)

    def _knowledge(self) -> Knowledge:
        return Knowledge.of(self.played, self.length)

    def _board(self) -> Board:
        return Board(
            self.length, self.turn, self.max_turns, self.answer_word, tuple(self.played), self._knowledge(), self.shortlist
        )
