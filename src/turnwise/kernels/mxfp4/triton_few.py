"""Up to 16 tokens times a quantised weight, in Triton: one part of K a program, whose tokens and scales lie in shared memory.

A warp computes 16 outputs for 8 or 16 tokens with `mma.sync` m16n8k16, the weight as the left operand. What hides the latency of
memory is the number of warps, 32 a multiprocessor, so registers are few and weights are loaded one step
ahead; where there is one program a multiprocessor, up to three.

A step is 128 codes along K. Thread (g, p) of a warp, g = lane // 4 and p = lane % 4, loads 16 bytes of row g and of row g + 8:
block p, words 0 to 3. Product (h, j) of a step, h in 0, 1 and j in 0 to 3, takes of each thread the codes j and j + 4, which are
decoded together, of words 2 h and 2 h + 1: for the instruction these are k = 2 p, 2 p + 1 and k = 2 p + 8, 2 p + 9. Tokens lie
in shared memory in the order in which threads need them, 16 bytes a load, an operand's registers side by side, and scales as
bfloat16, those of rows g and g + 8 side by side (`triton_deal`). Through the first-level cache, which has the same bandwidth, a
product with 8192 x 8192 weights takes 2 us longer: there the scales of a step are 4 bytes of a line.
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

from turnwise.kernels.mxfp4 import plan, triton_shared
from turnwise.kernels.mxfp4.triton_codes import INTERPRETED, scaled_pairs
from turnwise.kernels.mxfp4.triton_deal import DEALT, deal_scales, deal_tokens, four, rows, zipped

TOKENS = 8  # of one product
REGISTERS = 65536  # of a multiprocessor

PRODUCT = tl.constexpr(
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
)

LOAD_WORDS = tl.constexpr(
    "{ .reg .pred inside; setp.ne.b32 inside, $5, 0; @inside ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4]; }"
)


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
def _load(words_at, step, mask):
    """Four words a thread, uint32, of a row at a step, past the first-level cache. Anything where the mask is not set."""
    if INTERPRETED:
        return four(tl.load(words_at[:, None] + step * 16 + tl.arange(0, 4)[None, :], mask=mask[:, None], other=0))
    else:
        return tl.inline_asm_elementwise(
            LOAD_WORDS, "=r,=r,=r,=r,l,r", [(words_at + step * 16).to(tl.int64), mask.to(tl.int32)],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _step(scratch, sums, upper_words, lower_words, x_at, scales_at, TILES: tl.constexpr, SMALL_SCALES: tl.constexpr):
    """`sums`, four for each tile of tokens, plus those of one step of rows g (upper) and g + 8."""
    scales = triton_shared.load(scratch, scales_at)
    upper_scale, lower_scale = zipped(scales, scales)
    for h in tl.static_range(2):
        for half in tl.static_range(2):
            x = ()
            for tile in tl.static_range(TILES):
                x = x + (triton_shared.load_four(scratch, x_at + (tile * DEALT + (h * 2 + half) * 512)),)
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
    x_ptr, words_ptr, scales_ptr, parts_ptr, scratch, m, n,
    K: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, TILES: tl.constexpr,
    WARPS: tl.constexpr, AHEAD: tl.constexpr, SMALL_SCALES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Sums over one part of K, of 16 outputs a warp: float32 [splits, M, N] of words [N, K / 8] and scales [N, K / 128].

    Under EARLY it begins while the kernel before it runs, and reads weights before it waits. That kernel may have made x; it must
    not have made the weight, unless it is one that lets nothing begin before its end.

    """
    if EARLY:
        gdc_launch_dependents()
    split, thread = tl.program_id(0), tl.arange(0, WARPS * 32)
    first_row, first_step = tl.program_id(1) * (16 * WARPS), split * STEPS
    steps = STEPS if EVEN else tl.minimum(STEPS, K // 128 - first_step)
    warp, lane = thread // 32, thread % 32
    row, place = first_row + warp * 16 + lane // 4, lane % 4
    upper_row, lower_row = rows(row, n, WHOLE)
    words_at = words_ptr + first_step * 16 + place * 4
    upper_words, lower_words = words_at + upper_row * (K // 8), words_at + lower_row * (K // 8)
    tokens = triton_shared.declared(thread)
    scales = tokens + STEPS * TILES * DEALT

    deal_scales(scratch, scales, thread, scales_ptr, first_row, first_step, steps, n, K, STEPS, WHOLE, SMALL_SCALES)
    every, words = thread >= 0, ()
    for step in tl.static_range(AHEAD):
        mask = every & (step < steps)
        words = words + (_load(upper_words, step, mask), _load(lower_words, step, mask))
    if EARLY:
        gdc_wait()  # until the tokens are there
    deal_tokens(scratch, tokens, thread, x_ptr, first_step, steps, m, K, STEPS, TILES)
    triton_shared.barrier()

    zero = tl.zeros((WARPS * 32,), tl.float32)
    sums = ()
    for _ in tl.static_range(TILES):
        sums = sums + ((zero, zero, zero, zero),)
    for i in tl.range(0, STEPS, loop_unroll_factor=STEPS):
        mask = every & (i + AHEAD < steps)
        words = words + (_load(upper_words, i + AHEAD, mask), _load(lower_words, i + AHEAD, mask))
        x_at, scales_at = tokens + i * (TILES * DEALT) + lane * 16, scales + (warp * STEPS + i) * 128 + lane * 4
        sums = _step(scratch, sums, words[0], words[1], x_at, scales_at, TILES, SMALL_SCALES)
        words = words[2:]
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
    """Write the sums of each part of K, which are to be added. Tensors as `triton_product.product` takes them, m up to 16.

    Raises:
        ValueError: a part of K is too long for shared memory.

    """
    (m, k), n, tile = x.shape, packed.shape[0], cut.tile
    outputs, tiles = 16 * tile.warps, cut.tokens // TOKENS
    needed = cut.steps * (tiles * DEALT.value + tile.warps * 128)
    if needed > triton_shared.SHARED:
        raise ValueError(f"tokens and scales of {cut} need {needed} bytes of shared memory, of {triton_shared.SHARED}")
    _sums_kernel[(cut.splits, triton.cdiv(n, outputs))](
        x.view(torch.int32), packed.view(torch.int32), scales.view(torch.int32), parts, triton_shared.scratch(x.device), m, n,
        K=k, STEPS=cut.steps, EVEN=k // plan.STEP == cut.splits * cut.steps, WHOLE=n % outputs == 0, TILES=tiles,
        WARPS=tile.warps, AHEAD=tile.ahead, SMALL_SCALES=small_scales, num_warps=tile.warps, num_stages=1,
        maxnreg=registers(tile), **early_start(x.device),
    )  # fmt: skip


def registers(tile: plan.Tile) -> int:
    """What a thread may have. Told so, the compiler loads further ahead."""
    return REGISTERS // (32 * tile.warps * tile.resident)


@functools.cache
def early_start(device: torch.device) -> dict[str, bool]:
    """Options of a kernel that begins, where the GPU is Hopper or later, before the one that it waits for has ended."""
    early = not INTERPRETED.value and torch.cuda.get_device_capability(device)[0] >= 9
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}
