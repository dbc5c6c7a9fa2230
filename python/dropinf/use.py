"""One module's capture: what to keep in forward, what to emit in backward."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

import dropinf_kernels as ops
from dropinf_kernels.reference import exact, outer_products

from .axis import Axis
from .layers import Layer
from .samples import Samples
from .statistics import Moments


class Use:
    """One module's capture. ``weight`` and ``bias`` are the plans of what is tracked of it."""

    def __init__(self, name: str, module: nn.Module, weight: Layer | None, bias: Layer | None) -> None:
        self.name, self.module, self.weight, self.bias = name, module, weight, bias

    def inputs(self, x: Tensor, out: Tensor) -> Tensor:
        """What the weight multiplies, uncompressed: [..., d_in]."""
        return x.to(out.dtype) if out.dtype.itemsize < x.dtype.itemsize else x  # autocast: as the layer saw it

    def save(self, x: Tensor, out: Tensor) -> Tensor | None:
        """What backward needs of the input: the compressed input, and no more."""
        raise NotImplementedError

    def emit(self, saved: Tensor | None, g: Tensor, samples: Samples) -> Iterator[tuple[Layer, Tensor]]:
        """The compressed gradients of this call, from what was saved and the output gradient."""
        if self.bias is not None:
            yield self.bias, sketched_sum(None, self.rows(g), self.bias.out_axis, samples)
        if self.weight is not None:
            assert saved is not None
            yield self.weight, self.emit_weight(self.weight, saved, g, samples)

    def emit_weight(self, layer: Layer, saved: Tensor, g: Tensor, samples: Samples) -> Tensor:
        raise NotImplementedError

    def observe(self, moments: Moments, saved: Tensor, g: Tensor, samples: Samples) -> None:
        """Add the second moments of this call, from its whole input and its output gradient."""
        rows = self.rows(g)
        samples.tie(rows)
        if self.bias is not None:
            moments.add_rows(self.bias, "out", summed(None, rows, samples))
        if self.weight is not None:
            self.observe_weight(moments, self.weight, saved, rows, samples)

    def observe_weight(self, moments: Moments, layer: Layer, saved: Tensor, rows: Tensor, samples: Samples) -> None:
        """Add those of the weight's two sides; `rows` is the output gradient as [*lead, d_out]."""
        raise NotImplementedError

    def rows(self, g: Tensor) -> Tensor:
        """The output gradient as [*lead, d_out]."""
        return g


def summed(a: Tensor | None, g: Tensor, samples: Samples) -> Tensor:
    """Return sum_t a_t * g_t of each sample, [N, d]; ``a`` None is all ones."""
    g, cu = samples.tie(g)
    return ops.compress_norm(None if a is None else samples.tie(a)[0], g, cu_seqlens=cu)


def sketched_sum(a: Tensor | None, g: Tensor, axis: Axis, samples: Samples) -> Tensor:
    """Sketch of sum_t a_t * g_t; ``a`` None is all ones, and is gathered already where the sketch is a gather."""
    g, cu = samples.tie(g)
    if a is not None:
        a, _ = samples.tie(a)
        if axis.is_gather:
            return ops.compress_norm(a, axis.apply(g), cu_seqlens=cu)
    if axis.matrix is not None:
        return axis.apply(ops.compress_norm(a, g, cu_seqlens=cu))
    index, weight = axis.table
    return ops.compress_norm(a, g, index, weight, axis.group if index is not None else 1, cu)


@exact
def sketched_outer(a: Tensor, g: Tensor, axis: Axis, samples: Samples) -> Tensor:
    """sum_t (S_out g_t) a_t^T for inputs ``a`` that are sketched already."""
    if axis.is_gather and not g.is_cuda:
        (a, cu), (g, _) = samples.tie(a), samples.tie(axis.apply(g))
        return outer_products(a, g, cu)  # the op without its checks
    if axis.matrix is not None:
        g = axis.apply(g)
    index, weight = (None, None) if axis.matrix is not None else axis.table
    group = axis.group if index is not None else 1
    (a, cu), (g, _) = samples.tie(a), samples.tie(g)
    return ops.compress_linear(a, g, None, None, index, weight, group, cu)
