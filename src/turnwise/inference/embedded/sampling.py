"""Seeded sampling by inverse distribution function: one uniform number for each token, drawn from (seed, index)."""

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 64  # vocabulary entries summed together before the cumulative sum, which is the slow part
MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends on its arguments alone: two rounds of SplitMix64's finaliser."""
    return (_mix(_mix(seed & MASK) + (index + 1) * GOLDEN) >> 11) * 2.0**-53


def sample(logits: Tensor, temperatures: Sequence[float], uniforms: Sequence[float]) -> tuple[list[int], list[float]]:
    """Draw one token for each row of `logits` (float32 [rows, vocabulary], overwritten).

    Returns the tokens and their logprobs under the distribution that was sampled: `softmax(logits / temperature)`, or
    for temperature 0 (greedy) `softmax(logits)`. A row with NaN, with plus infinity, or with nothing but minus infinity has no
    distribution: it gets token 0 with the logprob NaN, and the others are as without it.
    """
    divisors = torch.tensor([t if t > 0 else 1.0 for t in temperatures], dtype=torch.float32)
    if any(t != 1.0 for t in divisors.tolist()):
        logits = logits.div_(divisors[:, None])
    logprobs = torch.log_softmax(logits, dim=-1)
    if all(t == 0 for t in temperatures):
        tokens = logprobs.argmax(-1)
    else:
        tokens = _inverse_cdf(logprobs, torch.tensor(uniforms, dtype=torch.float64))
        if any(t == 0 for t in temperatures):
            greedy = torch.tensor([t == 0 for t in temperatures])
            tokens = torch.where(greedy, logprobs.argmax(-1), tokens)
    tokens = tokens.masked_fill_(logprobs[:, 0].isnan(), 0)  # such a row is NaN throughout, by its sum
    chosen = logprobs.gather(1, tokens[:, None])[:, 0]
    return tokens.tolist(), chosen.tolist()


def _inverse_cdf(logprobs: Tensor, uniforms: Tensor) -> Tensor:
    """First find the block of the vocabulary in which the uniform number falls, then the entry inside it."""
    rows, vocabulary = logprobs.shape
    probabilities = torch.exp(logprobs)
    padding = -vocabulary % BLOCK
    if padding:
        probabilities = torch.nn.functional.pad(probabilities, (0, padding))
    blocks = probabilities.view(rows, -1, BLOCK)
    cumulative = blocks.sum(-1, dtype=torch.float32).double().cumsum(-1)
    goals = uniforms[:, None] * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, goals, right=True).clamp_(max=blocks.shape[1] - 1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp(min=0)), 0.0)
    inner = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0].double()
    within = inner.cumsum(-1)
    # float32 block sums and the float64 sums inside may differ in the last bits: scale the goal so that it stays inside
    inner_goal = (goals - before) / (cumulative.gather(1, block) - before) * within[:, -1:]
    entry = torch.searchsorted(within, inner_goal, right=True)
    last_possible = BLOCK - 1 - (inner > 0).flip(-1).to(torch.int8).argmax(-1, keepdim=True)
    return (block * BLOCK + torch.minimum(entry, last_possible))[:, 0]


def _mix(value: int) -> int:
    value &= MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)
