"""Which numbers of rows give a row the same bits whatever stands beside it, found out by computing.

A matrix product may sum in another order when its shape changes, and a row may be summed in another order at another place.
oneDNN and MKL do neither on the machines that were tried, from 2 rows on (1 row takes another kernel); other machines may
differ, so the deterministic mode measures it at its start, on the layers of the model that it serves.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from turnwise.inference.embedded.lean import LeanModel
from turnwise.inference.embedded.lora import LoraMix

COUNTS = (4, 8, 16, 32, 64)
FALLBACK_COUNT = 16


def invariant_row_counts(model: LeanModel, mix: Callable[[int], LoraMix | None]) -> tuple[int, ...]:
    """The ascending row counts among which decoding may choose.

    All of `COUNTS` if a row's result is the same at every place of every count, else one count at which the place does not
    matter, else 1: each row by itself.
    """
    probe = copy.copy(model)
    probe.layers = model.layers[:1]  # all layers have the same shapes
    results = {count: _results(probe, count, mix(count)) for count in COUNTS}
    reference = results[FALLBACK_COUNT][0]
    if all(torch.equal(reference, result) for row in results.values() for result in row):
        return COUNTS
    if all(torch.equal(reference, result) for result in results[FALLBACK_COUNT]):
        return (FALLBACK_COUNT,)
    return (1,)


def _results(model: LeanModel, count: int, lora: LoraMix | None) -> list[Tensor]:
    """Logits of one token at several places among `count` rows with other tokens."""
    generator = torch.Generator().manual_seed(count)
    results: list[Tensor] = []
    for place in sorted({0, 1, count // 2, count - 1}):
        ids = torch.randint(model.vocabulary, (count,), generator=generator)
        ids[place] = model.vocabulary // 2
        positions = torch.randint(model.max_length, (count,), generator=generator)
        positions[place] = model.max_length // 2
        hidden = model.hidden(ids, positions, lambda _, heads: heads[:, : model.heads].flatten(1), lora)
        results.append(model.logits(hidden)[place])
    return results
