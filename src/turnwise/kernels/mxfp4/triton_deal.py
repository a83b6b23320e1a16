"""A program's tokens and scales, put into shared memory in the order in which the threads of `triton_few` need them."""
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false
# ruff: noqa: RUF005 (Triton unpacks no tuple within another)

import triton
import triton.language as tl

from turnwise.kernels.mxfp4 import triton_shared
from turnwise.kernels.mxfp4.triton_codes import scale_pairs

DEALT = tl.constexpr(2048)  # bytes of 8 tokens in a step


@triton.jit
def four(words):
    """Four uint32 [threads] of int32 [threads, 4]."""
    even, odd = tl.split(tl.reshape(words.to(tl.uint32, bitcast=True), (words.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def zipped(a, b):
    """Lower halves of two uint32 as one, and upper halves."""
    return (a & 0xFFFF) | (b << 16), (a >> 16) | (b & 0xFFFF0000)


@triton.jit
def rows(row, n, WHOLE: tl.constexpr):
    """A row and the eighth after it, int64; the last, where there are none."""
    if WHOLE:
        return row.to(tl.int64), row.to(tl.int64) + 8
    else:
        return tl.minimum(row, n - 1).to(tl.int64), tl.minimum(row + 8, n - 1).to(tl.int64)


@triton.jit
def deal_tokens(scratch, to, thread, x_ptr, first_step, steps, m, K: tl.constexpr, STEPS: tl.constexpr, TILES: tl.constexpr):
    """Write tokens [m, K / 2], pairs, as [STEPS, TILES, h, j // 2, lane, (j % 2, word)] of pairs (k, k + 4).

    What is beyond m and steps is 0. A thread takes 16 values of a token at a time, two words of a block; eight neighbours write
    128 bytes side by side.

    """
    ITEMS: tl.constexpr = STEPS * TILES * 64
    for turn in tl.static_range((ITEMS + thread.shape[0] - 1) // thread.shape[0]):
        item = turn * thread.shape[0] + thread
        place, h, step = item % 4, item // 8 % 2, item // 16 % STEPS
        token = item // (16 * STEPS) * 2 + item // 4 % 2
        at = x_ptr + token.to(tl.int64) * (K // 2) + (first_step + step) * 64 + place * 16 + h * 8
        at, mask = at[:, None] + tl.arange(0, 4)[None, :], ((token < m) & (step < steps))[:, None]
        even, odd = four(tl.load(at, mask=mask, other=0)), four(tl.load(at + 4, mask=mask, other=0))
        address = to + (((step * TILES + token // 8) * 4 + h * 2) * 32 + token % 8 * 4 + place) * 16
        for half in tl.static_range(2):  # codes 0 and 1, then 2 and 3, each with the one four further
            first, second = zipped(even[half], even[half + 2]), zipped(odd[half], odd[half + 2])
            triton_shared.store_four(scratch, address + half * 512, first[0], second[0], first[1], second[1], item < ITEMS)


@triton.jit
def deal_scales(
    scratch, to, thread, scales_ptr, first_row, first_step, steps, n,
    K: tl.constexpr, STEPS: tl.constexpr, WHOLE: tl.constexpr, SMALL_SCALES: tl.constexpr,
):  # fmt: skip
    """Write scales [n, K / 128], four blocks a word, as [warp, STEPS, lane] of two bfloat16: of rows g and g + 8."""
    ITEMS: tl.constexpr = thread.shape[0] // 4 * STEPS  # two words each
    for turn in tl.static_range((STEPS + 3) // 4):
        item = turn * thread.shape[0] + thread
        step = item // 8 % STEPS
        mask = (item < ITEMS) & (step < steps)
        upper_row, lower_row = rows(first_row + item // (8 * STEPS) * 16 + item % 8, n, WHOLE)
        at = scales_ptr + first_step + step
        upper = tl.load(at + upper_row * (K // 128), mask=mask, other=0).to(tl.uint32, bitcast=True)
        lower = tl.load(at + lower_row * (K // 128), mask=mask, other=0).to(tl.uint32, bitcast=True)
        pairs = ()
        for block in tl.static_range(4):
            upper_scale = scale_pairs((upper >> (8 * block)) & 255, SMALL_SCALES)
            lower_scale = scale_pairs((lower >> (8 * block)) & 255, SMALL_SCALES)
            pairs = pairs + (zipped(upper_scale, lower_scale)[0],)
        triton_shared.store_four(scratch, to + item * 16, pairs[0], pairs[1], pairs[2], pairs[3], item < ITEMS)
