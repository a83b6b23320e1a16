"""Derive Wordle's two word lists from Debian's `scowl` package and ENABLE.

    apt-get download scowl && dpkg -x scowl_*.deb scowl
    python scripts/make_word_lists.py --scowl scowl/usr/share/dict/scowl --enable enable1.txt

`answers.txt`: common words (SCOWL sizes up to 35, English and American) that ENABLE has too, less regular plurals and third
persons in -s and past forms in -ed, whose stems are words of ENABLE. `allowed.txt`: SCOWL sizes up to 80, English, American,
British and the first class of variants, and every word of ENABLE. ENABLE is in the public domain; SCOWL's notice,
`/usr/share/doc/scowl/copyright`, must travel with the lists. A few words that nobody should be asked to find are no answers
(`NOT_ANSWERS`); they may still be guessed, and nothing else is screened.
"""

import argparse
import re
import sys
from collections.abc import Collection
from pathlib import Path

LENGTH = 5
COMMON = ("english-words", "american-words")
WIDE = (*COMMON, "british-words", "variant_1-words")
COMMON_SIZE, WIDE_SIZE = 35, 80
NOT_ANSWERS = frozenset(
    ("bitch", "horny", "kinky", "penis", "prick", "pussy", "queer", "semen", "sperm", "spunk", "whore"),
)
LISTS = Path(__file__).resolve().parents[1] / "src" / "turnwise" / "envs" / "wordle"


def scowl_words(folder: Path, categories: Collection[str], size: int) -> set[str]:
    """Five-letter words of the categories, up to a size. The files are named `category.size`, in Latin-1.

    Raises:
        FileNotFoundError: when the folder has none of the files.
    """
    found = [path for path in folder.glob("*.*") if path.stem in categories and int(path.suffix[1:]) <= size]
    if not found:
        raise FileNotFoundError(f"{folder} holds no file such as {COMMON[0]}.{COMMON_SIZE}; unpack Debian's scowl package there")
    words = {word for path in found for word in path.read_text(encoding="latin-1").split()}
    return {word for word in words if re.fullmatch(f"[a-z]{{{LENGTH}}}", word)}


def is_regular_form(word: str, stems: Collection[str]) -> bool:
    """Whether a word is another word with -s, -ed or -d. Endings -ss, -us and -is are no plurals."""
    if word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1] in stems
    return word.endswith("ed") and (word[:-2] in stems or word[:-1] in stems)


def derive(scowl: Path, enable: Collection[str]) -> tuple[list[str], list[str]]:
    """The answers and the allowed words, sorted."""
    common = scowl_words(scowl, COMMON, COMMON_SIZE).intersection(enable) - NOT_ANSWERS
    allowed = scowl_words(scowl, WIDE, WIDE_SIZE).union(word for word in enable if len(word) == LENGTH)
    return sorted(word for word in common if not is_regular_form(word, enable)), sorted(allowed)


def main(argv: list[str] | None = None) -> int:
    """Write the lists, or with --check compare them; returns 1 when they differ."""
    parser = argparse.ArgumentParser(description="Derive Wordle's word lists from SCOWL and ENABLE.")
    parser.add_argument("--scowl", type=Path, required=True, help="folder of the package's word files")
    parser.add_argument("--enable", type=Path, required=True, help="enable1.txt, one word a line")
    parser.add_argument("--out", type=Path, default=LISTS, help="folder of answers.txt and allowed.txt")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the files differ")
    args = parser.parse_args(argv)
    answers, allowed = derive(args.scowl, set(args.enable.read_text(encoding="ascii").split()))
    differing = 0
    for name, words in (("answers.txt", answers), ("allowed.txt", allowed)):
        path, text = args.out / name, "\n".join(words) + "\n"
        same = path.is_file() and path.read_text(encoding="ascii") == text
        differing += not same
        if not args.check:
            path.write_text(text, encoding="ascii")
        print(f"{path}: {len(words)} words, {'as before' if same else 'different' if args.check else 'written'}")
    return 1 if args.check and differing else 0


if __name__ == "__main__":
    sys.exit(main())
