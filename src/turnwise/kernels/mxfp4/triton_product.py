"""Some tokens times a quantised weight, in Triton: codes are loaded into registers, decoded and multiplied there. Up to 16 tokens
are multiplied by `triton_few`, whose parts are added here.

The weight is the left operand, out^T [N, M] = W [N, K] x^T [K, M], since wgmma takes its left operand from registers. No weight
passes through shared memory: the order of rows and of k in a tile is chosen so that each thread loads, 16 bytes at a time, just
the codes whose values it must hold as part of the operand. Any order of k serves if the tokens are put into the same one.

A tile is 128 codes along K, 16 words a row. Where k = 32 t + 8 q + 4 h + j (t: thread of the four that share a row, q: its word,
j and j + 4: codes that are decoded together, h: which of the two), the operand's index is 32 j + 8 q + 2 t + h.
"""
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from jaxtyping import BFloat16, UInt8
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turnwise.kernels.mxfp4 import plan, triton_few
from turnwise.kernels.mxfp4.triton_codes import INTERPRETED, bfloat16_pairs, scale_pairs, scaled_pairs

REDUCE = 256  # outputs of a program that adds partial sums: many small programs are there at once


@triton.jit
def _weight_operand(words, scales, ROWS: tl.constexpr, WARPS: tl.constexpr, SMALL_SCALES: tl.constexpr):
    """[N', 128] bfloat16 of words [N', 16] and scales [N'], the bytes of four blocks; rows and k in the operand's order."""
    BLOCK_N: tl.constexpr = ROWS * WARPS * 16
    shift = (tl.arange(0, 4) * 8).to(tl.uint32)
    byte = (scales.to(tl.uint32, bitcast=True)[:, None] >> shift[None, :]) & 255
    scale = scale_pairs(byte, SMALL_SCALES)[:, :, None]
    words = tl.reshape(words.to(tl.uint32, bitcast=True), (BLOCK_N, 4, 4))
    pair0 = bfloat16_pairs(scaled_pairs(words, 0, scale, SMALL_SCALES))
    pair1 = bfloat16_pairs(scaled_pairs(words, 1, scale, SMALL_SCALES))
    pair2 = bfloat16_pairs(scaled_pairs(words, 2, scale, SMALL_SCALES))
    pair3 = bfloat16_pairs(scaled_pairs(words, 3, scale, SMALL_SCALES))
    values = tl.join(tl.join(pair0, pair2), tl.join(pair1, pair3))  # [N', t, q, h, upper bit of j, lower bit]
    values = tl.reshape(values, (ROWS, 2, WARPS, 8, 4, 4, 2, 4))  # N' as it was dealt out; t, q, h, j
    values = tl.permute(values, (0, 2, 1, 3, 7, 5, 4, 6))
    return tl.reshape(values, (BLOCK_N, 128))


@triton.jit
def _token_operand(x, TOKENS: tl.constexpr):
    """[128, M'] of tokens [M', 128], k in the operand's order."""
    x = tl.permute(tl.reshape(x, (TOKENS, 4, 4, 2, 4)), (0, 4, 2, 1, 3))  # t, q, h, j -> j, q, t, h
    return tl.reshape(x, (TOKENS, 128)).T


