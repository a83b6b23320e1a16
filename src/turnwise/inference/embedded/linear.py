"""Linear layers with weights laid out once for oneDNN.

Measured on a Zen 5 core for the 135M model, all linear layers of one step at 8 rows: `F.linear` (MKL) 48 ms in float32 and
18 ms in bfloat16, prepacked 19 ms and 11 ms. The prepacked kernel also gives a row the same bits at any position among a
fixed number of rows, which the deterministic mode needs and checks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from turnwise.kernels.onednn import has_onednn

ROWS_HINT = 64  # rows for which oneDNN picks the layout; 16 to 512 gave the same speed at every size, 1 a slower one


class PackedLinear:
    """`x @ weight.T + bias` for a weight that never changes."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.bias = bias
        self.packed = has_onednn()
        dense = weight.detach().contiguous()
        self.inputs = dense.shape[1]
        self.weight = torch.ops.mkldnn._reorder_linear_weight(dense, ROWS_HINT) if self.packed else dense

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)

    def dense(self) -> Tensor:
        """The weight as it was given, to the bit."""
        return self.weight.to_dense() if self.packed else self.weight
