"""Compressed gradients of convolutions in plain PyTorch: only the kept taps are ever gathered."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..device import runs_triton
from ..op import op
from .checks import check_bounds, check_float, check_table
from .plain import accumulator, columns_of, fold
from .quantize import quantized

# Gathered patches; beyond this, mapping fresh pages costs more than gathering.
PATCH_BYTES = 4 << 20


def conv_output_size(
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Return the output positions per spatial axis of a convolution over `size`.

    Raises ValueError if the arguments differ in length or the kernel does not fit.
    """
    arguments = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    for name, value in arguments.items():
        if len(value) != len(size):
            raise ValueError(f"{name} is {list(value)}; it must have one entry per spatial axis, {len(size)}")
        if any(v < (0 if name == "padding" else 1) for v in value):
            raise ValueError(f"{name} is {list(value)}; its entries must be at least {int(name != 'padding')}")
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel_size, stride, padding, dilation, strict=True)
    ]
    if any(n < 1 for n in out):
        raise ValueError(
            f"kernel_size {list(kernel_size)} with dilation {list(dilation)} does not fit into x's "
            f"spatial shape {list(size)} with padding {list(padding)}"
        )
    return out


@dataclass(frozen=True)
class Geometry:
    """The windows of a convolution."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    out: tuple[int, ...]
    channels: int  # per group

    @property
    def taps(self) -> int:
        return self.channels * math.prod(self.kernel_size)

    @property
    def positions(self) -> int:
        return math.prod(self.out)

    def windows(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """Return [N, offsets, *O] aliasing padded `x`, the offset of each tap, and the channel stride.

        Element [n, offset, *o] lies `offset` elements after the first tap of window o, so one axis
        reaches every tap of every channel without a copy.
        """
        if any(self.padding):
            x = pad(x, [p for n in reversed(self.padding) for p in (n, n)])
        tap_strides = [x.stride(1), *(s * d for s, d in zip(x.stride()[2:], self.dilation, strict=True))]
        reach = [x.shape[1], *self.kernel_size]
        length = 1 + sum((n - 1) * s for n, s in zip(reach, tap_strides, strict=True))
        steps = [s * step for s, step in zip(x.stride()[2:], self.stride, strict=True)]
        view = x.as_strided((x.shape[0], length, *self.out), (x.stride(0), 1, *steps))
        offsets = torch.zeros((), dtype=torch.int64, device=x.device)
        for size, tap_stride in zip((self.channels, *self.kernel_size), tap_strides, strict=True):
            axis = torch.arange(size, device=x.device) * tap_stride
            offsets = offsets.unsqueeze(-1) + axis
        return view, offsets.flatten(), x.stride(1)


@dataclass(frozen=True)
class _Taps:
    """Chunks of S_in applied to the patches of the channel groups `present`."""

    geometry: Geometry
    index: Tensor | None
    weight: Tensor | None
    present: Tensor
    dtype: torch.dtype

    @property
    def width(self) -> int:
        return columns_of(self.index, self.geometry.taps)

    def chunks(self, x: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield (groups, columns, patches [N, groups, columns, T]), each within the buffer bound."""
        view, offsets, channel_stride = self.geometry.windows(x)
        table = offsets.unsqueeze(0) if self.index is None else offsets[self.index.long()]
        bases = self.present * (self.geometry.channels * channel_stride)
        unit = x.shape[0] * self.geometry.positions * self.dtype.itemsize
        columns = max(1, min(self.width, PATCH_BYTES // unit))
        groups = max(1, PATCH_BYTES // (unit * max(1, self.width)))
        for i in range(0, bases.numel(), groups):
            for j in range(0, self.width, columns):
                picked, part = slice(i, i + groups), slice(j, j + columns)
                where = bases[picked].view(-1, 1) + table[:, part].unsqueeze(1)  # [fan_in, groups, columns]
                yield picked, part, self._gather(view, where, part)

    def _gather(self, view: Tensor, where: Tensor, columns: slice) -> Tensor:
        weight = None if self.weight is None else self.weight[:, columns].unsqueeze(-1)
        # index_select copies its whole overlapping input first; advanced indexing does not.
        return fold(lambda f: view[:, where[f]].flatten(3).to(self.dtype), where.shape[0], weight)


@dataclass(frozen=True)
class _OutputRows:
    """Which output channels each present channel group needs, padded to one count per group."""

    present: Tensor  # [G]
    channels: Tensor  # [G, m]
    position: Tensor  # [fan_in, k_out], into G * m

    @classmethod
    def build(cls, out_index: Tensor, per_group: int) -> _OutputRows:
        flat = out_index.long().flatten()
        present, slot = torch.unique(flat // per_group, return_inverse=True)
        counts = torch.bincount(slot, minlength=present.numel())
        most = int(counts.max()) if counts.numel() else 0
        order = torch.argsort(slot, stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(order.numel(), device=order.device)
        position = slot * most + rank - (counts.cumsum(0) - counts)[slot]
        channels = (present * per_group).view(-1, 1).repeat(1, most)
        channels.view(-1)[position] = flat
        return cls(present, channels, position.view(out_index.shape))


def _sketch_rows(x: Tensor, index: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sketch axis 1 of `x` [N, d, T] in `dtype`."""
    weight = None if weight is None else weight.unsqueeze(-1)
    return fold(lambda f: x.index_select(1, index[f]).to(dtype), index.shape[0], weight)


def _geometry(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Geometry:
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups is {groups}; it must be positive and divide x's channels, {x.shape[1]}")
    out = conv_output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    window = (tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation))
    return Geometry(*window, tuple(out), x.shape[1] // groups)


def check_conv(
    x: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    in_index: Tensor | None,
    in_weight: Tensor | None,
    out_index: Tensor | None,
    out_weight: Tensor | None,
    group: int,
) -> Geometry:
    check_float("x", x, 3, 4, 5)
    check_float("g", g, x.dim())
    geometry = _geometry(x, kernel_size, stride, padding, dilation, groups)
    if g.shape[0] != x.shape[0] or tuple(g.shape[2:]) != geometry.out or g.shape[1] % groups:
        raise ValueError(
            f"g has shape {list(g.shape)}; it must be [{x.shape[0]}, C_out, "
            f"{', '.join(map(str, geometry.out))}] with C_out a multiple of groups, {groups}"
        )
    check_table("in_", in_index, in_weight, geometry.taps, group)
    check_table("out_", out_index, out_weight, g.shape[1], group)
    return geometry


def check_patches(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    index: Tensor,
    weight: Tensor | None,
) -> Geometry:
    check_float("x", x, 3, 4, 5)
    geometry = _geometry(x, kernel_size, stride, padding, dilation, 1)
    check_table("", index, weight, geometry.taps, 1)
    return geometry


def _fake_conv(c: SimpleNamespace) -> Tensor:
    taps = c.x.shape[1] // c.groups * math.prod(c.kernel_size)
    shape = (c.x.shape[0], columns_of(c.out_index, c.g.shape[1]), columns_of(c.in_index, taps))
    out: Tensor = c.x.new_empty(shape, dtype=accumulator(c.x, c.g))
    return out


@op(_fake_conv)
def compress_conv(
    x: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    in_index: Tensor | None = None,
    in_weight: Tensor | None = None,
    out_index: Tensor | None = None,
    out_weight: Tensor | None = None,
    group: int = 1,
) -> Tensor:
    """Compress the per-sample gradients of a 1d, 2d or 3d convolution with zero padding.

    x [N, C_in, *S], g [N, C_out, *O] float -> [N, k_out, k_in] float32 (float64 if x or g is).
    The gradient is viewed as [C_out, (C_in / groups) * prod(kernel_size)] in the weight's memory order:
    out_index points into C_out, in_index into the product. Rows that fold output channels of several
    groups sum them. Only kept taps are gathered, in chunks of about 4 MiB; runs (`group`) gain nothing.
    Raises TypeError, ValueError for bad tables, windows or shapes, IndexError for an index out of range.
    Source: C_n = S_out G_n S_in^T, where
    G_n[o, (c, u)] = sum_p g_n[o, p] * x_n[c, p * stride - padding + u * dilation].
    """
    window = (kernel_size, stride, padding, dilation)
    geometry = check_conv(x, g, *window, groups, in_index, in_weight, out_index, out_weight, group)
    for name, index, size in (("in_index", in_index, geometry.taps), ("out_index", out_index, g.shape[1])):
        if index is not None and not index.is_cuda:
            check_bounds(name, index, size)
    dtype = accumulator(x, g)
    rows = None
    present = torch.zeros(1, dtype=torch.int64, device=x.device)
    if groups > 1:
        if out_index is None:
            out_index = torch.arange(g.shape[1], dtype=torch.int32, device=g.device).unsqueeze(0)
        rows = _OutputRows.build(out_index, g.shape[1] // groups)
        present = rows.present
    taps = _Taps(geometry, in_index, in_weight, present, dtype)
    k_out = g.shape[1] if out_index is None else out_index.shape[1]
    out = x.new_empty(x.shape[0], k_out, taps.width, dtype=dtype)
    lines = max(taps.width * present.numel(), k_out if rows is None else rows.channels.numel(), 1)
    samples = max(1, PATCH_BYTES // (lines * geometry.positions * dtype.itemsize))
    for n in range(0, x.shape[0], samples):
        block = slice(n, n + samples)
        if rows is None:
            left = g[block].flatten(2)
            left = left.to(dtype) if out_index is None else _sketch_rows(left, out_index, out_weight, dtype)
            _multiply(out[block].unsqueeze(1), left.unsqueeze(1), taps, x[block])
        else:
            out[block] = _grouped(g[block], rows, out_weight, taps, x[block])
    return out


compress_conv_int8 = quantized(compress_conv)


def _multiply(out: Tensor, left: Tensor, taps: _Taps, x: Tensor) -> None:
    """Fill `out` [N, G, m, k_in] with `left` [N, G, m, T] times the gathered patches of each group."""
    for groups, columns, patches in taps.chunks(x):
        out[:, groups, :, columns] = left[:, groups] @ patches.transpose(2, 3)


def _grouped(g: Tensor, rows: _OutputRows, out_weight: Tensor | None, taps: _Taps, x: Tensor) -> Tensor:
    """Multiply each output channel with its own group's patches, then mix channels into rows."""
    left = g.flatten(2).index_select(1, rows.channels.flatten()).to(taps.dtype)
    product = left.new_empty(g.shape[0], *rows.channels.shape, taps.width)
    _multiply(product, left.view(g.shape[0], *rows.channels.shape, left.shape[2]), taps, x)
    # A gather per fan-in, not a scatter: the order of the sum is fixed on every device.
    return _sketch_rows(product.flatten(1, 2), rows.position, out_weight, taps.dtype)


def _tap_by_tap(x: Tensor, geometry: Geometry, taps: Sequence[int]) -> Tensor:
    """Return the patches' `taps`, [N, taps, T]: of each what lies inside the image, which no copy pads first."""
    make = x.new_zeros if any(geometry.padding) else x.new_empty
    out = make(x.shape[0], len(taps), *geometry.out)
    axes = (geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation, geometry.out, x.shape[2:])
    for row, tap in enumerate(taps):
        source: tuple[slice, ...] = ()
        target: tuple[slice, ...] = ()
        for kernel, step, padding, dilation, length, size in zip(*(reversed(axis) for axis in axes), strict=True):
            tap, at = divmod(tap, kernel)
            first = at * dilation - padding  # where window 0 has this tap
            low = max(0, -(first // step))
            high = max(low, min(length, (size - 1 - first) // step + 1))
            source = (slice(first + low * step, first + high * step, step), *source)
            target = (slice(low, high), *target)
        inside: tuple[slice | int, ...] = (slice(None), row, *target)
        wanted: tuple[slice | int, ...] = (slice(None), tap, *source)
        out[inside] = x[wanted]
    return out.flatten(2)


def _patches(x: Tensor, geometry: Geometry, index: Tensor, weight: Tensor | None) -> Tensor:
    """Return the sketched patches [N, k, T]; of few taps, or of many positions, one tap at a time."""
    k, dtype = index.shape[1], accumulator(x)
    if x.device.type == "cpu" and len(index) == 1 and (k <= 32 or x.shape[0] * geometry.positions >= 4096):
        plain = _tap_by_tap(x, geometry, index[0].tolist())
        return plain if weight is None else plain.to(dtype).mul_(weight[0].to(dtype).unsqueeze(1)).to(x.dtype)
    taps = _Taps(geometry, index, weight, torch.zeros(1, dtype=torch.int64, device=x.device), dtype)
    out = x.new_empty(x.shape[0], k, geometry.positions)
    samples = max(1, PATCH_BYTES // (max(1, k) * geometry.positions * dtype.itemsize))
    for n in range(0, x.shape[0], samples):
        for _, columns, patches in taps.chunks(x[n : n + samples]):
            out[n : n + samples, columns] = patches.squeeze(1)
    return out


def _fake_patches(c: SimpleNamespace) -> Tensor:
    positions = math.prod(conv_output_size(c.x.shape[2:], c.kernel_size, c.stride, c.padding, c.dilation))
    size, k = c.x.shape[0], c.index.shape[1]
    # The kernels write one position after another, the plain body one column after another.
    if runs_triton([t for t in (c.x, c.index, c.weight) if t is not None]):
        positions_first: Tensor = c.x.new_empty(size, positions, k)
        return positions_first
    columns_first: Tensor = c.x.new_empty(size, k, positions)
    return columns_first.mT


@op(_fake_patches)
def sketch_patches(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    index: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """Sketch the patches that a convolution with one group reads, without unfolding them.

    x [N, C_in, *S] float -> [N, T_out, k] in x's dtype, T_out the number of output positions;
    index points into C_in * prod(kernel_size).
    Raises TypeError, ValueError for a bad table or window, IndexError for an index out of range.
    Source: S_in applied to the columns of im2col (torch.nn.functional.unfold).
    """
    geometry = check_patches(x, kernel_size, stride, padding, dilation, index, weight)
    if not index.is_cuda:
        check_bounds("index", index, geometry.taps)
    return _patches(x, geometry, index, weight).mT
