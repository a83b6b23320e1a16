"""Log-probabilities of chosen tokens without ever holding the logits of a whole batch.

One custom autograd function works through chunks of positions. Where the output layer is frozen, as under LoRA, the gradient of a
token's log-probability with respect to its hidden state does not depend on what comes back from the loss but for a scalar factor.
So it is formed while the chunk's logits exist, and the backward pass is one multiplication: logits are computed once, not twice.
A trained output layer needs the factor before it can form its own gradient; there the backward pass computes the chunk again.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from turnwise.kernels.onednn import product

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}  # logits of one chunk: 16 MiB, which stay in the cache, and 512 MiB in float32


class TokenStats(NamedTuple):
    """Of the chosen tokens, at the temperature; float32, or float64 for a float64 model."""

    logprobs: Float[Tensor, " tokens"]  # nats
    entropy: Float[Tensor, " tokens"]  # nats, of the whole distribution; carries a gradient only when asked for


def token_logprobs(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocab width"],
    targets: Int[Tensor, " tokens"],
    *,
    temperature: float = 1.0,
    entropy_grad: bool = False,
    chunk: int | None = None,
) -> TokenStats:
    """Log-probability of each target, and the entropy, under softmax(hidden @ weight.T / temperature).

    Args:
        hidden: states after the final norm, only at positions whose next token counts.
        weight: the output layer. Logits have its type, as in the engines; the softmax is float32.
        targets: the next token at each position.
        temperature: divides the logits.
        entropy_grad: whether gradients flow through the entropy.
        chunk: positions at a time.
    """
    if chunk is None:
        chunk = max(1, CHUNK_ELEMENTS.get(hidden.device.type, 1 << 24) // weight.shape[0])
    return TokenStats(*_TokenLogprobs.apply(hidden, weight, targets, temperature, entropy_grad, chunk))  # pyright: ignore[reportGeneralTypeIssues]


class _Chunk(NamedTuple):
    shifted: Tensor  # logits / temperature, less each row's maximum
    exponentials: Tensor  # exp(shifted): probabilities times the sum
    total: Tensor  # [rows, 1]


def _softmax_chunk(hidden: Tensor, weight: Tensor, temperature: float) -> _Chunk:
    shifted = product(hidden, weight).to(_wide(hidden.dtype))
    if temperature != 1.0:
        shifted.div_(temperature)
    shifted.sub_(shifted.amax(-1, keepdim=True))
    exponentials = shifted.exp()
    return _Chunk(shifted, exponentials, exponentials.sum(-1, keepdim=True))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _TokenLogprobs(torch.autograd.Function):
    """Gradients: d logprob_t / d logits = (onehot - p) / T; d entropy / d logits = -p (log p + entropy) / T."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, entropy_grad: bool, chunk: int
    ) -> tuple[Tensor, Tensor]:
        wide = _wide(hidden.dtype)
        logprobs, entropy = (torch.empty(len(targets), dtype=wide, device=hidden.device) for _ in range(2))
        recompute = ctx.needs_input_grad[1]
        directions = ctx.needs_input_grad[0] and not recompute
        slopes = torch.empty_like(hidden, dtype=wide) if directions else None
        entropy_slopes = torch.empty_like(hidden, dtype=wide) if directions and entropy_grad else None
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            part = _softmax_chunk(hidden[rows], weight, temperature)
            log_total = part.total.log()
            logprobs[rows] = (part.shifted.gather(1, targets[rows, None]) - log_total)[:, 0]
            entropy[rows] = log_total[:, 0] - torch.linalg.vecdot(part.exponentials, part.shifted) / part.total[:, 0]
            if slopes is not None:
                mean_row = product(part.exponentials.to(weight.dtype), weight.T).to(wide) / part.total
                slopes[rows] = (weight[targets[rows]].to(wide) - mean_row) / temperature
            if entropy_slopes is not None:
                entropy_slopes[rows] = (_entropy_slope(part, entropy[rows]).to(weight.dtype) @ weight).to(wide) / temperature
        ctx.settings = (temperature, entropy_grad, chunk, recompute)
        ctx.save_for_backward(*((hidden, weight, targets) if recompute else (slopes, entropy_slopes)))
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropy = grads
        temperature, entropy_grad, chunk, recompute = ctx.settings
        if not entropy_grad:
            grad_entropy = None
        if recompute:
            grad_hidden, grad_weight = _recompute_backward(ctx.saved_tensors, grad_logprobs, grad_entropy, temperature, chunk)
            return grad_hidden, grad_weight, None, None, None, None
        slopes, entropy_slopes = ctx.saved_tensors
        grad_hidden = None if slopes is None or grad_logprobs is None else slopes * grad_logprobs[:, None]
        if entropy_slopes is not None and grad_entropy is not None:
            contribution = entropy_slopes * grad_entropy[:, None]
            grad_hidden = contribution if grad_hidden is None else grad_hidden + contribution
        return grad_hidden, None, None, None, None, None


def _entropy_slope(part: _Chunk, entropy: Tensor) -> Tensor:
    return (part.shifted - part.total.log() + entropy[:, None]).mul_(part.exponentials).div_(part.total).neg_()


def _recompute_backward(
    saved: tuple[Tensor, Tensor, Tensor],
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    hidden, weight, targets = saved
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros_like(weight, dtype=_wide(weight.dtype))
    for start in range(0, len(targets), chunk):
        rows = slice(start, start + chunk)
        part = _softmax_chunk(hidden[rows], weight, temperature)
        grad_logits = torch.zeros_like(part.shifted)
        if grad_logprobs is not None:
            upstream = grad_logprobs[rows, None]
            grad_logits.sub_(part.exponentials / part.total * upstream)
            grad_logits.scatter_add_(1, targets[rows, None], upstream)
        if grad_entropy is not None:
            log_total = part.total.log()[:, 0]
            entropy = log_total - torch.linalg.vecdot(part.exponentials, part.shifted) / part.total[:, 0]
            grad_logits.add_(_entropy_slope(part, entropy).mul_(grad_entropy[rows, None]))
        grad_logits = grad_logits.div_(temperature).to(weight.dtype)
        grad_hidden[rows] = grad_logits @ weight
        grad_weight += grad_logits.T @ hidden[rows]
    return grad_hidden, grad_weight.to(weight.dtype)
