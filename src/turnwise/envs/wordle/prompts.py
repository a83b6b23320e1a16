"""Every sentence that the policy reads, in one place, to be tuned by experiment.

No template holds a word that could be guessed, neither as an example nor by accident ("guess", "reply", "right", "again"
are words too): a small policy soon answers nothing else.

Placeholders: `{length}`, `{turn}` (the guess now asked for), `{max_turns}`, `{left}` (guesses left), `{guess}`, `{GUESS}`,
`{mask}`, `{pattern}` (known letters, `_` elsewhere), `{present}` (letters that occur, their places unknown), `{absent}`
(letters that do not occur), `{tried}` (guesses played), `{answer}` (for `won` and `lost`). `{guess_spaced}`,
`{GUESS_spaced}`, `{mask_spaced}` and `{pattern_spaced}` have spaces between their characters. `{shortlist}` names the words
of the shortlist, `{candidates}` those of them that the marks so far have not ruled out. An empty list reads `none`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from turnwise.envs.suggest import did_you_mean
from turnwise.envs.wordle.parse import ReplyForm
from turnwise.envs.wordle.rules import GREEN, GREY, YELLOW, Knowledge, fits

RULES = (
    "You play Wordle: find a hidden English word of {length} letters in {max_turns} attempts. "
    "Each word is answered with one sign a letter: G = the letter is at its spot, "
    "Y = the letter is in the word but at another spot, - = the letter is not in the word. "
)


@dataclass(frozen=True)
class PromptStyle:
    """The templates of one style."""

    system: str = RULES + "Answer with one {length}-letter word and nothing else."
    """The system prompt."""

    opening: str = "Try {turn} of {max_turns}."
    """The first observation."""

    scored: str = "{guess} -> {mask}"
    """One line for each guess that was played."""

    unknown_word: str = "{guess} is not a {length}-letter word that I know."
    """Line about a guess that is not in the list of allowed words."""

    no_guess: str = "Your answer has no {length}-letter word."
    """Line about a reply without a guess."""

    summary: str = "Known: {pattern} Elsewhere: {present} Not in it: {absent}"
    """What the guesses so far have proven; left out before the first mask."""

    ask: str = "Try {turn} of {max_turns}."
    """Last line of an observation after which a guess is due."""

    won: str = "Correct: {answer}."
    """The observation after the right guess."""

    lost: str = "The word was {answer}."
    """Last line after the last guess."""

    marks: str = GREEN + YELLOW + GREY
    """Characters of the mask: right place, other place, not in the word."""

    reply: ReplyForm = "word"
    """The form of reply that the system prompt asks for and the component `format` rewards: `word` or `tag`."""

    @property
    def names_shortlist(self) -> bool:
        """Whether the policy is shown a shortlist."""
        return any(name in text for text in (self.opening, self.ask) for name in ("{shortlist}", "{candidates}"))


STYLES: dict[str, PromptStyle] = {
    "plain": PromptStyle(),
    "spaced": PromptStyle(
        scored="{guess}: {guess_spaced} -> {mask_spaced}",
        summary="Known: {pattern_spaced} Elsewhere: {present} Not in it: {absent}",
    ),
    "capitals": PromptStyle(scored="{GUESS} -> {mask}"),
    "shortlist": PromptStyle(
        system="You play Wordle. Answer with one {length}-letter word and nothing else.",
        opening="Find the hidden word. It is one of: {candidates}.",
        scored="{guess}: {mask}",
        summary="",
        ask="It is one of: {candidates}.",
    ),
    "tagged": PromptStyle(
        system=RULES + "Reason step by step, then finish with your word between <guess> and </guess>.", reply="tag"
    ),
}


def make_style(name: str, *, system_prompt: str | None, templates: Mapping[str, str] | None) -> PromptStyle:
    """The style `name`, with its system prompt or any of its templates replaced.

    Raises:
        ValueError: for an unknown style, template or placeholder, or marks that are not three different characters.
    """
    if name not in STYLES:
        raise ValueError(f"args.style = {name!r} is unknown.{did_you_mean(name, STYLES)} Known: {', '.join(STYLES)}.")
    changes = dict(templates or {})
    if system_prompt is not None:
        changes["system"] = system_prompt
    known = [field.name for field in fields(PromptStyle)]
    for key, text in changes.items():
        if key not in known:
            raise ValueError(f"args.templates.{key} is unknown.{did_you_mean(key, known)} Known: {', '.join(known)}.")
        if key not in ("marks", "reply"):
            _check_template("args.system_prompt" if key == "system" else f"args.templates.{key}", text)
    style = replace(STYLES[name], **changes)
    if len(set(style.marks)) != 3 or len(style.marks) != 3:
        raise ValueError(f"args.templates.marks = {style.marks!r} must be three different characters")
    if style.reply not in ("word", "tag"):
        raise ValueError(f"args.templates.reply = {style.reply!r} must be 'word' or 'tag'")
    return style


@dataclass(frozen=True)
class Board:
    """What there is to be shown at one moment of a game."""

    length: int
    turn: int  # replies so far
    max_turns: int
    answer: str
    history: tuple[tuple[str, str], ...]  # (guess, mask) of the guesses played
    knowledge: Knowledge
    shortlist: tuple[str, ...] = ()

    @property
    def candidates(self) -> list[str]:
        """Words of the shortlist that can still be the answer."""
        return [word for word in self.shortlist if fits(word, self.history)]

    def fill(self, template: str, style: PromptStyle, *, guess: str = "", mask: str = "") -> str:
        """The template with its placeholders filled in."""
        shown = mask.translate(str.maketrans(GREEN + YELLOW + GREY, style.marks))
        pattern = "".join(letter or "_" for letter in self.knowledge.pattern)
        words = {"guess": guess, "GUESS": guess.upper(), "mask": shown, "pattern": pattern}
        unplaced = self.knowledge.unplaced
        return template.format(
            **words,
            **{f"{key}_spaced": " ".join(text) for key, text in words.items()},
            present=" ".join(sorted(letter for letter, count in unplaced.items() for _ in range(count))) or "none",
            absent=" ".join(sorted(self.knowledge.dead)) or "none",
            tried=" ".join(word for word, _ in self.history) or "none",
            shortlist=", ".join(self.shortlist) or "none",
            candidates=", ".join(self.candidates) or "none",
            length=self.length,
            turn=self.turn + 1,
            max_turns=self.max_turns,
            left=self.max_turns - self.turn,
            answer=self.answer,
        )


EMPTY_BOARD = Board(5, 0, 6, "", (), Knowledge.of((), 5))


def _check_template(key: str, text: object) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{key} = {text!r} must be a text")
    try:
        EMPTY_BOARD.fill(text, PromptStyle())
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{key} = {text!r} cannot be filled in ({type(error).__name__}: {error}); "
            "known placeholders are listed in turnwise.envs.wordle.prompts, and a plain brace is written {{ or }}"
        ) from error
