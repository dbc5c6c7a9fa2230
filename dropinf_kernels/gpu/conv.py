"""Compressed gradients of convolutions on a GPU: im2col happens in the index arithmetic, never in memory.

1d and 2d convolutions are 3d ones with leading axes of size 1. A position p decodes to an output site, a tap (a column
of the input side's table) to a channel and an offset in the window.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import ARCHS, Arch, arch_of
from ..op import launches
from ..ops.conv import Geometry, check_conv, check_patches, compress_conv, compress_conv_int8, sketch_patches
from .launch import check_device, check_index, launch
from .replay import allocate, replayed
from .tiles import Side, finish, load_side, operand_dtype, outputs, sample_and_block, store_block
from .tiling import OuterTile, cdiv, computed_tile, power_of_two, splits


@triton.jit
def load_patches(
    p_x, positions, live, taps, keep, O1, O2, S0, S1, S2, stride_c, stride_0, stride_1, stride_2,
    K: tl.constexpr, STEP: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr,
):  # fmt: skip
    """Load x at every pair of a position and a tap, broadcast against each other; zero where the padding is."""
    c = taps // (K[0] * K[1] * K[2])
    i0 = (positions // (O1 * O2)) * STEP[0] - PAD[0] + (taps // (K[1] * K[2])) % K[0] * DIL[0]
    i1 = (positions // O2) % O1 * STEP[1] - PAD[1] + (taps // K[2]) % K[1] * DIL[1]
    i2 = positions % O2 * STEP[2] - PAD[2] + taps % K[2] * DIL[2]
    inside = (i0 >= 0) & (i0 < S0) & (i1 >= 0) & (i1 < S1) & (i2 >= 0) & (i2 < S2)
    at = (
        c.to(tl.int64) * stride_c + i0.to(tl.int64) * stride_0 + i1.to(tl.int64) * stride_1 + i2.to(tl.int64) * stride_2
    )
    return tl.load(p_x + at, mask=inside & live & keep, other=0.0)


@triton.jit
def sketch_taps(
    p_x, positions, live, offsets, k, p_index, p_weight, O1, O2, S0, S1, S2, stride_c, stride_0, stride_1, stride_2,
    K: tl.constexpr, STEP: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr,
    FAN_IN: tl.constexpr, WEIGHTED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Load the sketched patches [positions, columns]."""
    keep = offsets < k
    if FAN_IN == 0:
        tile = load_patches(
            p_x, positions[:, None], live[:, None], offsets[None, :], keep[None, :], O1, O2, S0, S1, S2,
            stride_c, stride_0, stride_1, stride_2, K, STEP, PAD, DIL,
        ).to(DTYPE)  # fmt: skip
    else:
        total = tl.zeros([positions.shape[0], offsets.shape[0]], tl.float32)
        for f in range(FAN_IN):
            taps = tl.load(p_index + f * k + offsets, mask=keep, other=0)
            part = load_patches(
                p_x, positions[:, None], live[:, None], taps[None, :], keep[None, :], O1, O2, S0, S1, S2,
                stride_c, stride_0, stride_1, stride_2, K, STEP, PAD, DIL,
            ).to(tl.float32)  # fmt: skip
            if WEIGHTED:
                part *= tl.load(p_weight + f * k + offsets, mask=keep, other=0.0)[None, :]
            total += part
        tile = total.to(DTYPE)
    return tile


