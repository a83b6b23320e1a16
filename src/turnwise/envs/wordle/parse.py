"""Reading a guess out of a reply: strictly, in the form that was asked for, or tolerantly, whatever form it has.

A strict reply of form `word` is one word of the right length and nothing else but white space; of form `tag` it ends with
`<guess>word</guess>`, the only tag in it, and may say anything before.

Tolerant reading takes the first of these rules that finds a word, so that a reply always means the same:

1. the last `<guess>` tag (its end tag may be missing): the rules below applied to what it holds; nothing found there is no guess;
2. a reply of a single word of at most 20 letters is that word, also when its length is wrong;
3. the last marked word: `**word**`, `*word*`, `__word__`, "word", 'word' or in back quotes;
4. the last word in capitals, unless all of the reply is in capitals;
5. the last word that follows "guess", "answer" or "word", with "is" or "would be" and punctuation between them or not;
6. the last word spelled out: five single letters with spaces, commas or hyphens between them;
7. the last word of the right length, "guess" only if there is no other.

From rule 3 on only words of the right length count. A word is a run of ASCII letters with no letter, digit or `_` beside it.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

ReplyForm = Literal["word", "tag"]

TAG = re.compile(r"<guess>(.*?)(?:</guess>|(?=<guess>)|\Z)", re.IGNORECASE | re.DOTALL)
MAX_READ = 4000  # characters from the end of a reply that are read: the guess stands there, and babble has no bound
LONGEST_WORD = 20  # letters; a longer run is babble, not to be repeated in an observation


@dataclass(frozen=True)
class Guess:
    """What was read."""

    word: str | None  # lower case; None when the reply holds no guess
    strict: bool  # the reply has the form that was asked for
    nearness: float = 1.0  # 0..1, how near it comes: the word's share of the reply, or for form `tag` whether there is a tag


def read_guess(reply: str, *, length: int, form: ReplyForm) -> Guess:
    """Read the guess in a reply.

    Args:
        reply: the whole reply; only its last 4,000 characters are read tolerantly.
        length: letters of a word.
        form: what was asked for.
    """
    strict = _strict_patterns(length)[form].fullmatch(reply)
    if strict is not None:
        return Guess(strict["word"].lower(), strict=True)
    tags = TAG.findall(reply[-MAX_READ:])
    word = _untagged(tags[-1] if tags else reply[-MAX_READ:], length)
    if word is None:
        return Guess(None, strict=False, nearness=0.0)
    nearness = len(word) / len(reply.strip()) if form == "word" else float(bool(tags))
    return Guess(word.lower(), strict=False, nearness=nearness)


@cache
def _strict_patterns(length: int) -> dict[ReplyForm, re.Pattern[str]]:
    word = rf"\s*(?P<word>[A-Za-z]{{{length}}})\s*"
    return {"word": re.compile(word), "tag": re.compile(rf"[^<]*(?:<(?!/?guess>)[^<]*)*<guess>{word}</guess>\s*")}


@cache
def _tolerant_patterns(length: int) -> tuple[re.Pattern[str], ...]:
    word = rf"(?P<word>[A-Za-z]{{{length}}})"
    whole = rf"(?<!\w){word}(?!\w)"
    return (
        re.compile(rf"(?P<mark>\*\*|\*|__|[\"'`]){word}(?P=mark)|[“‘](?P<quoted>[A-Za-z]{{{length}}})[”’]"),
        re.compile(rf"(?<!\w)(?P<word>[A-Z]{{{length}}})(?!\w)"),
        re.compile(rf"(?i:(?<!\w)(?:guess|answer|word)\W{{1,4}}(?:(?:is|would be)\W{{1,4}})?){whole}"),
        re.compile(rf"(?<!\w)(?P<spelled>[A-Za-z](?:[\s,-]{{1,2}}[A-Za-z]){{{length - 1}}})(?!\w)"),
        re.compile(whole),
    )


def _untagged(text: str, length: int) -> str | None:
    words = [word.strip("_") for word in re.findall(r"\w+", text)]
    if len(words) == 1 and len(words[0]) <= LONGEST_WORD and words[0].isascii() and words[0].isalpha():
        return words[0]
    marked, capitals, announced, spelled, plain = _tolerant_patterns(length)
    rules = [marked] if text.upper() == text else [marked, capitals]
    for rule in [*rules, announced, spelled]:
        found = list(rule.finditer(text))
        if found:
            return _letters(found[-1])
    candidates = [match["word"] for match in plain.finditer(text)]
    other = [word for word in candidates if word.lower() != "guess"]
    return (other or candidates or [None])[-1]


def _letters(match: re.Match[str]) -> str:
    groups = match.groupdict()
    text = groups.get("word") or groups.get("quoted") or groups["spelled"]
    return "".join(letter for letter in text if letter.isalpha())
