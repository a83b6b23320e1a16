"""From samples to packed micro-batches, balanced over ranks.

Samples lie end to end in one sequence without padding. Only what the loss needs is there: a sample ends before its last sampled
token (whose successor nobody asks for), and a prompt that several samples of a micro-batch begin with is there once.

Ranks wait for each other in every micro-batch, since parameters are gathered layer by layer. So two things are balanced: all
micro-batches have about the same number of tokens, and those that run at the same time are of like cost.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from turnwise.trainer.attention import NO_PARENT, Layout
from turnwise.trainer.loss import StepTotals
from turnwise.transport import Sample

MIN_SHARED_PROMPT = 16  # tokens; below, one more attention call a layer costs more than the prompt
MAX_REACH = 4  # budgets: what samples of a micro-batch have in tokens without sharing, since attention holds keys for each


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass: packed inputs, and what the loss needs at the tokens that the policy sampled."""

    input_ids: Int[Tensor, " tokens"]
    position_ids: Int[Tensor, " tokens"]
    layout: Layout
    positions: Int[Tensor, " sampled"]  # packed index whose output predicts the sampled token
    targets: Int[Tensor, " sampled"]
    behaviour_logprobs: Float[Tensor, " sampled"]
    advantages: Float[Tensor, " sampled"]
    segment_ids: Int[Tensor, " sampled"]  # sample of each sampled token, counted from 0
    rollout_tokens: Int[Tensor, " samples"]

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)})


@dataclass(frozen=True)
class _Piece:
    """A sample cut to what its loss needs."""

    sample: Sample
    prompt: tuple[int, ...]  # inputs that may be shared: before the one that predicts the first sampled token
    prompt_id: int  # the same for equal prompts
    own: tuple[int, ...]  # the other inputs
    sampled: tuple[int, ...]  # indices of the sampled tokens in the sample

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.own)