@triton.jit
def sketch_patches_kernel(
    p_x, p_out, p_index, p_weight, T, k, O1, O2, S0, S1, S2, stride_n, stride_c, stride_0, stride_1, stride_2,
    K: tl.constexpr, STEP: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr,
    FAN_IN: tl.constexpr, WEIGHTED: tl.constexpr, DTYPE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n, positions, offs_k = sample_and_block(T, k, BLOCK_P, BLOCK_K)
    tile = sketch_taps(
        p_x + n * stride_n, positions, positions < T, offs_k, k, p_index, p_weight, O1, O2, S0, S1, S2,
        stride_c, stride_0, stride_1, stride_2, K, STEP, PAD, DIL, FAN_IN, WEIGHTED, DTYPE,
    )  # fmt: skip
    at = (n * T + positions)[:, None] * k + offs_k[None, :]
    tl.store(p_out + at, tile.to(p_out.dtype.element_ty), mask=(positions < T)[:, None] & (offs_k < k)[None, :])


@triton.jit
def output_sites(positions, O1, O2, stride_p, stride_0, stride_1, stride_2, FLAT: tl.constexpr):
    """Return the offsets of output positions; FLAT where one stride serves all of them."""
    if FLAT:
        return positions.to(tl.int64) * stride_p
    o0 = (positions // (O1 * O2)).to(tl.int64)
    return o0 * stride_0 + (positions // O2 % O1).to(tl.int64) * stride_1 + (positions % O2).to(tl.int64) * stride_2


@triton.jit
def compress_conv_kernel(
    p_x, p_g, p_out, p_scale, p_in_index, p_in_weight, p_out_index, p_out_weight,
    T, k_in, k_out, share, O1, O2, S0, S1, S2,
    stride_xn, stride_xc, stride_x0, stride_x1, stride_x2,
    stride_gn, stride_gc, stride_gp, stride_g0, stride_g1, stride_g2, stride_split,
    K: tl.constexpr, STEP: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr,
    FAN_IN: tl.constexpr, FAN_OUT: tl.constexpr, OUT_GROUP: tl.constexpr,
    IN_WEIGHTED: tl.constexpr, OUT_WEIGHTED: tl.constexpr, FLAT: tl.constexpr, QUANTIZE: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    n, offs_o, offs_i = sample_and_block(k_out, k_in, BLOCK_O, BLOCK_I)
    split = tl.program_id(1)
    start = split * share
    stop = tl.minimum(T, start + share)
    acc = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for p in range(start, stop, BLOCK_P):
        positions = p + tl.arange(0, BLOCK_P)
        live = positions < stop
        sites = output_sites(positions, O1, O2, stride_gp, stride_g0, stride_g1, stride_g2, FLAT)
        left = load_side(
            p_g + n * stride_gn + sites[None, :], live[None, :], offs_o, k_out, stride_gc,
            p_out_index, p_out_weight, FAN_OUT, OUT_GROUP, OUT_WEIGHTED, DTYPE, TURNED=True,
        )  # fmt: skip
        right = sketch_taps(
            p_x + n * stride_xn, positions, live, offs_i, k_in, p_in_index, p_in_weight, O1, O2, S0, S1, S2,
            stride_xc, stride_x0, stride_x1, stride_x2, K, STEP, PAD, DIL, FAN_IN, IN_WEIGHTED, DTYPE,
        )  # fmt: skip
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    where = n * k_out * k_in + offs_o[:, None].to(tl.int64) * k_in + offs_i[None, :]
    keep = (offs_o < k_out)[:, None] & (offs_i < k_in)[None, :]
    store_block(p_out, p_scale, n, split, stride_split, acc, where, keep, QUANTIZE)


@triton.jit
def compress_conv_grouped_kernel(
    p_x, p_g, p_out, p_scale, p_in_index, p_in_weight, p_out_index, p_out_weight,
    T, k_in, k_out, share, O1, O2, S0, S1, S2, group_out, group_in,
    stride_xn, stride_xc, stride_x0, stride_x1, stride_x2,
    stride_gn, stride_gc, stride_gp, stride_g0, stride_g1, stride_g2, stride_split,
    K: tl.constexpr, STEP: tl.constexpr, PAD: tl.constexpr, DIL: tl.constexpr,
    FAN_IN: tl.constexpr, FAN_OUT: tl.constexpr, IN_WEIGHTED: tl.constexpr, OUT_WEIGHTED: tl.constexpr,
    FLAT: tl.constexpr, QUANTIZE: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sum each pair of a row and a tap as a dot product of its own: rows see their own channel group's input."""
    n, offs_o, offs_i = sample_and_block(k_out, k_in, BLOCK_O, BLOCK_I)
    split = tl.program_id(1)
    start = split * share
    stop = tl.minimum(T, start + share)
    keep_o, keep_i = offs_o < k_out, offs_i < k_in
    acc = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for fo in range(FAN_OUT if FAN_OUT > 0 else 1):
        channel = offs_o
        if FAN_OUT > 0:
            channel = tl.load(p_out_index + fo * k_out + offs_o, mask=keep_o, other=0)
        base = (channel // group_out) * group_in
        p_rows = p_x + n * stride_xn + base.to(tl.int64)[:, None, None] * stride_xc
        for fi in range(FAN_IN if FAN_IN > 0 else 1):
            taps = offs_i
            if FAN_IN > 0:
                taps = tl.load(p_in_index + fi * k_in + offs_i, mask=keep_i, other=0)
            part = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
            for p in range(start, stop, BLOCK_P):
                positions = p + tl.arange(0, BLOCK_P)
                live = positions < stop
                sites = output_sites(positions, O1, O2, stride_gp, stride_g0, stride_g1, stride_g2, FLAT)
                p_left = p_g + n * stride_gn + channel.to(tl.int64)[:, None] * stride_gc + sites[None, :]
                left = tl.load(p_left, mask=keep_o[:, None] & live[None, :], other=0.0).to(tl.float32)
                right = load_patches(
                    p_rows, positions[None, None, :], live[None, None, :] & keep_o[:, None, None],
                    taps[None, :, None], keep_i[None, :, None], O1, O2, S0, S1, S2,
                    stride_xc, stride_x0, stride_x1, stride_x2, K, STEP, PAD, DIL,
                ).to(tl.float32)  # fmt: skip
                part += tl.sum(left[:, None, :] * right, 2)
            if IN_WEIGHTED:
                part *= tl.load(p_in_weight + fi * k_in + offs_i, mask=keep_i, other=0.0)[None, :]
            if OUT_WEIGHTED:
                part *= tl.load(p_out_weight + fo * k_out + offs_o, mask=keep_o, other=0.0)[:, None]
            acc += part
    where = n * k_out * k_in + offs_o[:, None].to(tl.int64) * k_in + offs_i[None, :]
    keep = keep_o[:, None] & keep_i[None, :]
    store_block(p_out, p_scale, n, split, stride_split, acc, where, keep, QUANTIZE)


def _three(values: Sequence[int], fill: int) -> tuple[int, ...]:
    return (*(fill,) * (3 - len(values)), *values)


def _window(geometry: Geometry) -> dict[str, Any]:
    return {
        "K": _three(geometry.kernel_size, 1),
        "STEP": _three(geometry.stride, 1),
        "PAD": _three(geometry.padding, 0),
        "DIL": _three(geometry.dilation, 1),
    }


class _Problem(NamedTuple):
    """What a launch of compress_conv needs besides its tile."""

    x: Tensor
    g: Tensor
    geometry: Geometry
    groups: int
    left: Side
    right: Side
    stored: torch.dtype
    arch: Arch

    @property
    def operand(self) -> tl.dtype:
        """Return what the matrix units multiply."""
        folded = self.right.weighted or self.right.fan_in > 1
        return tl.float32 if folded else operand_dtype(self.x, self.g)

    def tile(self) -> OuterTile:
        """Choose the tile by rule; one of a grouped convolution has three axes, and lives in registers."""
        samples, positions, k_out, k_in = self.x.shape[0], self.geometry.positions, self.left.k, self.right.k
        if self.groups == 1:
            return computed_tile(samples, positions, k_out, k_in, 4 if self.operand == tl.float32 else 2, self.arch)
        block_o, block_i = 8, power_of_two(k_in, 8, 32)
        programs = samples * cdiv(k_out, block_o) * cdiv(k_in, block_i)
        return OuterTile(block_o, block_i, 16, 4, 1, splits(programs, positions, 16, self.arch))


@launches(compress_conv, compress_conv_int8)
@replayed
def launch_conv(
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
    *,
    quantize: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Launch `compress_conv` on g's device."""
    window = (kernel_size, stride, padding, dilation)
    geometry = check_conv(x, g, *window, groups, in_index, in_weight, out_index, out_weight, group)
    check_device(g=g, x=x, in_index=in_index, in_weight=in_weight, out_index=out_index, out_weight=out_weight)
    check_index("in_index", in_index, geometry.taps, group)
    check_index("out_index", out_index, g.shape[1], group)
    left = Side.of(g, g.shape[1], out_index, out_weight, group)
    right = Side.of(x, geometry.taps, in_index, in_weight, 1)
    stored, arch = torch.int8 if quantize else torch.float32, arch_of(g.device) or ARCHS["sm_80"]
    return _launch_tile(_Problem(x, g, geometry, groups, left, right, stored, arch))


def _launch_tile(problem: _Problem) -> tuple[Tensor, Tensor | None]:
    x, g, geometry, left, right = problem.x, problem.g, problem.geometry, problem.left, problem.right
    tile, samples = problem.tile(), problem.x.shape[0]
    blocks = cdiv(left.k, tile.block_o) * cdiv(right.k, tile.block_i)
    shape = (samples, left.k, right.k)
    out, scale, partial = outputs(shape, problem.stored, g.device, tile.splits, whole=blocks == 1)
    out_size, steps = _three(geometry.out, 1), _three(g.stride()[2:], 0)
    # One stride reaches all output positions where the spatial axes are packed.
    flat = steps[0] == steps[1] * out_size[1] or out_size[0] == 1
    flat = flat and (steps[1] == steps[2] * out_size[2] or out_size[1] == 1)
    share = cdiv(cdiv(geometry.positions, tile.block_t), tile.splits) * tile.block_t
    args = (
        x, g, out if partial is None else partial, out if scale is None else scale,
        right.index, right.weight, left.index, left.weight,
        geometry.positions, right.k, left.k, share, *out_size[1:], *_three(x.shape[2:], 1),
    )  # fmt: skip
    strides = (*x.stride()[:2], *_three(x.stride()[2:], 0), *g.stride()[:2], steps[2], *steps, out.numel())
    grid, meta = (samples * blocks, tile.splits), _window(geometry) | {
        "FAN_IN": right.fan_in, "FAN_OUT": left.fan_in, "IN_WEIGHTED": right.weighted, "OUT_WEIGHTED": left.weighted,
        "FLAT": flat, "QUANTIZE": scale is not None and partial is None,
        "BLOCK_O": tile.block_o, "BLOCK_I": tile.block_i, "BLOCK_P": tile.block_t, "num_warps": tile.warps,
    }  # fmt: skip
    if problem.groups == 1:
        launch(
            compress_conv_kernel, grid, g.device, *args, *strides, **meta, OUT_GROUP=left.group,
            DTYPE=problem.operand, PRECISION=problem.arch.precision, num_stages=tile.stages,
        )  # fmt: skip
    else:
        channels = (g.shape[1] // problem.groups, geometry.channels)
        launch(compress_conv_grouped_kernel, grid, g.device, *args, *channels, *strides, **meta)
    if partial is not None:
        finish(partial, out, scale)
    return out, scale


@launches(sketch_patches)
@replayed
def launch_patches(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    index: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """Launch `sketch_patches` on x's device."""
    geometry = check_patches(x, kernel_size, stride, padding, dilation, index, weight)
    check_device(x=x, index=index, weight=weight)
    check_index("index", index, geometry.taps)
    side = Side.of(x, geometry.taps, index, weight, 1)
    out = allocate((x.shape[0], geometry.positions, side.k), x.dtype, x.device)
    block_k = power_of_two(side.k, 16, 64)
    block_p = 2048 // block_k
    grid = (x.shape[0] * cdiv(math.prod(geometry.out), block_p) * cdiv(side.k, block_k),)
    launch(
        sketch_patches_kernel, grid, x.device, x, out, side.index, side.weight, geometry.positions, side.k,
        *_three(geometry.out, 1)[1:], *_three(x.shape[2:], 1), *x.stride()[:2], *_three(x.stride()[2:], 0),
        **_window(geometry), FAN_IN=side.fan_in, WEIGHTED=side.weighted, DTYPE=tl.float32,
        BLOCK_P=block_p, BLOCK_K=block_k, num_warps=4,
    )  # fmt: skip
    return out
