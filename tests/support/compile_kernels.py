"""Compile the MXFP4 kernels for a Hopper GPU, which needs none, and print as JSON what they became.

For each kernel: registers a thread, bytes of stack and of shared memory, and its instructions by name, of the loops alone for the
product.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from turnwise.kernels.mxfp4 import plan, triton_dequantize, triton_few, triton_product, triton_quantize

HOPPER = GPUTarget("cuda", 90, 32)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WAIT = "ACQBULK"  # griddepcontrol.wait
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], *, warps: int, loops: bool = False, **options: int
) -> dict[str, Any]:
    """Resources and instructions of a kernel for arguments that lie at multiples of 16, and those before it waits for another."""
    signature = types | dict.fromkeys(constants, "constexpr")
    names = [name for name, kind in types.items() if kind.startswith("*") or name in ("n", "total", "blocks")]
    aligned = {(list(signature).index(name),): [["tt.divisibility", 16]] for name in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    result = triton.compile(source, target=HOPPER, options={"num_warps": warps, "num_stages": 1, **options})
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(result.asm["cubin"])
        usage = run("cuobjdump", "-res-usage", cubin)
        lines = run("nvdisasm", "-c", cubin).splitlines()
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    found = [match.group(1) for line in (inside_loops(lines) if loops else lines) if (match := INSTRUCTION.search(line))]
    before = found[: found.index(WAIT)] if WAIT in found else []
    shared = numbers["SHARED"] + result.metadata.shared
    return {**numbers, "shared": shared, "instructions": Counter(found), "before_waiting": before}


def run(tool: str, *arguments: Any) -> str:
    command = [str(TOOLS / tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def inside_loops(lines: list[str]) -> list[str]:
    """Lines between a label and a jump back to it, but for the endless loop at the end of each kernel."""
    labels = {match.group(1): i for i, line in enumerate(lines) if (match := re.match(r"(\.L_x_\d+):", line))}
    jumps = [
        (labels.get(match.group(1), i), i) for i, line in enumerate(lines) if (match := re.search(r"BRA.*`\((\.L_x_\d+)\)", line))
    ]
    return [line for start, end in jumps if end - start > 8 for line in lines[start : end + 1]]


def few(m: int, small_scales: bool) -> dict[str, Any]:
    cut = plan.launch(m, 8192, 8192, multiprocessors=132)
    types = {"x_ptr": "*i32", "words_ptr": "*i32", "scales_ptr": "*i32", "parts_ptr": "*fp32", "scratch": "*i32"}
    types |= {"m": "i32", "n": "i32"}
    constants = {
        "K": 8192, "STEPS": cut.steps, "EVEN": True, "WHOLE": True, "TILES": cut.tokens // triton_few.TOKENS,
        "WARPS": cut.tile.warps, "AHEAD": cut.tile.ahead, "SMALL_SCALES": small_scales, "EARLY": True,
    }  # fmt: skip
    registers = triton_few.registers(cut.tile)
    return measured(compiled(triton_few._sums_kernel, types, constants, warps=cut.tile.warps, maxnreg=registers), cut.tile)


def product(m: int, small_scales: bool) -> dict[str, Any]:
    if m <= plan.FEW:
        return few(m, small_scales)
    cut = plan.launch(m, 8192, 8192, multiprocessors=132)
    tile = cut.tile
    types = {"x_ptr": "*bf16", "words_ptr": "*i32", "scales_ptr": "*i32", "out_ptr": "*fp32", "m": "i32", "n": "i32"}
    constants = {
        "K": 8192, "STEPS": cut.steps, "SPLITS": cut.splits, "BLOCK_N": tile.block_n, "TOKENS": cut.tokens, "WARPS": tile.warps,
        "AHEAD": tile.ahead, "UNROLL": tile.unroll, "SMALL_SCALES": small_scales, "ADD": False,
    }  # fmt: skip
    return measured(compiled(triton_product._product_kernel, types, constants, warps=tile.warps, loops=True), tile)


def measured(code: dict[str, Any], tile: plan.Tile) -> dict[str, Any]:
    """`code` with what it is held against: weights that its loop decodes a thread, programs that fit on a multiprocessor."""
    threads = 32 * tile.warps
    registers, shared = threads * -(-code["REG"] // 8) * 8, max(code["shared"], 1024)
    fitting = min(triton_few.REGISTERS // registers, 227 * 1024 // shared, 2048 // threads)
    planned = {"weights_per_thread": tile.block_n * plan.STEP * tile.unroll // threads, "resident_planned": tile.resident}
    return code | planned | {"resident": fitting}


def main() -> None:
    report = {
        "dequantize": compiled(
            triton_dequantize._dequantize_kernel,
            {"words_ptr": "*i32", "scales_ptr": "*u8", "out_ptr": "*i32", "total": "i32"},
            {"LANES": triton_dequantize.LANES, "TURNS": triton_dequantize.TURNS},
            warps=triton_dequantize.WARPS,
        ),
        "quantize": compiled(
            triton_quantize._quantize_kernel,
            {"weight_ptr": "*bf16", "words_ptr": "*i32", "scales_ptr": "*u8", "blocks": "i32"},
            {"ADDEND": 0, "BLOCKS": triton_quantize.BLOCKS},
            warps=triton_quantize.WARPS,
        ),
        "reduce": compiled(
            triton_product._reduce_kernel,
            {"parts_ptr": "*fp32", "out_ptr": "*bf16", "size": "i32"},
            {"SPLITS": 4, "ADD": True, "REDUCE": triton_product.REDUCE, "EARLY": True},
            warps=4,
        ),
        **{f"product{m}": product(m, small_scales=True) for m in plan.TILES},
        "product16_large": product(16, small_scales=False),
        "product32_large": product(32, small_scales=False),
    }
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
