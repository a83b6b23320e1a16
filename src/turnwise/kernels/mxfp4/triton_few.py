"""Up to 16 tokens times a quantised weight, in Triton: many small programs without shared memory or barriers.

A warp computes 16 outputs for 8 or 16 tokens with `mma.sync` m16n8k16, the weight as the left operand. What hides the latency of
memory is the number of warps, 32 a multiprocessor, so registers are few and hardly anything is loaded ahead. Programs that run on
one multiprocessor have the same part of K: its tokens stay in the first-level cache, where those of all K would not.

A step is 128 codes along K. Thread (g, p) of a warp, g = lane // 4 and p = lane % 4, loads 16 bytes of row g and of row g + 8:
block p, words 0 to 3. Product (h, j) of a step, h in 0, 1 and j in 0 to 3, takes of each thread the codes j and j + 4, which are
decoded together, of words 2 h and 2 h + 1: for the instruction these are k = 2 p, 2 p + 1 and k = 2 p + 8, 2 p + 9. Tokens are
dealt out beforehand into the order in which threads need them, 16 bytes a load, an operand's registers side by side.
"""
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false, reportIndexIssue=false, reportPossiblyUnboundVariable=false
# ruff: noqa: RUF005 (Triton unpacks no tuple within another)

import functools

import torch
import triton
import triton.language as tl
from jaxtyping import BFloat16, Float32, UInt8
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from turnwise.kernels.mxfp4 import plan
from turnwise.kernels.mxfp4.triton_codes import INTERPRETED, scale_pairs, scaled_pairs

TOKENS = 8  # of one product
DEALT = tl.constexpr(512)  # words, of two values each, of 8 tokens in a step

PRODUCT = tl.constexpr(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)


@triton.jit(do_not_specialize=["m"])
def _deal_kernel(x_ptr, dealt_ptr, m, K: tl.constexpr, TILES: tl.constexpr, EARLY: tl.constexpr):
    """Tokens [m, K] as [K / 128, TILES, h, j // 2, lane, (j % 2, word)] of pairs (k, k + 4); tokens that are not there are 0."""
    if EARLY:
        gdc_wait()  # for the tokens, and for weights, which the other kernel reads before it waits for this one
        gdc_launch_dependents()
    step, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    at = tl.arange(0, DEALT)
    lane, j = at // 4 % 32, at // 128 % 2 * 2 + at // 2 % 2
    word = at // 256 * 2 + at % 2
    token = tile * 8 + lane // 4
    first = x_ptr + token.to(tl.int64) * K + step * 128 + lane % 4 * 32 + word * 8 + j
    lower = tl.load(first, mask=token < m, other=0.0).to(tl.uint16, bitcast=True).to(tl.uint32)
    upper = tl.load(first + 4, mask=token < m, other=0.0).to(tl.uint16, bitcast=True).to(tl.uint32)
    tl.store(dealt_ptr + tl.program_id(0) * DEALT + at, (lower | upper << 16).to(tl.int32, bitcast=True))


