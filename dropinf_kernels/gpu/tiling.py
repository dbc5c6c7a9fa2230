"""Tile shapes, warps, stages and splits from a problem and an architecture, by rule and without a device.

The rule is a deterministic function, so every rank of a job picks the same tiles.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from ..device import Arch

# Beyond this many partial results per sample the second stage costs more than an idle multiprocessor.
_MAX_SPLITS = 256
# The longest list that score_topk keeps per query on chip; a longer one takes the plain body.
MAX_TOP = 256
_BLOCKS = ((32, 32), (64, 64), (64, 128), (128, 64), (128, 128))


# A rule costs tens of microseconds, a call of a launcher not many more.
_remembered = functools.lru_cache(maxsize=1024)


@dataclass(frozen=True)
class OuterTile:
    """A program of an outer product: [block_t, block_o] x [block_t, block_i], one of `splits` ranges of positions."""

    block_o: int
    block_i: int
    block_t: int
    warps: int
    stages: int
    splits: int

    @property
    def resident(self) -> int:
        """Return how many programs a multiprocessor's registers must hold: one alone waits for each of its loads."""
        return 2 if self.block_o * self.block_i >= 128 * 128 else 1


@dataclass(frozen=True)
class RowTile:
    """A program of a streaming kernel: `block_r` rows (or positions) of `block_k` columns."""

    block_r: int
    block_k: int
    warps: int
    stages: int
    splits: int = 1


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int, low: int, high: int) -> int:
    """Return the least power of two >= n, within [low, high]."""
    return min(high, max(low, 1 << max(0, n - 1).bit_length()))


def outer_blocks(k_out: int, k_in: int) -> tuple[int, int]:
    """Return the smallest block that holds [k_out, k_in], or the largest that tiles it."""
    for block in _BLOCKS:
        if block[0] >= min(k_out, 128) and block[1] >= min(k_in, 128):
            return block
    return _BLOCKS[-1]


