"""Rows of one, two or four bits a coordinate, with a scale each."""

from __future__ import annotations

from functools import cached_property
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from ..op import op
from .checks import check_float
from .plain import BUFFER_BYTES, accumulator
from .topk import digits_of, dot_digits, in_integers, topk_of_blocks

# Bits, and the step of the uniform quantizer that serves a normal variable best (Max 1960); of one bit any.
STEPS = {1: 1.0, 2: 0.9957, 4: 0.3352}
_TILE_BYTES = 4 << 20  # of rows that are decoded at a time: what a cache holds
_ROUNDED = 3e-6  # of |q| |row|: by how much products may be off, as a root mean square; two digits then do for most


def offset_of(bits: int) -> float:
    """Return what a code is above its value."""
    return ((1 << bits) - 1) / 2


def check_bits(bits: int) -> None:
    if bits not in STEPS:
        raise ValueError(f"bits is {bits}; it must be 1, 2 or 4")


def check_few_bits(x: Tensor, bits: int) -> None:
    """Check rows that are to be quantized."""
    check_float("x", x, 2)
    check_bits(bits)
    if x.shape[1] % (8 // bits):
        raise ValueError(
            f"x has {x.shape[1]} columns; with bits={bits} they must be a multiple of {8 // bits}: append zeros"
        )


def check_codes(codes: Tensor, scale: Tensor, bits: int) -> None:
    """Check rows that are quantized."""
    check_bits(bits)
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise TypeError(f"codes is {codes.dtype} {list(codes.shape)}; it must be uint8 [N, K * bits / 8]")
    if scale.dtype != torch.float32 or scale.shape != codes.shape[:1]:
        raise ValueError(
            f"scale is {scale.dtype} {list(scale.shape)}; it must be float32 [N] with codes' N = {codes.shape[0]}"
        )


def check_topk_bits(q: Tensor, codes: Tensor, scale: Tensor, bits: int, k: int) -> None:
    """Check queries against rows that are quantized."""
    check_float("q", q, 2)
    check_codes(codes, scale, bits)
    width = codes.shape[1] * (8 // bits)
    if q.shape[1] != width:
        raise ValueError(
            f"q has {q.shape[1]} columns; it must have {width}: codes has {codes.shape[1]} bytes a row, bits is {bits}"
        )
    if k < 0:
        raise ValueError(f"k is {k}; it must not be negative")


def _fake_quantized(c: SimpleNamespace) -> tuple[Tensor, Tensor]:
    rows, columns = c.x.shape
    codes = c.x.new_empty((rows, columns // (8 // c.bits)), dtype=torch.uint8)
    return codes, c.x.new_empty(rows, dtype=torch.float32)


@op(_fake_quantized)
def quantize_bits(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantize each row to 1, 2 or 4 bits a coordinate, with one scale that leaves inner products unbiased.

    x [N, K] float, K a multiple of 8 / bits -> codes uint8 [N, K * bits / 8], scale float32 [N]. Bits f * bits to
    f * bits + bits - 1 of byte j hold the code u of coordinate f * K * bits / 8 + j, which stands for
    scale * (u - (2^bits - 1) / 2). The inner product of what a row stands for with the row itself is the row's
    squared norm; of randomly rotated rows, all inner products are unbiased. A zero row has scale 0.
    Raises TypeError, ValueError for bad dtypes, shapes or bits; ValueError naming the first row with a value that is
    not finite or a scale beyond float32. On a GPU, where nothing waits, such a row has scale NaN and codes 0.
    Source: steps of the uniform quantizer by Max, IRE Trans. Inf. Theory 6(1), 1960; scale by Gao and Long, RaBitQ,
    arXiv 2405.12497, and for several bits arXiv 2409.09913.
    """
    check_few_bits(x, bits)
    rows, columns = x.shape
    codes = x.new_empty((rows, columns // (8 // bits)), dtype=torch.uint8)
    scale = x.new_zeros(rows, dtype=torch.float32)
    if columns == 0:
        return codes, scale
    dtype = accumulator(x)
    for tile in _tiles(rows, columns * dtype.itemsize):
        # Contiguous, so that strides change no sum.
        codes[tile], scale[tile] = _quantize(x[tile].to(dtype).contiguous(), bits)
    bad = (~torch.isfinite(scale)).nonzero()
    if bad.numel():
        raise ValueError(f"x is not finite, or beyond float32, in row {int(bad[0])} ({bad.shape[0]} such rows)")
    return codes, scale


def _quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return codes and scales of a tile of rows, found in units of their largest entries: no square overflows."""
    largest = x.abs().amax(1, keepdim=True)
    unit = x / torch.where(largest > 0, largest, 1.0)
    square = unit.square().sum(1, keepdim=True)
    step = (square / x.shape[1]).sqrt() * STEPS[bits]
    codes = (unit / torch.where(step > 0, step, 1.0)).floor_().add_(2 ** (bits - 1)).clamp_(0, 2**bits - 1)
    fields = codes.to(torch.uint8).unflatten(1, (8 // bits, -1))
    packed = fields[:, 0].clone()
    for f in range(1, 8 // bits):
        packed.bitwise_or_(fields[:, f] << (f * bits))
    product = codes.sub_(offset_of(bits)).mul_(unit).sum(1, keepdim=True)
    scale = largest * (square / torch.where(product > 0, product, 1.0))
    # What is not finite shows in its scale.
    return packed, scale.squeeze(1).float()


@op(lambda c: c.codes.new_empty((c.codes.shape[0], c.codes.shape[1] * (8 // c.bits)), dtype=c.dtype))
def dequantize_bits(codes: Tensor, scale: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the rows that codes stand for in `dtype`: the unbiased estimates of what quantize_bits was given.

    codes uint8 [N, K * bits / 8], scale float32 [N] -> [N, K].
    Raises TypeError, ValueError for bad dtypes, shapes or bits.
    Source: see quantize_bits.
    """
    check_codes(codes, scale, bits)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return _values(codes, bits, wide).mul_(scale.to(wide).unsqueeze(1)).to(dtype)


def _fake_topk(c: SimpleNamespace) -> tuple[Tensor, Tensor]:
    shape = (c.q.shape[0], torch.sym_min(c.k, c.codes.shape[0]))
    return c.q.new_empty(shape, dtype=accumulator(c.q)), c.q.new_empty(shape, dtype=torch.int64)


@op(_fake_topk)
def score_topk_bits(
    q: Tensor, codes: Tensor, scale: Tensor, bits: int, k: int, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the k highest scores of every query over all rows of few bits, never holding [Q, N] or decoded rows.

    q [Q, K] float; codes uint8 [N, K * bits / 8], scale float32 [N] as of quantize_bits -> values [Q, min(k, N)]
    float32 (float64 if q is), descending, and indices int64, raised by `offset`. Ties: lowest index first. A CPU that
    multiplies in integers rounds the queries: scores are then off by at most 3e-6 of |q| |row|, as a root mean square
    over rows whose codes do not depend on the queries.
    Raises TypeError, ValueError for bad dtypes, shapes, bits or a negative k.
    Source: the rows of q @ dequantize_bits(codes, scale, bits)^T.
    """
    check_topk_bits(q, codes, scale, bits, k)
    queries = BitQueries(q.to(accumulator(q)), bits)
    step = max(1, min(BUFFER_BYTES // (max(1, len(q)) * queries.q.dtype.itemsize), len(codes)))

    def scores(rows: slice) -> Tensor:
        return queries.dot(codes[rows]).mul_(scale[rows].to(queries.q.dtype))

    return topk_of_blocks(scores, queries.q, len(codes), step, k, offset)


class BitQueries:
    """Queries [Q, K], float32 or float64, that blocks of rows of few bits are multiplied with."""

    def __init__(self, q: Tensor, bits: int) -> None:
        self.q, self.bits = q, bits
        self._in_integers = bool(q.numel()) and in_integers(q, torch.empty(0, 0, dtype=torch.uint8, device=q.device))

    def dot(self, codes: Tensor) -> Tensor:
        """Return `q @ v^T` [Q, N] in q's dtype, for the values v that codes [N, K * bits / 8] stand for unscaled."""
        if self._in_integers:
            return self._products(codes)
        out = self.q.new_empty(len(codes), len(self.q))
        for tile in _tiles(len(codes), self.q.shape[1] * self.q.dtype.itemsize):
            out[tile] = _values(codes[tile], self.bits, self.q.dtype) @ self.q.t()
        return out.t()

    @cached_property
    def _digits(self) -> _Digits:
        """The queries in two digits, or three where rounding to two takes too much."""
        found = self._in_digits(2)
        most = _ROUNDED * self.q.shape[1] ** 0.5 * found.size
        return found if bool((found.off <= most).all()) else self._in_digits(3)

    def _in_digits(self, places: int) -> _Digits:
        """Return the queries in digits: rounded queries, whose sums are those that count."""
        largest = self.q.abs().amax(1, keepdim=True)
        unit = self.q / torch.where(largest > 0, largest, 1.0)
        powers = _fields_of_half(self.q.shape[1] * self.bits // 8, self.bits)[1]
        step = (unit / powers).abs().amax(1, keepdim=True) / (127 * 256 ** (places - 1))
        whole = (unit / powers / torch.where(step > 0, step, 1.0)).round_()
        rounded = whole * step * powers
        shift = rounded.sum(1, keepdim=True, dtype=torch.float64).mul_(offset_of(self.bits)).float()
        off, size = (rounded - unit).norm(dim=1, keepdim=True), unit.norm(dim=1, keepdim=True)
        return _Digits(*digits_of(whole, places), step, shift, largest, size, off)

    def _products(self, codes: Tensor) -> Tensor:
        """Return what `dot` does, by products in integers of tiles of codes with the queries in digits.

        Of either half of a byte, one AND takes all fields: the code of its field g comes out times 2^(g * bits), at
        most 15, and the queries are divided by that.
        """
        queries, (masks, _) = self._digits, _fields_of_half(codes.shape[1], self.bits)
        out = self.q.new_empty(len(self.q), len(codes))
        tiles = _tiles(len(codes), self.q.shape[1])
        buffer = codes.new_empty(tiles[0].stop if tiles else 0, 2, *masks.shape)
        for tile in tiles:
            packed = codes[tile]
            fields = buffer[: len(packed)]
            torch.bitwise_and(packed.unsqueeze(1), masks, out=fields[:, 0])
            torch.bitwise_and((packed >> 4).unsqueeze(1), masks, out=fields[:, 1])
            found = dot_digits(queries.digits, queries.held, queries.step, fields.flatten(1).view(torch.int8))
            out[:, tile] = found.sub_(queries.shift).mul_(queries.largest)
        return out


class _Digits(NamedTuple):
    """Queries in digits to base 256, in units of their largest entries."""

    digits: Tensor  # int8 [places * Q and padding, K]
    held: int  # of its rows that are not padding
    step: Tensor  # [Q, 1] what 1 is
    shift: Tensor  # [Q, 1] what codes are above their values, times the sum of the query
    largest: Tensor  # [Q, 1]
    size: Tensor  # [Q, 1] the norm of the query, and
    off: Tensor  # [Q, 1] of what rounding took from it


def _values(codes: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Return the values [N, K] that codes stand for before they are scaled."""
    fields = codes.new_empty((codes.shape[0], 8 // bits, codes.shape[1]), dtype=dtype)
    for f in range(8 // bits):
        fields[:, f] = (codes >> (f * bits)) & (2**bits - 1)
    return fields.sub_(offset_of(bits)).flatten(1)


def _fields_of_half(width: int, bits: int) -> tuple[Tensor, Tensor]:
    """Return the masks of the fields of half a byte, for rows of `width` bytes, and by which power of two each is off.

    uint8 [4 / bits, width], and float32 [width * 8 / bits] for both halves.
    """
    powers = 2 ** (bits * torch.arange(4 // bits, device="cpu"))
    masks = ((2**bits - 1) * powers).to(torch.uint8).unsqueeze(1).repeat(1, width)
    return masks, powers.float().repeat_interleave(width).repeat(2)


def _tiles(rows: int, row_bytes: int) -> list[slice]:
    """Cut rows into tiles that a cache holds."""
    step = max(1, _TILE_BYTES // max(1, row_bytes))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
