"""A sample as a person reads it: what trains in brackets, the rest shortened."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from tokenizers import Tokenizer

from turnwise.transport import Sample

OPEN, CLOSE = "⟦", "⟧"  # around what trains; rare enough in text not to be taken for it
CUT = "…"
KEPT = {True: 240, False: 160}  # characters shown of one run of tokens that train, and of one that does not
LINES = 24
NEWLINE = "↵"


def excerpt(sample: Sample, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Lines of text; each run of tokens that train stands in ⟦ ⟧ on every line that it covers."""
    lines = [""]
    for trains, ids in _runs(sample.token_ids, sample.loss_mask):
        text = _shortened(tokenizer.decode(ids, skip_special_tokens=False), KEPT[trains])
        parts = text.split("\n")
        for index, part in enumerate(parts):
            shown = part + (NEWLINE if index < len(parts) - 1 and trains else "")
            lines[-1] += f"{OPEN}{shown}{CLOSE}" if trains and shown else shown
            if index < len(parts) - 1:
                lines.append("")
    kept = [line for line in lines if line.strip()]
    return tuple(kept if len(kept) <= LINES else [*kept[: LINES // 2], CUT, *kept[-LINES // 2 :]])


def _runs(ids: Sequence[int], mask: Sequence[bool]) -> Iterator[tuple[bool, list[int]]]:
    for trains, run in groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        yield trains, [token for token, _ in run]


def _shortened(text: str, most: int) -> str:
    """The end of a text says more than its middle: it is where a reply begins or stops."""
    return text if len(text) <= most else f"{text[: most // 3]} {CUT} {text[-2 * most // 3 :]}"
