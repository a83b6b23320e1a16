"""Shared memory that a Triton program addresses itself, which the language has no words for.

One piece of SHARED bytes a program, declared in PTX. Addresses are bytes, int32 for each thread. Triton's interpreter knows no
inline assembly: there a tensor of as many bytes, `scratch`, stands in, one for all programs, since they run one after the other.
"""
# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportMissingImports=false

import functools

import torch
import triton
import triton.language as tl

from turnwise.kernels.mxfp4.triton_codes import INTERPRETED

SHARED = 48 * 1024  # what a kernel may declare without asking the driver for more

DECLARE = tl.constexpr(f"{{ .shared .align 16 .b8 piece[{SHARED}]; mov.u32 $0, piece; }}")
STORE_FOUR = tl.constexpr(
    "{ .reg .pred inside; setp.ne.b32 inside, $6, 0; @inside st.shared.v4.b32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0; }"
)
LOAD = tl.constexpr("ld.shared.b32 $0, [$1];")
LOAD_FOUR = tl.constexpr("ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];")


@functools.cache
def scratch(device: torch.device) -> torch.Tensor:
    """What kernels that use these functions take as `scratch`."""
    return torch.empty(SHARED // 4 if INTERPRETED.value else 0, dtype=torch.int32, device=device)


@triton.jit
def declared(thread):
    """Address of the piece, for each thread. To be called once in a kernel, or there will be two."""
    if INTERPRETED:
        return thread * 0
    else:
        return tl.inline_asm_elementwise(DECLARE, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def store_four(scratch, at, first, second, third, fourth, inside):
    """Write four uint32 a thread, where `inside`, at addresses that 16 divides."""
    if INTERPRETED:
        tl.store(scratch + at // 4, first.to(tl.int32, bitcast=True), mask=inside)
        tl.store(scratch + at // 4 + 1, second.to(tl.int32, bitcast=True), mask=inside)
        tl.store(scratch + at // 4 + 2, third.to(tl.int32, bitcast=True), mask=inside)
        tl.store(scratch + at // 4 + 3, fourth.to(tl.int32, bitcast=True), mask=inside)
    else:
        tl.inline_asm_elementwise(
            STORE_FOUR, "=r,r,r,r,r,r,r", [at, first, second, third, fourth, inside.to(tl.int32)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def load(scratch, at):
    """uint32 of each thread, from an address that 4 divides."""
    if INTERPRETED:
        return tl.load(scratch + at // 4).to(tl.uint32, bitcast=True)
    else:
        return tl.inline_asm_elementwise(LOAD, "=r,r", [at], dtype=tl.uint32, is_pure=False, pack=1)


@triton.jit
def load_four(scratch, at):
    """Four uint32 of each thread, from addresses that 16 divides."""
    if INTERPRETED:
        first, second = load(scratch, at), load(scratch, at + 4)
        return first, second, load(scratch, at + 8), load(scratch, at + 12)
    else:
        return tl.inline_asm_elementwise(
            LOAD_FOUR, "=r,=r,=r,=r,r", [at], dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=False, pack=1
        )


@triton.jit
def barrier():
    """Until all threads of the program are here, and see what the others wrote."""
    if not INTERPRETED:
        tl.debug_barrier()
