"""Word lists: ours (from SCOWL, see COPYRIGHT.scowl), a user's file, or words given one by one; and their split."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path

WordSource = str | Path | Sequence[str]
HELD_OUT_SHARE = 10  # one answer in ten is held out when the user says nothing,
MOST_HELD_OUT = 100  # but no more than an evaluation needs


def read_words(source: WordSource | None, *, key: str, default: str | None = None) -> tuple[str, ...]:
    """The words of a list, in its order, without repetitions, in lower case.

    Args:
        source: path of a text file with one word a line (`#` begins a comment), or the words themselves; None takes ours.
        key: argument name for messages.
        default: name of our own list, "answers.txt" or "allowed.txt".

    Raises:
        ValueError: for a missing file, an empty list, or something that is no word, with the file and line number.
    """
    if source is None and default is not None:
        return _packaged(default)
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        try:
            stat = path.stat()
            return _from_file(path, stat.st_mtime_ns, stat.st_size)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"args.{key} = {str(source)!r} cannot be read as a list of words: {error}") from error
    return _checked([(f"args.{key}[{index}]", word) for index, word in enumerate(source or ())], f"args.{key}")


@lru_cache(maxsize=64)
def allowed_words(allowed: tuple[str, ...], answers: tuple[str, ...]) -> frozenset[str]:
    """Every word that may be guessed.

    Raises:
        ValueError: when the two lists have words of different length.
    """
    if len(allowed[0]) != len(answers[0]):
        raise ValueError(
            f"args.answers has words of {len(answers[0])} letters, but args.allowed of {len(allowed[0])}; "
            f"give args.allowed, a list of {len(answers[0])}-letter words"
        )
    return frozenset(allowed) | frozenset(answers)


@lru_cache(maxsize=64)
def split_tasks(
    answers: tuple[str, ...],
    held_out: tuple[str, ...] | None,
    num_train: int | None,
    num_validation: int | None,
    seed: int,
) -> dict[str, tuple[dict[str, str], ...]]:
    """The task rows of "train" and "validation": drawn from `answers`, or with held-out words that the user gave.

    Raises:
        ValueError: when a list has too few words for the numbers, or a held-out word is also an answer to train on.
    """
    if held_out is None:
        train, validation = split_words(answers, num_train, num_validation, seed)
    else:
        if len(held_out[0]) != len(answers[0]):
            raise ValueError(
                f"args.validation_answers has words of {len(held_out[0])} letters, args.answers of {len(answers[0])}"
            )
        train, _ = split_words(answers, num_train, 0, seed)
        _, validation = split_words(held_out, 0, len(held_out) if num_validation is None else num_validation, seed)
        both = sorted(set(train) & set(validation))
        if both:
            raise ValueError(f"args.validation_answers must not be trained on, but args.answers holds {', '.join(both[:5])} too")
    splits = {"train": train, "validation": validation}
    return {split: tuple({"id": f"wordle/{word}", "answer": word} for word in words) for split, words in splits.items()}


def split_words(
    words: tuple[str, ...], num_train: int | None, num_validation: int | None, seed: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Two disjoint lists, (train, validation), drawn from `words`.

    A word's place in the draw depends on the word and the seed alone, so that neither the order of the list nor the size of
    the training part moves it. Without numbers a tenth is held out, at most 100 words; a list of fewer than ten words is its
    own validation list, for the evaluation of single puzzles.

    Raises:
        ValueError: when the list has too few words for the numbers.
    """
    drawn = tuple(sorted(words, key=lambda word: hashlib.sha256(f"{seed}/{word}".encode()).digest()))
    if num_train is None and num_validation is None and len(drawn) < HELD_OUT_SHARE:
        return drawn, drawn
    held_out = num_validation
    if held_out is None:
        held_out = max(0, min(len(drawn) // HELD_OUT_SHARE, MOST_HELD_OUT, len(drawn) - (num_train or 0)))
    end = len(drawn) if num_train is None else held_out + num_train
    if min(held_out, end - held_out) < 0 or end > len(drawn):
        raise ValueError(
            f"num_train = {num_train} and num_validation = {num_validation} cannot be taken from {len(drawn)} words; "
            "lower one of them or give a longer list"
        )
    return drawn[held_out:end], drawn[:held_out]


@lru_cache(maxsize=4)
def _packaged(name: str) -> tuple[str, ...]:
    return tuple(resources.files("turnwise.envs.wordle").joinpath(name).read_text(encoding="ascii").split())


@lru_cache(maxsize=16)
def _from_file(path: Path, _mtime_ns: int, _size: int) -> tuple[str, ...]:
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    words = [(f"{path}:{number}", line.partition("#")[0].strip()) for number, line in lines]
    return _checked([(where, word) for where, word in words if word], str(path))


def _checked(words: list[tuple[str, str]], source: str) -> tuple[str, ...]:
    """Lower-cased and without repetitions. Each word comes with the place that a message names."""
    if not words:
        raise ValueError(f"{source} holds no word; give at least one")
    for where, word in words:
        if not (word.isascii() and word.isalpha()):
            raise ValueError(f"{where}: {word!r} is not a word of the letters a to z")
        if len(word) != len(words[0][1]):
            raise ValueError(
                f"{where}: {word!r} has {len(word)} letters, but {words[0][1]!r} of the same list has {len(words[0][1])}"
            )
    return tuple(dict.fromkeys(word.lower() for _, word in words))
