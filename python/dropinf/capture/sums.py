"""Sums over the positions of each sample, sketched."""

from __future__ import annotations

from torch import Tensor

import dropinf_kernels as ops
from dropinf_kernels.op import no_autograd
from dropinf_kernels.ops.linear import outer_products
from dropinf_kernels.ops.norm import sum_products
from dropinf_kernels.ops.plain import accumulator

from ..sketch.axis import Axis
from .samples import Samples


def summed(a: Tensor | None, g: Tensor, samples: Samples) -> Tensor:
    """Return sum_t a_t * g_t of each sample, [N, d]; ``a`` None is all ones."""
    g, cu = samples.tie(g)
    return ops.compress_norm(None if a is None else samples.tie(a)[0], g, cu_seqlens=cu)


@no_autograd
def sketched_sum(a: Tensor | None, g: Tensor, axis: Axis, samples: Samples) -> Tensor:
    """Return the sketch of sum_t a_t * g_t; ``a`` None is all ones.

    Where the sketch is a gather, ``a`` is gathered already.
    """
    g, cu = samples.tie(g)
    a = None if a is None else samples.tie(a)[0]
    if axis.is_gather and not g.is_cuda:
        return sum_products(a, axis.apply(g), cu, accumulator(a, g))  # the op without its checks
    if axis.is_gather and a is not None:
        return ops.compress_norm(a, axis.apply(g), cu_seqlens=cu)
    if axis.matrix is not None:
        return axis.apply(ops.compress_norm(a, g, cu_seqlens=cu))
    index, weight = axis.table
    return ops.compress_norm(a, g, index, weight, axis.group if index is not None else 1, cu)


@no_autograd
def sketched_outer(a: Tensor, g: Tensor, axis: Axis, samples: Samples, room: Tensor | None = None) -> Tensor:
    """Return sum_t (S_out g_t) a_t^T for inputs ``a`` that are sketched already, in a room if there is one."""
    if axis.is_gather and not g.is_cuda:
        (a, cu), (g, _) = samples.tie(a), samples.tie(axis.apply(g))
        return outer_products(a, g, cu)  # the op without its checks
    if axis.matrix is not None:
        g = axis.apply(g)
    index, weight = (None, None) if axis.matrix is not None else axis.table
    group = axis.group if index is not None else 1
    (a, cu), (g, _) = samples.tie(a), samples.tie(g)
    if room is None:
        return ops.compress_linear(a, g, None, None, index, weight, group, cu)
    ops.compress_linear_into(room, a, g, None, None, index, weight, group, cu)
    return room
