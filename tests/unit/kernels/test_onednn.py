"""The product is the same as torch's own, whichever library computes it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turnwise.kernels import onednn


@settings(deadline=None, max_examples=60)
@given(rows=st.integers(1, 70), inputs=st.integers(1, 65), outputs=st.integers(1, 65), transposed=st.booleans())
def test_the_product_agrees_with_float64(rows: int, inputs: int, outputs: int, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(rows * 10_000 + inputs * 100 + outputs)
    x = torch.randn(rows, inputs, generator=generator)
    weight = (
        torch.randn(inputs, outputs, generator=generator).T if transposed else torch.randn(outputs, inputs, generator=generator)
    )
    expected = x.double() @ weight.double().T
    assert (onednn.product(x, weight).double() - expected).abs().max().item() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_onednn_torch_computes_it(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(5, 8).to(dtype), torch.randn(3, 8).to(dtype)
    with_onednn = onednn.product(x, weight)
    monkeypatch.setattr(onednn, "has_onednn", lambda: False)
    assert torch.equal(onednn.product(x, weight), x @ weight.T)
    torch.testing.assert_close(with_onednn, x @ weight.T)


def test_no_rows_give_no_rows() -> None:
    assert onednn.product(torch.empty(0, 8), torch.randn(3, 8)).shape == (0, 3)
