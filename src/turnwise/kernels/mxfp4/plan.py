"""Which kernel computes a product on a GPU, and in what pieces. Plain arithmetic: no torch, no Triton."""

from dataclasses import dataclass, replace

STEP = 128  # codes along K that a program decodes at a time
CROSSOVER = 128  # tokens, where CROSSOVERS has no measurement; on an H200 the right one for all three shapes that were measured
CROSSOVERS: dict[tuple[int, int], int] = {}
"""Most tokens at which the fused product is the faster one, by (N, K) of the weight, where that is not CROSSOVER.

`benchmarks/mxfp4.py --measure-crossover` prints this table for a GPU. One pass over the weight serves 64 tokens; two passes are
still faster than decoding it into memory, three are not.
"""


@dataclass(frozen=True)
class Tile:
    """What a program of the fused product works on."""

    block_n: int  # outputs, a multiple of 16 * warps
    warps: int
    ahead: int  # steps whose weights are loaded before they are needed: 1 to 3, for `triton_product` 1 or 2
    unroll: int  # steps in the body of the loop; `triton_few` unrolls it whole
    resident: int  # programs that fit on a multiprocessor of a Hopper GPU, by their registers


FEW = 16  # tokens that `triton_few` multiplies, more are for `triton_product`
FEW_STEPS = 8  # of its programs, at most: 16 tokens and the scales of 256 outputs then fill 48 KB of shared memory
TILES = {
    8: Tile(block_n=256, warps=16, ahead=1, unroll=FEW_STEPS, resident=2),
    16: Tile(block_n=256, warps=16, ahead=1, unroll=FEW_STEPS, resident=2),
    32: Tile(block_n=128, warps=8, ahead=2, unroll=1, resident=2),
    64: Tile(block_n=128, warps=8, ahead=1, unroll=1, resident=2),
}
"""By tokens, padded. The first two were the fastest on an H200: 32 warps a multiprocessor, which are as many as 64 registers a
thread leave, in programs as large as shared memory allows. The others are chosen by the registers and instructions of the
compiled kernels: more tokens need more accumulators, and twice the outputs halve how often tokens are read.
"""


@dataclass(frozen=True)
class Launch:
    """How a fused product is cut up."""

    tile: Tile
    tokens: int  # of a program, padded
    splits: int  # programs along K, whose partial sums a second kernel adds
    steps: int  # steps along K of each of them


def crossover(n: int, k: int) -> int:
    """Tokens up to which a weight [n, k] is multiplied by the fused kernel; beyond, it is decoded for the vendor's product."""
    return CROSSOVERS.get((n, k), CROSSOVER)


def launch(m: int, n: int, k: int, *, multiprocessors: int, tile: Tile | None = None) -> Launch:
    """Pieces of the product of m tokens with a weight [n, k]."""
    tokens = next((size for size in TILES if m <= size), max(TILES))
    chosen = tile or TILES[tokens]
    steps = k // STEP
    tiles = -(-n // chosen.block_n) * -(-m // tokens)
    few = tokens <= FEW
    splits = _few_splits(tiles, steps, multiprocessors) if few else _splits(tiles, steps, multiprocessors, chosen.resident)
    each = -(-steps // splits)
    splits = -(-steps // each)
    if few and tile is None and tiles * splits <= multiprocessors:
        # With registers for more loads two do not fit on one multiprocessor, where GPUs put them while others have none.
        chosen = replace(chosen, ahead=min(3, -(-each // 2)), resident=1)
    return Launch(chosen, tokens, splits, each)


def _splits(tiles: int, steps: int, multiprocessors: int, resident: int) -> int:
    """Parts along K: all programs run at once, and every multiprocessor has about equally many steps."""
    choices = [count for count in range(1, steps + 1) if steps // count >= 2 or count == 1]
    fitting = [count for count in choices if tiles * count <= multiprocessors * resident] or [1]

    def duration(count: int) -> tuple[int, int]:
        busiest = -(-tiles * count // multiprocessors)  # programs of the multiprocessor with the most
        # With fewer than `resident` a multiprocessor waits for memory instead. Starting and writing sums costs about a step each.
        return max(busiest, resident) * (-(-steps // count) + 1), count

    return min(fitting, key=duration)


def _few_splits(tiles: int, steps: int, multiprocessors: int) -> int:
    """Parts along K for `triton_few`: short ones, with the least work for the multiprocessor that has the most.

    Of the cuts measured on an H200, for 16 tokens and six shapes from 4096x4096 to 28672x8192, this names the fastest of each.

    """
    shortest = -(-steps // FEW_STEPS)
    choices = [count for count in range(shortest, steps + 1) if steps // count >= 2 or count == shortest]

    def duration(count: int) -> tuple[int, int]:
        return -(-tiles * count // multiprocessors) * (-(-steps // count) + 1), count  # dealing costs about a step

    return min(choices, key=duration)