def splits(programs: int, length: int, block: int, arch: Arch, most: int = _MAX_SPLITS) -> int:
    """Return into how many ranges of whole blocks to split a reduction over `length`, so that all multiprocessors work.

    Two programs a multiprocessor hide latency. No range is empty.
    """
    if programs <= 0 or programs >= arch.multiprocessors:
        return 1
    ranges = cdiv(length, block)
    wanted = min(most, cdiv(2 * arch.multiprocessors, programs))
    share = max(1, ranges // wanted, cdiv(ranges, most))
    return max(1, cdiv(ranges, share))


def outer_tile(samples: int, length: int, k_out: int, k_in: int, itemsize: int, narrow: bool, arch: Arch) -> OuterTile:
    """Choose the tile of `samples` outer products [k_out, length] x [length, k_in] of `itemsize`-byte operands.

    `narrow` says that a side loads single values or is folded: its addresses and sums live in registers.
    """
    return outer_candidates(samples, length, k_out, k_in, itemsize, narrow, arch)[0]


def _block(k_out: int, k_in: int, itemsize: int, narrow: bool) -> tuple[int, int]:
    block = outer_blocks(k_out, k_in)
    # The largest block would spill where float32 values load one by one.
    return (64, 128) if narrow and itemsize > 2 and block == (128, 128) else block


def _outer_tile(
    block: tuple[int, int],
    most_t: int,
    samples: int,
    length: int,
    k_out: int,
    k_in: int,
    itemsize: int,
    narrow: bool,
    arch: Arch,
) -> OuterTile:
    area = block[0] * block[1]
    block_t = min(most_t, 64 if itemsize <= 2 and not narrow else 32)
    if narrow and area > 64 * 128:
        block_t = 16  # more would spill
    warps = 8 if area > 64 * 128 or (area == 64 * 128 and (narrow or itemsize > 2)) else 4
    # Each lane loads 16 bytes of either side at once.
    warps = max(1, min(warps, block_t * min(block) * itemsize // (16 * arch.warp_size)))
    # Half of the shared memory, so that two programs share a multiprocessor.
    stages = min(4, (arch.shared_bytes // 2) // (block_t * (block[0] + block[1]) * itemsize))
    if arch.backend == "hip":
        stages = 2  # AMD's pipeliner holds one tile in registers; more stages only take shared memory
    programs = samples * cdiv(k_out, block[0]) * cdiv(k_in, block[1])
    return OuterTile(*block, block_t, warps, max(2, stages), splits(programs, length, block_t, arch))


@_remembered
def outer_candidates(
    samples: int, length: int, k_out: int, k_in: int, itemsize: int, narrow: bool, arch: Arch
) -> tuple[OuterTile, ...]:
    """Return the tiles worth timing: the rule's first, then other blocks.

    The rule is the largest block, or, where few samples would leave multiprocessors idle, the largest that keeps all
    of them busy. Blocks shrink before ranges of positions do, as each range's results are written and read again.
    """
    largest = _block(k_out, k_in, itemsize, narrow)
    fitting = [block for block in reversed(_BLOCKS) if block[0] <= largest[0] and block[1] <= largest[1]]
    problem = (samples, length, k_out, k_in, itemsize, narrow, arch)
    tiles = [_outer_tile(block, 64, *problem) for block in fitting]
    for tile in (*tiles, *(_outer_tile(fitting[-1], most_t, *problem) for most_t in (32, 16))):
        if samples * cdiv(k_out, tile.block_o) * cdiv(k_in, tile.block_i) * tile.splits >= arch.multiprocessors:
            return (tile, *(other for other in tiles if other != tile))
    return tuple(tiles)


@_remembered
def computed_tile(samples: int, length: int, k_out: int, k_in: int, itemsize: int, arch: Arch) -> OuterTile:
    """Choose the tile of an outer product whose input side is computed, not loaded: addresses of patches, one-hots.

    What it computes lives in registers, so blocks are at most 64 x 64 on eight warps.
    """
    most_t = 32 if itemsize <= 2 else 16
    choices = [(64, most_t), (32, most_t), (32, 16)]
    tiles = []
    for block, block_t in choices[max(k_out, k_in) <= 32 :]:
        programs = samples * cdiv(k_out, block) * cdiv(k_in, block)
        tile = OuterTile(block, block, block_t, 4 if block == 32 else 8, 2, splits(programs, length, block_t, arch))
        if programs * tile.splits >= arch.multiprocessors:
            return tile
        tiles.append(tile)
    return tiles[0]


@_remembered
def row_tile(samples: int, length: int, k: int, itemsize: int, arch: Arch) -> RowTile:
    """Choose the tile of `samples` reductions over `length` positions of `k` columns, on the vector units."""
    block_k = power_of_two(k, 32, 128 if itemsize > 2 else 256)
    block_r = max(8, 4096 // block_k)
    programs = samples * cdiv(k, block_k)
    while block_r > 8 and programs * cdiv(length, block_r) < arch.multiprocessors <= programs * cdiv(length, 8):
        block_r //= 2
    return RowTile(block_r, block_k, 4, 3, splits(programs, length, block_r, arch))


def touched_sectors(d: int, k: int, group: int, itemsize: int, sector: int = 32) -> float:
    """Return the expected number of sectors of a row of d values that k uniform survivors in runs of `group` touch."""
    if d == 0:
        return 0.0
    per_sector = max(1, sector // itemsize)
    runs_in_sector = max(1, per_sector // group)
    whole = cdiv(d, per_sector)
    if group >= per_sector:
        return min(float(whole), k / per_sector)
    return whole * (1.0 - (1.0 - min(1.0, k / d)) ** runs_in_sector)


@dataclass(frozen=True)
class SketchTile:
    """A program of `sketch`: `block_r` rows, and `block_k` of their outputs."""

    stream: bool  # load whole rows of `block_d` values and select on chip
    block_r: int
    block_k: int
    block_d: int
    warps: int


@_remembered
def sketch_tile(d: int, k: int, fan_in: int, group: int, itemsize: int, arch: Arch) -> SketchTile:
    """Choose between gathering and streaming whole rows, by the sectors that a gather is expected to touch.

    Where a gather touches nearly every sector, a row read at full width moves as much with far fewer requests.
    """
    block_d = power_of_two(d, 32, 1 << 30)
    whole = cdiv(d * itemsize, 32)
    touched = touched_sectors(d, min(d, fan_in * k), group, itemsize)
    # The row is selected from in shared memory, and a second program shares the multiprocessor.
    fits = block_d * itemsize <= arch.shared_bytes // 4
    if group * itemsize < 16 and touched >= 0.9 * whole and fits:
        return SketchTile(True, 1, power_of_two(k, 32, 1024), block_d, 4 if block_d <= 4096 else 8)
    block_k = power_of_two(k, 32, 256)
    return SketchTile(False, max(1, 2048 // block_k), block_k, 0, 4)


@dataclass(frozen=True)
class GramTile:
    """A program of `gram_update`: a square block of the lower triangle and one of `splits` ranges of rows."""

    block: int
    block_n: int
    warps: int
    stages: int
    splits: int


@_remembered
def gram_tile(rows: int, k: int, itemsize: int, scaled: bool, arch: Arch) -> GramTile:
    """Choose the tile of C^T C for C [rows, k] with operands of `itemsize` bytes; `scaled` rows take registers."""
    block = 64 if k <= 64 or scaled else 128
    block_n = 64 if itemsize <= 2 else 16
    stages = 2 if arch.backend == "hip" else min(4, max(2, arch.shared_bytes // 2 // (2 * block * block_n * itemsize)))
    side = cdiv(k, block)
    return GramTile(
        block, block_n, 4 if block == 64 else 8, stages, splits(side * (side + 1) // 2, rows, block_n, arch, most=64)
    )


@dataclass(frozen=True)
class TopkTile:
    """A program of `score_topk`: a block of queries, and one of `splits` ranges of rows scored `block_n` at a time."""

    block_q: int
    block_n: int
    block_k: int  # columns of a step, or bytes of rows of few bits
    warps: int
    stages: int
    splits: int
    fields: int = 1  # coordinates of a byte that a step multiplies


@_remembered
def topk_tile(queries: int, rows: int, k_padded: int, itemsize: int, arch: Arch) -> TopkTile:
    """Choose the tile of `queries` running top-k lists of `k_padded` entries over `rows` rows.

    A program holds at most 4096 keys of 64 bits in its lists and 4096 in a block, which sort without a spill. A
    multiprocessor's registers hold one program of eight warps, or two of four.
    """
    block_q = min(64 if queries > 32 and itemsize <= 2 else 32, 4096 // k_padded)
    block_n = max(64, k_padded)
    block_k = 64 if itemsize <= 2 else 32
    # AMD's warps have 64 lanes, and compilers give 8 of them too few registers.
    warps = 8 if block_q * block_n >= 4096 and arch.backend == "cuda" else 4
    stages = 2 if arch.backend == "hip" else 3
    # Whole waves: one program more than fits at once would take as long as all before it.
    resident = arch.multiprocessors * 8 // warps
    ranges = max(1, min(resident // max(1, cdiv(queries, block_q)), cdiv(rows, 4 * block_n)))
    return TopkTile(block_q, block_n, block_k, warps, stages, ranges)


@_remembered
def topk_bits_tile(queries: int, rows: int, k_padded: int, itemsize: int, arch: Arch) -> TopkTile:
    """Choose the tile of `score_topk_bits`: that of `score_topk`, with a sector of each row in a step.

    All fields of its bytes are multiplied in one step where registers allow, or they are loaded again from a cache.
    """
    tile = topk_tile(queries, rows, k_padded, itemsize, arch)
    if itemsize > 2:
        return replace(tile, block_k=16, fields=2)
    return replace(tile, block_k=32, fields=8 if k_padded <= 64 else 4)