@dataclass
class Bin:
    """What one micro-batch will hold."""

    share: bool
    pieces: list[_Piece] = field(default_factory=list)
    prompts: Counter[int] = field(default_factory=Counter)
    tokens: int = 0
    reach: int = 0  # tokens without sharing

    def cost(self, piece: _Piece) -> int:
        """Tokens that it would add."""
        return len(piece.own) + (0 if self._shares(piece, 1) else len(piece.prompt))

    def add(self, piece: _Piece) -> None:
        """Put it in."""
        self.tokens += self.cost(piece)
        self.reach += piece.length
        self.prompts[piece.prompt_id] += 1
        self.pieces.append(piece)

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
        packer = _Packer()
        for piece in self.pieces:
            packer.add(piece, shared=self._shares(piece, 2))
        return packer.finish(self.layout())

    def _shares(self, piece: _Piece, times: int) -> bool:
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
    Any two differ by at most the longest sample, in tokens. The result is a function of the arguments alone. Samples without a
    sampled token are left out.

    Args:
        samples: of one step.
        max_tokens: budget of a micro-batch. Samples that share prompts may stand for up to `MAX_REACH` times as many tokens.
        ranks: processes to divide among.
        share_prompts: whether a prompt is computed once for all samples of a micro-batch that begin with it.
        cost: what a micro-batch takes; those of like cost run at the same time. Its tokens, when None.

    Raises:
        ValueError: a sample's first token is marked as sampled, so that nothing predicts it.
    """
    prompt_ids: dict[tuple[int, ...], int] = {}
    pieces = [_cut(sample, prompt_ids) for sample in samples if any(sample.loss_mask)]
    pieces.sort(key=lambda piece: (-piece.length, piece.prompt))  # stable
    bins = _fill(pieces, max_tokens, ranks, share_prompts)
    bins.sort(key=(lambda b: -b.tokens) if cost is None else (lambda b: -cost(b.layout())))
    return [bins[rank::ranks] for rank in range(ranks)]


def step_totals(samples: Sequence[Sample]) -> StepTotals:
    """Denominators of a step on these samples.

    Raises:
        ValueError: none of them has a sampled token.
    """
    sampled = [sample for sample in samples if any(sample.loss_mask)]
    return StepTotals(sum(sum(sample.loss_mask) for sample in sampled), len({sample.rollout_id for sample in sampled}))


def _cut(sample: Sample, prompt_ids: dict[tuple[int, ...], int]) -> _Piece:
    sampled = tuple(i for i, chosen in enumerate(sample.loss_mask) if chosen)
    if sampled[0] == 0:
        raise ValueError(f"rollout {sample.rollout_id}: its first token is marked as sampled, but nothing comes before it")
    first, end = sampled[0] - 1, sampled[-1]
    prompt = tuple(sample.token_ids[:first])
    return _Piece(sample, prompt, prompt_ids.setdefault(prompt, len(prompt_ids)), tuple(sample.token_ids[first:end]), sampled)


def _fill(pieces: Sequence[_Piece], max_tokens: int, ranks: int, share: bool) -> list[Bin]:
    """Longest first, each where the load stays least; one more round of bins as long as one overflows."""
    whole = Bin(share)
    for piece in pieces:
        whole.add(piece)
    most = max(1, -(-len(pieces) // ranks))  # one piece a bin: an empty bin is always the least loaded
    needed = max(-(-whole.tokens // max_tokens), -(-whole.reach // (MAX_REACH * max_tokens)))
    rounds = min(most, max(1, -(-needed // ranks)))
    while True:
        bins = _least_loaded(pieces, rounds * ranks, share)
        if rounds == most or all(b.fits(max_tokens) for b in bins):
            return bins
        rounds += 1


def _least_loaded(pieces: Sequence[_Piece], count: int, share: bool) -> list[Bin]:
    """Each piece in the bin whose load is least with it: the least loaded of all, or one that has its prompt already."""
    bins = [Bin(share) for _ in range(count)]
    loads = [(0, index) for index in range(count)]  # a heap; entries with an old load are dropped when they come up
    holders: dict[int, set[int]] = {}
    for piece in pieces:
        while loads[0][0] != bins[loads[0][1]].tokens:
            heapq.heappop(loads)
        held = holders.setdefault(piece.prompt_id, set())
        chosen = min({loads[0][1], *held}, key=lambda index, piece=piece: (bins[index].tokens + bins[index].cost(piece), index))
        bins[chosen].add(piece)
        held.add(chosen)
        heapq.heappush(loads, (bins[chosen].tokens, chosen))
    return bins


class _Packer:
    """Lays pieces end to end, in the order of `Bin.layout`."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.position_ids: list[int] = []
        self.prompts: set[int] = set()  # shared ones that are there
        self.positions: list[int] = []
        self.targets: list[int] = []
        self.behaviour: list[float] = []
        self.advantages: list[float] = []
        self.segment_ids: list[int] = []
        self.rollout_tokens: list[int] = []

    def add(self, piece: _Piece, *, shared: bool) -> None:
        if not shared or piece.prompt_id not in self.prompts:
            self._extend(piece.prompt, 0)
            self.prompts.add(piece.prompt_id)
        start = len(self.ids) - len(piece.prompt)  # where the sample would begin in front of its own inputs
        self._extend(piece.own, len(piece.prompt))
        sample = piece.sample
        self.positions += [start + i - 1 for i in piece.sampled]
        self.targets += [sample.token_ids[i] for i in piece.sampled]
        self.behaviour += [sample.logprobs[i] for i in piece.sampled]
        self.advantages += [sample.advantages[i] for i in piece.sampled]
        self.segment_ids += [len(self.rollout_tokens)] * len(piece.sampled)
        self.rollout_tokens.append(max(sample.rollout_tokens, len(piece.sampled)))

    def _extend(self, ids: tuple[int, ...], first_position: int) -> None:
        self.ids += ids
        self.position_ids += range(first_position, first_position + len(ids))

    def finish(self, layout: Layout) -> MicroBatch:
        if not self.ids:
            self._extend((0,), 0)
        return MicroBatch(
            torch.tensor(self.ids),
            torch.tensor(self.position_ids),
            layout,
            torch.tensor(self.positions, dtype=torch.long),
            torch.tensor(self.targets, dtype=torch.long),
            torch.tensor(self.behaviour, dtype=torch.float32),
            torch.tensor(self.advantages, dtype=torch.float32),
            torch.tensor(self.segment_ids, dtype=torch.long),
            torch.tensor(self.rollout_tokens, dtype=torch.long),
        )
