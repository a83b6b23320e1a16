"""Dequantise in Triton: four bytes of codes in, sixteen bytes of bfloat16 out, per thread and turn."""
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false

import torch
import triton
import triton.language as tl
from jaxtyping import BFloat16, UInt8
from torch import Tensor

from turnwise.kernels.mxfp4.triton_codes import scale_pairs, scaled_pairs

WARPS = 4
LANES = 32 * WARPS
TURNS = 4  # loads that a thread has in flight; it writes that many times 8 values


@triton.jit
def _dequantize_kernel(words_ptr, scales_ptr, out_ptr, total, LANES: tl.constexpr, TURNS: tl.constexpr):
    # A thread takes one word a turn, so that neighbouring threads write neighbouring 16 bytes; with more words to a thread, each
    # store of a warp would touch twice the number of 32-byte sectors.
    first = tl.program_id(0).to(tl.int64) * (LANES * TURNS) + tl.arange(0, LANES)
    words = ()
    scale_bytes = ()
    for turn in tl.static_range(TURNS):
        index = first + turn * LANES
        words = words + (tl.load(words_ptr + index, mask=index < total, other=0),)  # noqa: RUF005
        scale_bytes = scale_bytes + (tl.load(scales_ptr + index // 4, mask=index < total, other=0),)  # noqa: RUF005
    for turn in tl.static_range(TURNS):
        index = first + turn * LANES
        word = words[turn].to(tl.uint32, bitcast=True)
        scale = scale_pairs(scale_bytes[turn].to(tl.uint32), False)
        pair0 = scaled_pairs(word, 0, scale, False)
        pair1 = scaled_pairs(word, 1, scale, False)
        pair2 = scaled_pairs(word, 2, scale, False)
        pair3 = scaled_pairs(word, 3, scale, False)
        lower = tl.join((pair0 & 0xFFFF) | (pair1 << 16), (pair2 & 0xFFFF) | (pair3 << 16))  # codes 0 1, 2 3
        upper = tl.join((pair0 >> 16) | (pair1 & 0xFFFF0000), (pair2 >> 16) | (pair3 & 0xFFFF0000))  # codes 4 5, 6 7
        four = tl.reshape(tl.permute(tl.join(lower, upper), (0, 2, 1)), (LANES, 4))
        target = out_ptr + index[:, None] * 4 + tl.arange(0, 4)[None, :]
        tl.store(target, four.to(tl.int32, bitcast=True), mask=(index < total)[:, None])


def dequantize(packed: UInt8[Tensor, "n half_k"], scales: UInt8[Tensor, "n blocks"]) -> BFloat16[Tensor, "n k"]:
    """Values in bfloat16, by the table. Both tensors are contiguous, `packed` aligned to four bytes."""
    n, half = packed.shape
    out = torch.empty(n, 2 * half, dtype=torch.bfloat16, device=packed.device)
    total = packed.numel() // 4
    if total:
        _dequantize_kernel[(triton.cdiv(total, LANES * TURNS),)](
            packed.view(torch.int32), scales, out.view(torch.int32), total, LANES=LANES, TURNS=TURNS, num_warps=WARPS
        )
    return out
