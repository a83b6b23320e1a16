"""From samples to packed micro-batches, balanced over ranks.

Samples lie end to end in one sequence without padding. Only what the loss needs is there: a sample ends before its last sampled
token (whose successor nobody asks for), and a prompt that several samples of a micro-batch begin with is there once.

Ranks wait for each other in every micro-batch, since parameters are gathered layer by layer. So two things are balanced: all
micro-batches have about the same number of tokens, and those that run at the same time are of like cost.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from turnwise.trainer.attention import NO_PARENT, Layout
from turnwise.trainer.loss import StepTotals
from turnwise.trainer.micro_batch import MicroBatch, Packer, Piece
from turnwise.transport import Sample

MIN_SHARED_PROMPT = 16  # tokens; below, one more attention call a layer costs more than the prompt
MAX_REACH = 4  # budgets: what samples of a micro-batch have in tokens without sharing, since attention holds keys for each


@dataclass
class Bin:
    """What one micro-batch will hold."""

    share: bool
    pieces: list[Piece] = field(default_factory=list)
    prompts: Counter[int] = field(default_factory=Counter)
    tokens: int = 0
    reach: int = 0  # tokens without sharing

    def cost(self, piece: Piece) -> int:
        """Tokens that it would add."""
        return len(piece.own) + (0 if self._shares(piece, 1) else len(piece.prompt))

    def add(self, piece: Piece) -> None:
        """Put it in."""
        self.tokens += self.cost(piece)
        self.reach += piece.length
        self.prompts[piece.prompt_id] += 1
        self.pieces.append(piece)

    def gain(self, piece: Piece) -> int:
        """Tokens that would go with it."""
        return len(piece.own) + (0 if self._shares(piece, 2) else len(piece.prompt))

    def remove(self, piece: Piece) -> None:
        """Take it out."""
        self.tokens -= self.gain(piece)
        self.reach -= piece.length
        self.prompts[piece.prompt_id] -= 1
        self.pieces.remove(piece)

    def has_room(self, piece: Piece, max_tokens: int) -> bool:
        """Whether it may be added within the budget."""
        return self.tokens + self.cost(piece) <= max_tokens and self.reach + piece.length <= MAX_REACH * max_tokens

    def fits(self, max_tokens: int) -> bool:
        """Whether it is within the budget, or cannot be divided."""
        return len(self.pieces) <= 1 or (self.tokens <= max_tokens and self.reach <= MAX_REACH * max_tokens)

    def layout(self) -> Layout:
        """Its segments: the first sample with a shared prompt comes behind that prompt. A single token when it is empty."""
        lengths: list[int] = []
        parents: list[int] = []
        prompts: dict[int, int] = {}
        for piece in self.pieces:
            parent = NO_PARENT
            if self._shares(piece, 2):
                if piece.prompt_id not in prompts:
                    prompts[piece.prompt_id] = len(lengths)
                    lengths.append(len(piece.prompt))
                    parents.append(NO_PARENT)
                parent = prompts[piece.prompt_id]
            lengths.append(piece.length if parent == NO_PARENT else len(piece.own))
            parents.append(parent)
        return Layout(tuple(lengths or [1]), tuple(parents or [NO_PARENT]))

    def micro_batch(self) -> MicroBatch:
        """Its tensors, on the CPU."""
        packer = Packer()
        for piece in self.pieces:
            packer.add(piece, shared=self._shares(piece, 2))
        return packer.finish(self.layout())

    def _shares(self, piece: Piece, times: int) -> bool:
        return self.share and len(piece.prompt) >= MIN_SHARED_PROMPT and self.prompts[piece.prompt_id] >= times


def pack(
    samples: Sequence[Sample],
    *,
    max_tokens: int,
    ranks: int = 1,
    share_prompts: bool = True,
    cost: Callable[[Layout], float] | None = None,
) -> list[list[MicroBatch]]:
    """The micro-batches of each rank: `assign`, with the tensors of all."""
    bins = assign(samples, max_tokens=max_tokens, ranks=ranks, share_prompts=share_prompts, cost=cost)
    return [[b.micro_batch() for b in of_rank] for of_rank in bins]


def assign(
    samples: Sequence[Sample],
    *,
    max_tokens: int,
    ranks: int = 1,
    share_prompts: bool = True,
    cost: Callable[[Layout], float] | None = None,
) -> list[list[Bin]]:
    """Divide samples into micro-batches of at most `max_tokens` inputs for each rank; a longer sample has one to itself.

    All ranks get the same number, as their collectives need; where there is nothing to do one holds a single token and no target.
    Those that run at the same time differ by at most the longest sample, in tokens, and so do the ranks in all. The result is a
    function of the arguments alone. Samples without a sampled token are left out.

    Args:
        samples: of one step.
        max_tokens: budget of a micro-batch. Samples that share prompts may stand for up to `MAX_REACH` times as many tokens.
        ranks: processes to divide among.
        share_prompts: whether a prompt is computed once for all samples of a micro-batch that begin with it.
        cost: what a micro-batch takes, which attention makes more than its tokens; those of like cost run at the same time. Its
            tokens, when None.

    Raises:
        ValueError: a sample's first token is marked as sampled, so that nothing predicts it.
    """
    prompt_ids: dict[tuple[int, ...], int] = {}
    pieces = [_cut(sample, prompt_ids) for sample in samples if any(sample.loss_mask)]
    pieces.sort(key=lambda piece: (-piece.length, piece.prompt))  # stable
    columns = _columns(pieces, max_tokens, ranks, share_prompts, cost)
    of_ranks: list[list[Bin]] = [[] for _ in range(ranks)]
    for column in columns:  # the largest to whom has least so far
        by_load = sorted(of_ranks, key=lambda of_rank: sum(b.tokens for b in of_rank))
        for of_rank, b in zip(by_load, sorted(column, key=lambda b: -b.tokens), strict=True):
            of_rank.append(b)
    return of_ranks


def step_totals(samples: Sequence[Sample]) -> StepTotals:
    """Denominators of a step on these samples.

    Raises:
        ValueError: none of them has a sampled token.
    """
    sampled = [sample for sample in samples if any(sample.loss_mask)]
    return StepTotals(sum(sum(sample.loss_mask) for sample in sampled), len({sample.rollout_id for sample in sampled}))


def _cut(sample: Sample, prompt_ids: dict[tuple[int, ...], int]) -> Piece:
    sampled = tuple(i for i, chosen in enumerate(sample.loss_mask) if chosen)
    if sampled[0] == 0:
        raise ValueError(f"rollout {sample.rollout_id}: its first token is marked as sampled, but nothing comes before it")
    first, end = sampled[0] - 1, sampled[-1]
    prompt = tuple(sample.token_ids[:first])
    return Piece(sample, prompt, prompt_ids.setdefault(prompt, len(prompt_ids)), tuple(sample.token_ids[first:end]), sampled)


def _columns(
    pieces: Sequence[Piece], max_tokens: int, ranks: int, share: bool, cost: Callable[[Layout], float] | None
) -> list[list[Bin]]:
    """As few rounds of bins, one for each rank, as hold everything; of like cost and size in each round."""
    whole = Bin(share)
    for piece in pieces:
        whole.add(piece)
    most = max(1, -(-len(pieces) // ranks))
    needed = max(-(-whole.tokens // max_tokens), -(-whole.reach // (MAX_REACH * max_tokens)))
    clusters = _clusters(pieces, max_tokens, share)
    longest = max((piece.length for piece in pieces), default=0)
    for rounds in range(max(1, -(-needed // ranks)), most):
        bins = _place(clusters, rounds * ranks, share)
        bins.sort(key=(lambda b: -b.tokens) if cost is None else (lambda b: -cost(b.layout())))
        columns = [bins[start : start + ranks] for start in range(0, len(bins), ranks)]
        for column in columns:
            _level(column, longest)
        if all(b.fits(max_tokens) for b in bins):
            return columns
    alone = [Bin(share) for _ in range(most * ranks)]
    for b, piece in zip(alone, pieces, strict=False):
        b.add(piece)
    return [alone[start : start + ranks] for start in range(0, len(alone), ranks)]


def _clusters(pieces: Sequence[Piece], max_tokens: int, share: bool) -> list[Bin]:
    """Pieces with a prompt in common, together as far as they are within the budget; the largest first."""
    of_prompt: dict[int, list[Bin]] = {}
    for piece in pieces:
        clusters = of_prompt.setdefault(piece.prompt_id, [])
        if not clusters or not clusters[-1].has_room(piece, max_tokens):
            clusters.append(Bin(share))
        clusters[-1].add(piece)
    return sorted((cluster for clusters in of_prompt.values() for cluster in clusters), key=lambda cluster: -cluster.tokens)


def _place(clusters: Sequence[Bin], count: int, share: bool) -> list[Bin]:
    """Each cluster where the load is least (longest processing time first)."""
    bins = [Bin(share) for _ in range(count)]
    loads = [(0, index) for index in range(count)]  # a heap
    for cluster in clusters:
        _, index = loads[0]
        for piece in cluster.pieces:
            bins[index].add(piece)
        heapq.heapreplace(loads, (bins[index].tokens, index))
    return bins


def _level(bins: Sequence[Bin], longest: int) -> None:
    """Move samples from the fullest bin to the emptiest until they differ by `longest` tokens or less.

    A sample that leaves its prompt behind costs that prompt again. Both bins end below where the fullest was, so this ends.
    """
    while True:
        fullest, emptiest = max(bins, key=lambda b: b.tokens), min(bins, key=lambda b: b.tokens)
        if fullest.tokens - emptiest.tokens <= longest:
            return
        piece = min(fullest.pieces, key=lambda piece: emptiest.cost(piece) - fullest.gain(piece))
        fullest.remove(piece)
        emptiest.add(piece)