@triton.jit(do_not_specialize=["m"])  # one compilation, and not others for 1 token and for multiples of 16
def _product_kernel(
    x_ptr, words_ptr, scales_ptr, out_ptr, m, n,
    K: tl.constexpr, STEPS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, TOKENS: tl.constexpr,
    WARPS: tl.constexpr, AHEAD: tl.constexpr, UNROLL: tl.constexpr, SMALL_SCALES: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = BLOCK_N // (16 * WARPS)
    first_row = tl.program_id(0) * BLOCK_N
    split = tl.program_id(1)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)

    # Loads deal rows out to threads in the order (register, half, warp, lane), the operand's is (register, warp, half, lane).
    dealt = tl.permute(tl.reshape(tl.arange(0, BLOCK_N), (ROWS, WARPS, 2, 8)), (0, 2, 1, 3))
    row = tl.minimum(first_row + tl.reshape(dealt, (BLOCK_N,)), n - 1).to(tl.int64)
    step = split * STEPS
    steps = tl.minimum(STEPS, K // 128 - step)
    words_at = words_ptr + row[:, None] * (K // 8) + step * 16 + tl.arange(0, 16)[None, :]
    scales_at = scales_ptr + row * (K // 128) + step
    x_at = x_ptr + token[:, None].to(tl.int64) * K + step * 128 + tl.arange(0, 128)[None, :]

    words = tl.load(words_at, eviction_policy="evict_first")
    scales = tl.load(scales_at)
    if AHEAD == 2:
        words_after = tl.load(words_at + 16, mask=steps > 1, other=0, eviction_policy="evict_first")
        scales_after = tl.load(scales_at + 1, mask=steps > 1, other=0)
    total = tl.zeros((BLOCK_N, TOKENS), tl.float32)
    for i in tl.range(0, STEPS, loop_unroll_factor=UNROLL):
        more = i + AHEAD < steps
        words_new = tl.load(words_at + (i + AHEAD) * 16, mask=more, other=0, eviction_policy="evict_first")
        scales_new = tl.load(scales_at + i + AHEAD, mask=more, other=0)
        x = tl.load(x_at + i * 128, mask=(token[:, None] < m) & (i < steps), other=0.0)
        left = _weight_operand(words, scales, ROWS, WARPS, SMALL_SCALES)
        right = _token_operand(x, TOKENS)
        if INTERPRETED:
            total += tl.dot(left.to(tl.float32), right.to(tl.float32))
        else:
            total = tl.dot(left, right, total)
        if AHEAD == 2:
            words, scales = words_after, scales_after
            words_after, scales_after = words_new, scales_new
        else:
            words, scales = words_new, scales_new
    _store(out_ptr, total, first_row, token, split, m, n, SPLITS, BLOCK_N, ADD)


@triton.jit
def _store(
    out_ptr, total, first_row, token, split, m, n, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, ADD: tl.constexpr
):  # fmt: skip
    """Write a tile [N', M'] of sums: to its part of [SPLITS, M, N], or where there is one split to the result."""
    column = first_row + tl.arange(0, BLOCK_N)
    inside = (token[None, :] < m) & (column[:, None] < n)
    at = out_ptr + token[None, :].to(tl.int64) * n + column[:, None]
    if SPLITS > 1:
        tl.store(at + split.to(tl.int64) * m * n, total, mask=inside)
    else:
        if ADD:
            total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        tl.store(at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _reduce_kernel(
    parts_ptr, out_ptr, size, SPLITS: tl.constexpr, ADD: tl.constexpr, REDUCE: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * REDUCE + tl.arange(0, REDUCE)
    inside = at < size
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()  # until the parts are there
    total = tl.zeros((REDUCE,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + at + split * size, mask=inside, other=0.0)
    if ADD:
        total += tl.load(out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def fits(x: Tensor, packed: Tensor, scales: Tensor) -> bool:
    """Whether the kernel takes these contiguous tensors: bfloat16, K a multiple of 128, addresses as its loads need them."""
    aligned = x.data_ptr() % 16 == packed.data_ptr() % 16 == scales.data_ptr() % 4 == 0
    return x.dtype == torch.bfloat16 and packed.shape[1] % (plan.STEP // 2) == 0 and aligned


def product(
    x: BFloat16[Tensor, "m k"],
    packed: UInt8[Tensor, "n half_k"],
    scales: UInt8[Tensor, "n blocks"],
    out: BFloat16[Tensor, "m n"],
    cut: plan.Launch,
    *,
    add: bool,
    small_scales: bool,
) -> None:
    """out = x W^T, or out += x W^T, sums in float32. All tensors are contiguous, and `fits` holds.

    Partial sums are added in a fixed order: equal inputs give equal bits.
    """
    (m, k), n = x.shape, packed.shape[0]
    few = cut.tokens <= plan.FEW
    alone = cut.splits == 1 and not few
    parts = out if alone else torch.empty(cut.splits, m, n, dtype=torch.float32, device=x.device)
    if few:
        triton_few.sums(x, packed, scales, parts, cut, small_scales=small_scales)
    else:
        tile = cut.tile
        _product_kernel[(triton.cdiv(n, tile.block_n), cut.splits, triton.cdiv(m, cut.tokens))](
            x, packed.view(torch.int32), scales.view(torch.int32), parts, m, n,
            K=k, STEPS=cut.steps, SPLITS=cut.splits, BLOCK_N=tile.block_n, TOKENS=cut.tokens, WARPS=tile.warps,
            AHEAD=tile.ahead, UNROLL=tile.unroll, SMALL_SCALES=small_scales, ADD=add, num_warps=tile.warps, num_stages=1,
        )  # fmt: skip
    if not alone:
        options = triton_few.early_start(x.device) if few else {"EARLY": False}
        _reduce_kernel[(triton.cdiv(m * n, REDUCE),)](parts, out, m * n, SPLITS=cut.splits, ADD=add, REDUCE=REDUCE, **options)
