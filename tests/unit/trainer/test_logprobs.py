"""Chunked log-probabilities against log_softmax of whole logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turnwise.trainer.logprobs import token_logprobs


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logs = ((hidden @ weight.T) / temperature).log_softmax(-1)
    return logs.gather(1, targets[:, None])[:, 0], -(logs.exp() * logs).sum(-1)


def make_input(tokens: int, vocabulary: int = 37, width: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64) * 2
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    return hidden, weight, torch.randint(vocabulary, (tokens,), generator=generator)


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(0, 9),
    chunk=st.integers(1, 10),
    temperature=st.sampled_from([1.0, 0.3, 2.5]),
    train_head=st.booleans(),
    entropy_grad=st.booleans(),
    seed=st.integers(0, 999),
)
def test_values_and_gradients_equal_the_naive_ones_for_any_chunk(
    tokens: int, chunk: int, temperature: float, train_head: bool, entropy_grad: bool, seed: int
) -> None:
    hidden, weight, targets = make_input(tokens, seed=seed)
    upstream = torch.randn(2, tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    grads: list[list[Tensor]] = []
    values: list[list[Tensor]] = []
    for chunked in (True, False):
        h, w = hidden.clone().requires_grad_(True), weight.clone().requires_grad_(train_head)
        if chunked:
            logprobs, entropy = token_logprobs(h, w, targets, temperature=temperature, entropy_grad=entropy_grad, chunk=chunk)
            assert entropy.requires_grad == entropy_grad
        else:
            logprobs, entropy = naive(h, w, targets, temperature)
        loss = (logprobs * upstream[0]).sum() + ((entropy * upstream[1]).sum() if entropy_grad else 0)
        loss.backward()
        grads.append([p.grad for p in (h, w) if p.grad is not None])
        values.append([logprobs.detach(), entropy.detach()])
    torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("train_head", [False, True])
def test_gradcheck_with_and_without_a_trained_head(train_head: bool) -> None:
    hidden, weight, targets = make_input(4, vocabulary=11)
    hidden.requires_grad_(True)
    weight.requires_grad_(train_head)

    def value(h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return tuple(token_logprobs(h, w, targets, temperature=0.7, entropy_grad=True, chunk=3))

    assert torch.autograd.gradcheck(value, (hidden, weight))


def test_huge_logits_stay_finite() -> None:
    hidden = torch.tensor([[300.0, 0.0], [-300.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[3.0, 0.0], [-3.0, 1.0], [0.0, 1.0]])
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([0, 0]))
    logprobs.sum().backward()
    assert logprobs.tolist() == [0.0, -1800.0]
    assert entropy.tolist() == [0.0, 0.0]
    assert hidden.grad is not None
    assert torch.isfinite(hidden.grad).all()


def test_the_logits_of_all_positions_never_exist_at_once() -> None:
    """Every intermediate of the vocabulary's width has at most `chunk` rows, forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    tallest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal tallest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.ndim == 2 and out.shape[1] == 37:
                tallest = max(tallest, out.shape[0])
            return out

    for train_head in (False, True):
        hidden, weight, targets = make_input(20, width=3)
        hidden.requires_grad_(True)
        weight.requires_grad_(train_head)
        with Watch():
            token_logprobs(hidden, weight, targets, chunk=5).logprobs.sum().backward()
    assert tallest == 5


def test_bfloat16_states_give_float32_statistics() -> None:
    hidden, weight, targets = make_input(8)
    exact, _ = naive(hidden, weight, targets, 1.0)
    stats = token_logprobs(hidden.bfloat16(), weight.bfloat16(), targets)
    assert stats.logprobs.dtype == torch.float32
    assert (stats.logprobs.double() - exact).abs().max() < 0.15  # logits of up to 15 in steps of 2^-4
