"""The sampled tokens of a batch, over all ranks: what the engine recorded of them, and what the policy says of them now."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from turnwise.trainer import fsdp
from turnwise.trainer.canary import evaluating
from turnwise.trainer.loss import MAX_LOG_RATIO
from turnwise.trainer.step import Learner, Passes

LOGITS = 1 << 24  # elements at a time, float32

Vector = Float[np.ndarray, " tokens"]


@dataclass(frozen=True)
class Tokens:
    """What a batch holds of each sampled token; the order is that of `measure`."""

    engine: Vector  # logprobs as recorded, nats
    advantages: Vector
    samples: Int[np.ndarray, " tokens"]  # the token's sample, by number
    lengths: Vector  # sampled tokens of the rollout that the sample belongs to


def tokens_of(passes: Passes) -> Tokens:
    """The tokens of a step's passes; a collective."""
    mine: list[tuple[Any, ...]] = []
    for batch in passes.micro_batches:
        fields = (batch.behaviour_logprobs, batch.advantages, batch.segment_ids, batch.rollout_tokens[batch.segment_ids])
        mine.append(tuple(values.cpu().numpy() for values in fields))
    every = [part for of_rank in fsdp.gather(mine) for part in of_rank]
    first = np.cumsum([0, *(part[2].max(initial=-1) + 1 for part in every)])
    return Tokens(
        _joined([part[0] for part in every]),
        _joined([part[1] for part in every]),
        np.concatenate([part[2] + start for part, start in zip(every, first, strict=False)]).astype(np.int64),
        _joined([part[3] for part in every]),
    )


def measure(learner: Learner, passes: Passes, temperatures: Sequence[float] = ()) -> tuple[Vector, list[Vector]]:
    """Logprobs of the sampled tokens under the policy as it is, without dropout and uncompiled; a collective.

    Returns:
        By the trainer's own function at the batch's temperature; and by a plain softmax of its logits, at each of `temperatures`.
    """
    head = cast(nn.Linear, learner.policy.model.get_output_embeddings()).weight
    weight = fsdp.full(head) if temperatures else head
    own: list[Tensor] = []
    plain: list[Tensor] = []
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), evaluating(learner), _hidden(learner) as hidden:
        for batch in passes.micro_batches:
            own.append(learner.policy.stats(batch, temperature=passes.temperature).logprobs)
            states = hidden.pop()[0].index_select(0, batch.positions)
            if temperatures:
                plain.append(_softmax(states, weight.to(states.dtype), batch.targets, temperatures))
    local = (torch.cat(own).double().cpu().numpy(), torch.cat(plain, 1).double().cpu().numpy() if plain else None)
    every = fsdp.gather(local)
    rows = [_joined([part[1][i] for part in every if part[1] is not None]) for i in range(len(temperatures))]
    return _joined([part[0] for part in every]), rows


def kl(after: Vector, before: Vector) -> float:
    """KL(before || after) a token, by k3, from tokens that `before` sampled."""
    ratio = np.clip(after - before, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    return float(np.mean(np.exp(ratio) - ratio - 1))


def loss_weights(tokens: Tokens, *, kind: str, max_completion_tokens: int) -> Vector:
    """What each token counts in the loss, as docs/loss.md says; written apart from the loss on purpose.

    Args:
        kind: trainer.loss.kind.
        max_completion_tokens: the denominator of dr_grpo.
    """
    ones = np.ones_like(tokens.lengths)
    sequences = float(np.sum(ones / tokens.lengths))  # each token is its part of a rollout
    if kind in ("dapo", "cispo"):
        return ones / len(ones)
    if kind == "dr_grpo":
        return ones / (sequences * max_completion_tokens)
    return ones / (tokens.lengths * sequences)


@contextmanager
def _hidden(learner: Learner) -> Generator[list[Tensor]]:
    """A list to which every forward pass adds the decoder's last hidden states, [1, inputs, width]."""
    states: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        states.append(output.last_hidden_state)

    decoder = cast(nn.Module, learner.policy.model.get_decoder())
    handle = decoder.register_forward_hook(keep)
    try:
        yield states
    finally:
        handle.remove()


def _softmax(states: Tensor, weight: Tensor, targets: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Logprobs of the targets, [temperatures, tokens]."""
    rows = max(1, LOGITS // weight.shape[0])
    found = [torch.empty(len(temperatures), 0, device=states.device)]
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        logits = (states[part] @ weight.T).float()
        chosen = logits.gather(1, targets[part, None])[:, 0]
        found.append(torch.stack([chosen / t - torch.logsumexp(logits / t, -1) for t in temperatures]))
    return torch.cat(found, 1)


def _joined(parts: Sequence[Any]) -> Vector:
    return np.concatenate([np.asarray(part, dtype=np.float64) for part in parts]) if parts else np.empty(0)
