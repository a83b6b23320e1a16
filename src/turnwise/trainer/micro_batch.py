"""The tensors of one forward pass over packed samples."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from turnwise.trainer.attention import Layout
from turnwise.transport import Sample


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
        """The same on another device, with what attention needs there."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, layout=self.layout.on(device), **tensors)


@dataclass(frozen=True, eq=False)
class Piece:
    """A sample cut to what its loss needs."""

    sample: Sample
    prompt: tuple[int, ...]  # inputs that may be shared: before the one that predicts the first sampled token
    prompt_id: int  # the same for equal prompts
    own: tuple[int, ...]  # the other inputs
    sampled: tuple[int, ...]  # indices of the sampled tokens in the sample

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.own)


class Packer:
    """Lays pieces end to end, in the order of the layout that `finish` is given."""

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

    def add(self, piece: Piece, *, shared: bool) -> None:
        """Append a sample; `shared`: without its prompt, when that is there."""
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
        """The tensors; without a sample, a single token and no target."""
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
