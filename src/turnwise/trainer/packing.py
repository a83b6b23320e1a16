"""From samples to packed micro-batches, balanced over ranks.

Samples lie end to end in one sequence without padding. Only what the loss needs is there: a sample ends before its last sampled
token (whose successor nobody asks for), and a prompt that several samples of a micro-batch begin with is there once.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from turnwise.trainer.attention import NO_PARENT, Layout
from turnwise.trainer.loss import StepTotals
from turnwise.transport import Sample

MIN_SHARED_PROMPT = 16  # tokens; below, one more attention call a layer costs more than the prompt


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
    own: tuple[int, ...]  # the other inputs
    sampled: tuple[int, ...]  # indices of the sampled tokens in the sample


@dataclass
class _Bin:
    share: bool
    pieces: list[_Piece] = field(default_factory=list)
    prompts: set[tuple[int, ...]] = field(default_factory=set)
    tokens: int = 0

    def cost(self, piece: _Piece) -> int:
        shared = self.share and len(piece.prompt) >= MIN_SHARED_PROMPT and piece.prompt in self.prompts
        return len(piece.own) + (0 if shared else len(piece.prompt))

    def add(self, piece: _Piece) -> None:
        self.tokens += self.cost(piece)
        self.prompts.add(piece.prompt)
        self.pieces.append(piece)


def pack(samples: Sequence[Sample], *, max_tokens: int, ranks: int = 1, share_prompts: bool = True) -> list[list[MicroBatch]]:
    """Micro-batches of at most `max_tokens` inputs for each rank; a longer sample has one to itself.

    All ranks get the same number, as their collectives need; where there is nothing to do one holds a single token and no target.
    The result is a function of the arguments alone. Samples without a sampled token are left out.

    Raises:
        ValueError: a sample's first token is marked as sampled, so that nothing predicts it.
    """
    pieces = [_cut(sample) for sample in samples if any(sample.loss_mask)]
    order = sorted(range(len(pieces)), key=lambda i: (-len(pieces[i].prompt) - len(pieces[i].own), pieces[i].prompt, i))
    bins = _fill([pieces[i] for i in order], max_tokens, ranks, share_prompts)
    bins.sort(key=lambda b: -b.tokens)  # stable; micro-batches that run at the same time are of like size
    return [[_tensors(b) for b in bins[rank::ranks]] for rank in range(ranks)]


def step_totals(samples: Sequence[Sample]) -> StepTotals:
    """Denominators of a step on these samples.

    Raises:
        ValueError: none of them has a sampled token.
    """
    sampled = [sample for sample in samples if any(sample.loss_mask)]
    return StepTotals(sum(sum(sample.loss_mask) for sample in sampled), len({sample.rollout_id for sample in sampled}))


def _cut(sample: Sample) -> _Piece:
    sampled = tuple(i for i, chosen in enumerate(sample.loss_mask) if chosen)
    if sampled[0] == 0:
        raise ValueError(f"rollout {sample.rollout_id}: its first token is marked as sampled, but nothing comes before it")
    first, end = sampled[0] - 1, sampled[-1]
    return _Piece(sample, tuple(sample.token_ids[:first]), tuple(sample.token_ids[first:end]), sampled)


def _fill(pieces: Sequence[_Piece], max_tokens: int, ranks: int, share: bool) -> list[_Bin]:
    """Longest first, each where the load stays least; one more round of bins as long as one overflows."""
    whole = _Bin(share)
    for piece in pieces:
        whole.add(piece)
    most = max(1, -(-len(pieces) // ranks))  # one piece a bin
    rounds = min(most, max(1, -(-whole.tokens // (max_tokens * ranks))))
    while True:
        bins = [_Bin(share) for _ in range(rounds * ranks)]
        for piece in pieces:
            min(bins, key=lambda b, piece=piece: b.tokens + b.cost(piece)).add(piece)
        if all(b.tokens <= max_tokens or len(b.pieces) == 1 for b in bins) or rounds == most:
            return bins
        rounds += 1


def _tensors(contents: _Bin) -> MicroBatch:
    uses = Counter(piece.prompt for piece in contents.pieces)
    shared = {prompt for prompt, count in uses.items() if contents.share and count > 1 and len(prompt) >= MIN_SHARED_PROMPT}
    packer = _Packer(shared)
    for piece in contents.pieces:
        packer.add(piece)
    return packer.finish()


class _Packer:
    """Lays pieces end to end."""

    def __init__(self, shared: set[tuple[int, ...]]) -> None:
        self.shared = shared
        self.ids: list[int] = []
        self.position_ids: list[int] = []
        self.lengths: list[int] = []
        self.parents: list[int] = []
        self.prompts: dict[tuple[int, ...], int] = {}
        self.positions: list[int] = []
        self.targets: list[int] = []
        self.behaviour: list[float] = []
        self.advantages: list[float] = []
        self.segment_ids: list[int] = []
        self.rollout_tokens: list[int] = []

    def add(self, piece: _Piece) -> None:
        sample = piece.sample
        if piece.prompt in self.shared:
            if piece.prompt not in self.prompts:
                self.prompts[piece.prompt] = self._segment(piece.prompt, 0, NO_PARENT)
            start = len(self.ids) - len(piece.prompt)
            self._segment(piece.own, len(piece.prompt), self.prompts[piece.prompt])
        else:
            start = len(self.ids)
            self._segment(piece.prompt + piece.own, 0, NO_PARENT)
        self.positions += [start + i - 1 for i in piece.sampled]
        self.targets += [sample.token_ids[i] for i in piece.sampled]
        self.behaviour += [sample.logprobs[i] for i in piece.sampled]
        self.advantages += [sample.advantages[i] for i in piece.sampled]
        self.segment_ids += [len(self.rollout_tokens)] * len(piece.sampled)
        self.rollout_tokens.append(max(sample.rollout_tokens, len(piece.sampled)))

    def _segment(self, ids: tuple[int, ...], first_position: int, parent: int) -> int:
        self.ids += ids
        self.position_ids += range(first_position, first_position + len(ids))
        self.lengths.append(len(ids))
        self.parents.append(parent)
        return len(self.lengths) - 1

    def finish(self) -> MicroBatch:
        if not self.ids:
            self._segment((0,), 0, NO_PARENT)
        return MicroBatch(
            torch.tensor(self.ids),
            torch.tensor(self.position_ids),
            Layout(tuple(self.lengths), tuple(self.parents)),
            torch.tensor(self.positions, dtype=torch.long),
            torch.tensor(self.targets, dtype=torch.long),
            torch.tensor(self.behaviour, dtype=torch.float32),
            torch.tensor(self.advantages, dtype=torch.float32),
            torch.tensor(self.segment_ids, dtype=torch.long),
            torch.tensor(self.rollout_tokens, dtype=torch.long),
        )