@triton.jit
def _four(words):
    """Four uint32 [threads] of int32 [threads, 4]."""
    even, odd = tl.split(tl.reshape(words.to(tl.uint32, bitcast=True), (words.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _halves(pairs, A: tl.constexpr, B: tl.constexpr):
    """float32 [warps, A, B, 4], lower and upper, of bfloat16 pairs [threads]; either A or B is 8."""
    pairs = tl.reshape(pairs, (pairs.shape[0] // 32, A, B, 4))
    return (pairs << 16).to(tl.float32, bitcast=True), (pairs & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _dot(a, b):
    """What a product adds for one row a thread holds codes of: columns 2 p and 2 p + 1 [threads], of a k pair in a and b."""
    a_lower, a_upper = _halves(a, 8, 1)
    b_lower, b_upper = _halves(b, 1, 8)
    total = tl.sum(a_lower * b_lower + a_upper * b_upper, axis=3)  # [warps, row g, column]
    return tl.split(tl.reshape(total, (a.shape[0], 2)))


@triton.jit
def _product(c, a0, a1, a2, a3, b0, b1):
    """Four float32 c [threads] plus a product of 16 rows, 16 k and 8 tokens, spread over each warp as the instruction has it."""
    if INTERPRETED:
        first, second = _dot(a0, b0), _dot(a2, b1)
        third, fourth = _dot(a1, b0), _dot(a3, b1)
        return (
            c[0] + first[0] + second[0], c[1] + first[1] + second[1], c[2] + third[0] + fourth[0], c[3] + third[1] + fourth[1]
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            PRODUCT, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [a0, a1, a2, a3, b0, b1, c[0], c[1], c[2], c[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _load(words_at, scales_at, step, mask):
    """Words [threads, 4] and scales [threads] of a row at a step."""
    words = tl.load(words_at[:, None] + step * 16 + tl.arange(0, 4)[None, :], mask=mask, other=0, eviction_policy="evict_first")
    return words, tl.load(scales_at + step * 4, mask=mask, other=0)


@triton.jit
def _step(sums, upper, lower, x_at, TILES: tl.constexpr, SMALL_SCALES: tl.constexpr):
    """`sums`, four for each tile of tokens, plus those of one step of rows g (upper) and g + 8."""
    upper_words, lower_words = _four(upper[0]), _four(lower[0])
    upper_scale = scale_pairs(upper[1].to(tl.uint32), SMALL_SCALES)
    lower_scale = scale_pairs(lower[1].to(tl.uint32), SMALL_SCALES)
    for h in tl.static_range(2):
        for half in tl.static_range(2):
            x = ()
            for tile in tl.static_range(TILES):
                at = x_at[:, None] + tile * DEALT + (h * 2 + half) * 128 + tl.arange(0, 4)[None, :]
                x = x + (_four(tl.load(at)),)
            for odd in tl.static_range(2):
                a0 = scaled_pairs(upper_words[2 * h], 2 * half + odd, upper_scale, SMALL_SCALES, True)
                a1 = scaled_pairs(lower_words[2 * h], 2 * half + odd, lower_scale, SMALL_SCALES, True)
                a2 = scaled_pairs(upper_words[2 * h + 1], 2 * half + odd, upper_scale, SMALL_SCALES, True)
                a3 = scaled_pairs(lower_words[2 * h + 1], 2 * half + odd, lower_scale, SMALL_SCALES, True)
                new = ()
                for tile in tl.static_range(TILES):
                    new = new + (_product(sums[tile], a0, a1, a2, a3, x[tile][2 * odd], x[tile][2 * odd + 1]),)
                sums = new
    return sums


@triton.jit
def _store(parts_ptr, sums, split, row, place, m, n, TILES: tl.constexpr):
    """Write a thread's sums, of rows g and g + 8 and tokens 2 p and 2 p + 1 of each tile, to their part of [splits, M, N]."""
    for tile in tl.static_range(TILES):
        token = tile * 8 + place * 2
        at = parts_ptr + (split * m + token).to(tl.int64) * n + row
        tl.store(at, sums[tile][0], mask=(token < m) & (row < n))
        tl.store(at + n, sums[tile][1], mask=(token + 1 < m) & (row < n))
        tl.store(at + 8, sums[tile][2], mask=(token < m) & (row + 8 < n))
        tl.store(at + n + 8, sums[tile][3], mask=(token + 1 < m) & (row + 8 < n))


@triton.jit(do_not_specialize=["m"])
def _sums_kernel(
    dealt_ptr, words_ptr, scales_ptr, parts_ptr, m, n,
    K: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, TILES: tl.constexpr, WARPS: tl.constexpr,
    UNROLL: tl.constexpr, SMALL_SCALES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Sums over one part of K, of 16 outputs a warp: float32 [splits, M, N] of words [N, K / 8] and scales [N, K / 32]."""
    if EARLY:
        gdc_launch_dependents()
    split, thread = tl.program_id(0), tl.arange(0, WARPS * 32)
    row = tl.program_id(1) * (16 * WARPS) + thread // 32 * 16 + thread % 32 // 4
    place, first_step = thread % 4, split * STEPS
    steps = STEPS if EVEN else tl.minimum(STEPS, K // 128 - first_step)

    upper_row = row.to(tl.int64) if WHOLE else tl.minimum(row, n - 1).to(tl.int64)
    lower_row = upper_row + 8 if WHOLE else tl.minimum(row + 8, n - 1).to(tl.int64)
    words_at = words_ptr + first_step * 16 + place * 4
    scales_at = scales_ptr + first_step * 4 + place
    upper_words, lower_words = words_at + upper_row * (K // 8), words_at + lower_row * (K // 8)
    upper_scales, lower_scales = scales_at + upper_row * (K // 32), scales_at + lower_row * (K // 32)
    x_at = dealt_ptr + first_step * (TILES * DEALT) + thread % 32 * 4

    zero = tl.zeros((WARPS * 32,), tl.float32)
    sums = ()
    for _ in tl.static_range(TILES):
        sums = sums + ((zero, zero, zero, zero),)
    upper, lower = _load(upper_words, upper_scales, 0, True), _load(lower_words, lower_scales, 0, True)
    if EARLY:
        gdc_wait()  # until the tokens are dealt
    for i in tl.range(0, steps, loop_unroll_factor=UNROLL):
        upper_new = _load(upper_words, upper_scales, i + 1, i + 1 < steps)
        lower_new = _load(lower_words, lower_scales, i + 1, i + 1 < steps)
        sums = _step(sums, upper, lower, x_at + i * (TILES * DEALT), TILES, SMALL_SCALES)
        upper, lower = upper_new, lower_new

    _store(parts_ptr, sums, split, row, place, m, n, TILES)


def sums(
    x: BFloat16[Tensor, "m k"],
    packed: UInt8[Tensor, "n half_k"],
    scales: UInt8[Tensor, "n blocks"],
    parts: Float32[Tensor, "splits m n"],
    cut: plan.Launch,
    *,
    small_scales: bool,
) -> None:
    """Write the sums of each part of K, which are to be added. Tensors as `triton_product.product` takes them, m up to 16."""
    (m, k), n = x.shape, packed.shape[0]
    steps, tiles, early = k // plan.STEP, cut.tokens // TOKENS, starts_early(x.device)
    rows = 16 * cut.tile.warps
    dealt = torch.empty(steps * tiles * DEALT.value, dtype=torch.int32, device=x.device)
    options = {"launch_pdl": True} if early else {}
    _deal_kernel[(steps * tiles,)](x, dealt, m, K=k, TILES=tiles, EARLY=early, num_warps=4, **options)
    _sums_kernel[(cut.splits, triton.cdiv(n, rows))](
        dealt, packed.view(torch.int32), scales, parts, m, n,
        K=k, STEPS=cut.steps, EVEN=steps == cut.splits * cut.steps, WHOLE=n % rows == 0, TILES=tiles,
        WARPS=cut.tile.warps, UNROLL=cut.tile.unroll, SMALL_SCALES=small_scales, EARLY=early,
        num_warps=cut.tile.warps, num_stages=1, **options,
    )  # fmt: skip


@functools.cache
def starts_early(device: torch.device) -> bool:
    """Whether a kernel may begin before the one that it waits for has ended, as Hopper's and later GPUs allow."""
    return not INTERPRETED.value and torch.cuda.get_device_capability(device)[0] >= 9
