"""Which samples of a batch are measured: few, of both signs."""

from collections.abc import Iterable, Iterator, Sequence

import msgspec

from turnwise.transport import Batch, Sample

MOST_SAMPLES = 24
TOKENS = {
    "cpu": 3072,
    "cuda": 49152,
}  # inputs, the latter a GPU: seconds for the 135M model on two cores, for an 8B one on an H200


def part_of(batch: Batch, samples: Sequence[Sample]) -> Batch:
    """The batch with these samples alone."""
    ids = list(dict.fromkeys(sample.rollout_id for sample in samples))
    return msgspec.structs.replace(batch, samples=list(samples), rollout_ids=ids, num_rollouts=len(ids))


def choose_samples(samples: Sequence[Sample], *, tokens: int, most: int = MOST_SAMPLES) -> list[Sample]:
    """Samples with an advantage, alternately above and below 0, within `tokens` inputs; at least one of each sign there is.

    Raises:
        ValueError: no sample has an advantage that is not 0.
    """
    signs = [(sample, sum(sample.advantages)) for sample in samples if any(sample.advantages)]
    if not signs:
        raise ValueError("no sample of the batch has an advantage that is not 0")
    above = [sample for sample, total in signs if total > 0]
    below = [sample for sample, total in signs if total <= 0]
    chosen = [min(side, key=_length) for side in (above, below) if side]
    room = tokens - sum(map(_length, chosen))
    for sample in _alternately(above, below):
        if len(chosen) == most:
            break
        if _length(sample) <= room and not any(sample is other for other in chosen):
            chosen.append(sample)
            room -= _length(sample)
    order = {id(sample): place for place, sample in enumerate(samples)}
    return sorted(chosen, key=lambda sample: order[id(sample)])


def _alternately(first: Iterable[Sample], second: Iterable[Sample]) -> Iterator[Sample]:
    queues = [iter(first), iter(second)]
    while queues:
        for queue in list(queues):
            sample = next(queue, None)
            if sample is None:
                queues.remove(queue)
            else:
                yield sample


def _length(sample: Sample) -> int:
    return len(sample.token_ids)
