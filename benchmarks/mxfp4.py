"""MXFP4 on a GPU: dequantise, forward, dX and LoRA beside bfloat16 and other libraries. Runs on a CPU too, with small sizes.

    python benchmarks/mxfp4.py [--json FILE] [--peers none] [--time-limit 140]
    python benchmarks/mxfp4.py --measure-crossover      # prints the table for kernels/mxfp4/plan.py
    python benchmarks/mxfp4.py --tune --shapes 8192x8192     # the kernels cut up in other ways

Weights are rotated beyond the cache, tokens are random. Times are medians over replays of CUDA graphs; those that are compared,
such as bfloat16 and MXFP4, take turns. "copy" is one within the device, in the same run. What matters most is measured first: a
run that meets its time limit leaves out the rest and says so.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from _kernel_timing import Clock, Replay, copies, copy_bandwidth
from _mxfp4_lora import SHARING, adapted, plain
from _mxfp4_peers import PEERS, Product
from _mxfp4_report import AS_MANY, Results, lines, print_tables
from turnwise.kernels.mxfp4 import dequantize, mxfp4_product, mxfp4_product_dx, plan, quantize, quantize_unchecked

GPU_SHAPES, CPU_SHAPES = ["8192x8192", "4096x4096", "4096x11008"], ["256x256", "128x384"]
GPU_TOKENS, CPU_TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384], [1, 16, 128]
PEER_TOKENS = {1, 16, 64, 128, 512, 8192}
DX_TOKENS, LORA_TOKENS = {1024, 4096, 8192, 16384}, {4096, 8192}
CROSSOVER_TOKENS = [16, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 512]
TILES = [(64, 4, 1, 1, 6), (64, 4, 2, 1, 5), (64, 4, 2, 2, 4), (128, 8, 1, 1, 2), (128, 8, 2, 1, 2), (128, 4, 1, 1, 3)]
FEW_TILES = [(256, 16, 1, 8, 2), (128, 8, 1, 8, 4), (64, 4, 1, 8, 8)]  # for up to 16 tokens
DECODERS = [(4, 4), (4, 2), (4, 8), (8, 2), (8, 4), (2, 4)]  # warps, turns of a thread
BYTES = 0.53125  # of a weight in MXFP4

Packed = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Kind:
    """One way to compute something: a call for each of several operands, so that none of them is in the cache."""

    name: str
    call: Callable[[Any], object]
    operands: Sequence[Any]
    layers: int = 1  # that a call computes


class Bench:
    """One run: its clock, what it found, and operands to rotate."""

    def __init__(self, clock: Clock, results: Results) -> None:
        self.clock, self.results = clock, results
        results.bandwidth = copy_bandwidth(clock)

    def measure(self, part: str, nkm: tuple[int, int, int], *kinds: Kind) -> list[float | None]:
        """Seconds of a layer of each kind, measured in turns; None where the time is up or it fails, which is noted."""
        if self.clock.exhausted():
            self.results.left_out += len(kinds)
            return [None] * len(kinds)
        replays: dict[str, Replay] = {}
        for kind in kinds:
            try:
                replays[kind.name] = self.clock.prepared(kind.name, [partial(kind.call, operand) for operand in kind.operands])
            except Exception as error:  # a peer may fail in any way, and the others are measured all the same
                self.results.problems[f"{part}: {kind.name}, {nkm}"] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        seconds = dict(zip(replays, self.clock.medians(list(replays.values())), strict=True))
        n, k, m = nkm
        for kind in (kind for kind in kinds if kind.name in seconds):
            seconds[kind.name] /= kind.layers
            microseconds = seconds[kind.name] * 1e6
            self.results.rows.append({"part": part, "name": kind.name, "n": n, "k": k, "m": m, "microseconds": microseconds})
        return [seconds.get(kind.name) for kind in kinds]

    def weights(self, n: int, k: int, bytes_each: float) -> list[Tensor]:
        """So many bfloat16 weights that they, or what is made of them at `bytes_each` a weight, do not fit into the cache."""
        device = self.clock.device
        count = copies(int(n * k * bytes_each), device)
        return [torch.randn(n, k, dtype=torch.bfloat16, device=device).mul_(0.02) for _ in range(count)]

    def packed(self, n: int, k: int) -> list[Packed]:
        return [quantize(weight) for weight in self.weights(n, k, BYTES)]

    def rows(self, m: int, k: int) -> Tensor:
        return torch.randn(m, k, dtype=torch.bfloat16, device=self.clock.device)

    def some(self, wanted: set[int]) -> list[int]:
        """Numbers of tokens of this run among `wanted`, or else the largest."""
        return [m for m in self.results.tokens if m in wanted] or self.results.tokens[-1:]


def measure_conversion(bench: Bench, n: int, k: int, name: str = "mxfp4") -> None:
    pairs, moved = bench.packed(n, k), int((BYTES + 2) * n * k)
    sources = [torch.full((moved // 16,), 7, dtype=torch.int64, device=bench.clock.device) for _ in pairs]
    kept: dict[int, Tensor] = {}  # every result has memory of its own, or the cache would take the writes

    def decode(i: int) -> None:
        kept[i] = dequantize(*pairs[i])

    def copy(i: int) -> None:
        kept[~i] = torch.neg(sources[i])

    kinds = [Kind(kind, call, range(len(pairs))) for kind, call in ((name, decode), (AS_MANY, copy))]
    ours, as_many = bench.measure("dequantise", (n, k, 0), *kinds)
    if ours and as_many:
        of_copy, of_as_many = moved / ours / bench.results.bandwidth, as_many / ours
        bench.results.rows[-2].update({"of_copy": of_copy, "of_copy_of_as_many": of_as_many})
    if name == "mxfp4":
        bench.measure("quantise", (n, k, 0), Kind(name, quantize_unchecked, bench.weights(n, k, 2)))


def measure_products(bench: Bench, n: int, k: int) -> None:
    weights, pairs = bench.weights(n, k, 2), bench.packed(n, k)
    for m in bench.results.tokens:
        _forward(bench, (n, k, m), weights, pairs)
    for m in bench.some(DX_TOKENS):
        _dx(bench, (n, k, m), weights, pairs)


def _forward(bench: Bench, nkm: tuple[int, int, int], weights: list[Tensor], pairs: list[Packed]) -> None:
    x = bench.rows(nkm[2], nkm[1])
    plain = Kind("bf16", lambda weight: x @ weight.T, weights)
    bench.measure("forward", nkm, plain, Kind("mxfp4", partial(_product, x), pairs))


def _dx(bench: Bench, nkm: tuple[int, int, int], weights: list[Tensor], pairs: list[Packed]) -> None:
    grad = bench.rows(nkm[2], nkm[0])
    plain = Kind("bf16", lambda weight: grad @ weight, weights)
    bench.measure("dX", nkm, plain, Kind("mxfp4", lambda pair: mxfp4_product_dx(grad, *pair), pairs))


def measure_lora(bench: Bench, n: int, k: int) -> None:
    alone = [[pair] for pair in bench.packed(n, k)]
    layers = [pair for (pair,) in alone]
    shared = [layers[i : i + SHARING] for i in range(0, len(layers) - SHARING + 1, SHARING)]
    for m in bench.some(LORA_TOKENS):
        x, grad = bench.rows(m, k), bench.rows(m, n)
        for suffix, backward in (("forward", False), ("forward + backward", True)):
            step = adapted(x, grad, backward=backward)
            bench.measure(
                "LoRA r32",
                (n, k, m),
                Kind(f"none, {suffix}", plain(x, grad, backward=backward), alone),
                Kind(f"alone, {suffix}", step, alone),
                Kind(f"shared by 3, {suffix}", step, shared, SHARING),
            )


def measure_peer(bench: Bench, name: str, n: int, k: int) -> None:
    if bench.clock.exhausted():
        bench.results.left_out += 1
        return
    try:
        products = [PEERS[name](weight) for weight in bench.weights(n, k, BYTES)]
    except Exception as error:  # not installed, or not for this device
        bench.results.problems[name] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        return
    for m in bench.some(PEER_TOKENS):
        bench.measure("forward", (n, k, m), Kind(name, partial(_of_rows, bench.rows(m, k)), products))


def _of_rows(x: Tensor, product: Product) -> Tensor:
    return product(x)


def measure_crossover(bench: Bench, n: int, k: int) -> int:
    """Most tokens at which the fused product is faster than decoding and multiplying."""
    pairs, best = bench.packed(n, k), 0
    for m in CROSSOVER_TOKENS:
        x = bench.rows(m, k)
        kinds = [
            Kind(name, partial(_bounded, bound, x), pairs) for name, bound in (("fused", max(CROSSOVER_TOKENS)), ("decoded", 0))
        ]
        fused, decoded = bench.measure("crossover", (n, k, m), *kinds)
        if fused and decoded and fused <= decoded:
            best = m
    return best


def _bounded(bound: int, x: Tensor, pair: Packed) -> Tensor:
    """The product with another crossover, whatever the shape."""
    with mock.patch.dict(plan.CROSSOVERS, {(len(pair[0]), x.shape[1]): bound}):
        return _product(x, pair)


def _product(x: Tensor, pair: Packed) -> Tensor:
    return mxfp4_product(x, *pair, small_scales=True)


def tune(bench: Bench, n: int, k: int) -> None:
    """Dequantise with other programs, and the fused product with other tiles; the kernel that adds parts is in the time."""
    from turnwise.kernels.mxfp4 import triton_dequantize, triton_product

    for warps, turns in DECODERS:
        with mock.patch.multiple(triton_dequantize, WARPS=warps, LANES=32 * warps, TURNS=turns):
            measure_conversion(bench, n, k, f"{warps} warps, {turns} turns")
    multiprocessors = torch.cuda.get_device_properties(bench.clock.device).multi_processor_count
    pairs = bench.packed(n, k)
    for m in plan.TILES:
        x, out = bench.rows(m, k), bench.rows(m, n)
        for tile in FEW_TILES if m <= plan.FEW else TILES:
            cut = plan.launch(m, n, k, multiprocessors=multiprocessors, tile=plan.Tile(*tile))
            product = partial(_tuned, triton_product.product, x, out, cut)
            bench.measure("tile (outputs, warps, ahead, unroll, resident)", (n, k, m), Kind(str(tile), product, pairs))


def _tuned(product: Callable[..., None], x: Tensor, out: Tensor, cut: plan.Launch, pair: Packed) -> None:
    product(x, *pair, out, cut, add=False, small_scales=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", help="N x K of the weights, such as 4096x11008")
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--peers", nargs="+", default=["all"], choices=[*PEERS, "all", "none"])
    parser.add_argument("--measure-crossover", action="store_true")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--time-limit", type=float, default=140.0, help="seconds after which no new measurement begins")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.tune and not torch.cuda.is_available():
        parser.error("--tune needs a GPU: CPUs have no fused product")
    return arguments


@torch.no_grad()
def main() -> None:
    arguments = parse()
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    texts = arguments.shapes or (GPU_SHAPES if on_gpu else CPU_SHAPES)
    shapes = [(int(n), int(k)) for n, k in (text.split("x") for text in texts)]
    clock = Clock(torch.device("cuda" if on_gpu else "cpu"), arguments.time_limit)
    bench = Bench(clock, Results(shapes, arguments.tokens or (GPU_TOKENS if on_gpu else CPU_TOKENS)))
    crossovers: dict[str, int] = {}
    if arguments.measure_crossover:
        crossovers = {f"({n}, {k})": measure_crossover(bench, n, k) for n, k in shapes}
    elif arguments.tune:
        for n, k in shapes:
            tune(bench, n, k)
    else:
        for part in (measure_conversion, measure_products, measure_lora):
            for n, k in shapes:
                part(bench, n, k)
        for name in PEERS if "all" in arguments.peers else [name for name in PEERS if name in arguments.peers]:
            for n, k in shapes:
                measure_peer(bench, name, n, k)
    print_tables(bench.results)
    found = lines(bench.results, clock.uncaptured)
    if crossovers and not on_gpu:
        found.append("crossovers mean nothing on a CPU, which decodes for any number of tokens")
    found += [f"CROSSOVERS[{shape}] = {m}" for shape, m in crossovers.items()]
    print(*found, sep="\n")
    if arguments.json:
        device = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
        summary = {"device": device, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "lines": found}
        arguments.json.write_text(json.dumps(summary | {"rows": bench.results.rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
