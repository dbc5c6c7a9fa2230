"""How each kind of module gives its compressed gradient: what to keep in forward, what to emit in backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropinf_kernels as ops
from dropinf_kernels.reference import exact, outer_products

from .axis import Axis
from .layers import Layer, rms_epsilon

# Flat masks of convolutions form the gradients of this many bytes of samples at a time.
CHUNK_BYTES = 1 << 24


class Untied(ValueError):  # noqa: N818
    """A tensor whose leading dimensions cannot be tied to samples."""


@dataclass(frozen=True)
class Samples:
    """Which rows of a batch belong to which sample: ``n`` samples, or documents packed at ``cu_seqlens``."""

    n: int
    cu_seqlens: Tensor | None = None

    def tie(self, x: Tensor, features: int = 1) -> tuple[Tensor, Tensor | None]:
        """[*lead, *features] -> ([N, T, *features], None); where packed ([rows, *features], cu_seqlens)."""
        if self.cu_seqlens is None and x.ndim == 2 + features and x.shape[0] == self.n:
            return x, None
        lead = x.shape[: x.ndim - features]
        kept = x.shape[x.ndim - features :]
        rows = lead.numel()
        if self.cu_seqlens is not None:
            if rows == int(self.cu_seqlens[-1]):
                return x.reshape(rows, *kept), self.cu_seqlens
            if rows == self.n:
                return x.reshape(rows, 1, *kept), None
            # Heads beside the positions, before or behind them: each position is several rows.
            positions = [i for i, size in enumerate(lead) if size == int(self.cu_seqlens[-1])]
            if len(positions) == 1:
                several = rows // lead[positions[0]]
                return x.movedim(positions[0], 0).reshape(rows, *kept), self.cu_seqlens * several
        elif self.n and (lead[0] if lead else 1) % self.n == 0:
            return x.reshape(self.n, rows // self.n, *kept), None
        raise Untied

    def select(self, x: Tensor, start: int) -> Tensor:
        """The rows of every second sample from ``start`` on."""
        rows, cu = self.tie(x)
        if cu is None:
            return rows[start::2]
        return rows[(torch.repeat_interleave(cu.diff()) % 2 == start % 2).to(rows.device)]

    def sum_parts(self, parts: Tensor) -> Tensor:
        """[N * m, ...] -> [N, ...]: the sum over the m parts of each sample."""
        if len(parts) == self.n:
            return parts
        if self.n == 0 or len(parts) % self.n:
            raise Untied
        return parts.view(self.n, -1, *parts.shape[1:]).sum(1)


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
            yield self.bias, _vector(None, self.rows(g), self.bias.out_axis, samples)
        if self.weight is not None:
            assert saved is not None
            yield self.weight, self.emit_weight(self.weight, saved, g, samples)

    def emit_weight(self, layer: Layer, saved: Tensor, g: Tensor, samples: Samples) -> Tensor:
        raise NotImplementedError

    def rows(self, g: Tensor) -> Tensor:
        """The output gradient as [*lead, d_out]."""
        return g


def _vector(a: Tensor | None, g: Tensor, axis: Axis, samples: Samples) -> Tensor:
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
def _outer(a: Tensor, g: Tensor, axis: Axis, samples: Samples) -> Tensor:
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


def _pairs(layer: Layer) -> tuple[Tensor, Tensor]:
    """The (row, column) of every coordinate that a flat mask keeps."""
    index = layer.out_axis.index
    assert index is not None
    columns = layer.matrix_shape[1]
    return index.flatten() // columns, index.flatten() % columns


class LinearUse(Use):
    """Linear, transformers' Conv1D, LoRA's A and B, quantized linears."""

    def __init__(self, name: str, module: nn.Module, weight: Layer | None, bias: Layer | None) -> None:
        super().__init__(name, module, weight, bias)
        self.is_flat = weight is not None and weight.in_axis is None
        if self.is_flat:
            assert weight is not None
            self.pair_rows, columns = _pairs(weight)
            self.used, inverse = torch.unique(columns, return_inverse=True)
            self.pair_columns = inverse.to(torch.int32)

    def save(self, x: Tensor, out: Tensor) -> Tensor | None:
        if self.weight is None:
            return None
        if self.weight.in_axis is not None:
            return self.inputs(self.weight.in_axis.apply(x), out)
        return self.inputs(x if len(self.used) == x.shape[-1] else x.index_select(-1, self.used), out)

    def emit_weight(self, layer: Layer, saved: Tensor, g: Tensor, samples: Samples) -> Tensor:
        if not self.is_flat:
            return _outer(saved, g, layer.out_axis, samples)
        (a, cu), (g, _) = samples.tie(saved), samples.tie(g)
        return layer.out_axis.fold(ops.compress_flat(a, g, self.pair_rows, self.pair_columns, cu))


class EmbeddingUse(Use):
    """Embedding: the input is the one-hot of the ids, by lookup."""

    def inputs(self, x: Tensor, out: Tensor) -> Tensor:  # noqa: ARG002
        return x

    def save(self, x: Tensor, out: Tensor) -> Tensor | None:  # noqa: ARG002
        return x

    @property
    def padding_idx(self) -> int:
        value = getattr(self.module, "padding_idx", None)
        return -1 if value is None else int(value)

    def emit_weight(self, layer: Layer, saved: Tensor, g: Tensor, samples: Samples) -> Tensor:
        (ids, cu), (g, _) = samples.tie(saved, 0), samples.tie(g)
        if layer.in_axis is None:
            rows, columns = _pairs(layer)
            if layer.kind == "tied":  # the matrix is [rows of the embedding, hidden]
                rows, columns = columns, rows
            g = g.masked_fill((ids == self.padding_idx)[..., None], 0)
            return layer.out_axis.fold(ops.compress_flat(ids, g, rows, columns, cu))
        tied = layer.kind == "tied"
        vocabulary, hidden = (layer.out_axis, layer.in_axis) if tied else (layer.in_axis, layer.out_axis)
        c = self._factorized(ids, g, cu, vocabulary, hidden)
        return c.mT if tied else c

    def _factorized(self, ids: Tensor, g: Tensor, cu: Tensor | None, vocabulary: Axis, hidden: Axis) -> Tensor:
        if hidden.matrix is not None:
            g = hidden.apply(g)
        index, weight = (None, None) if hidden.matrix is not None else hidden.table
        group = hidden.group if index is not None else 1
        if vocabulary.matrix is not None:
            g = g.masked_fill((ids == self.padding_idx)[..., None], 0)
            a = F.embedding(ids, vocabulary.matrix.T.to(torch.promote_types(g.dtype, torch.float32)))
            return ops.compress_linear(a, g, None, None, index, weight, group, cu)
        return ops.compress_embedding(
            ids, g, vocabulary.size, *vocabulary.table, index, weight, self.padding_idx, 1, cu
        )


class NormUse(Use):
    """LayerNorm, RMSNorm, GroupNorm, BatchNorm in eval mode: the gradient of the scale is a diagonal."""

    @property
    def channels_first(self) -> bool:
        return isinstance(self.module, nn.GroupNorm | nn.modules.batchnorm._BatchNorm)

    def rows(self, g: Tensor) -> Tensor:
        if not self.channels_first:
            return g.flatten(g.ndim - self._normalized_dims)
        return g.flatten(2).mT if g.ndim > 2 else g

    @property
    def _normalized_dims(self) -> int:
        return len(getattr(self.module, "normalized_shape", (0,)))

    def inputs(self, x: Tensor, out: Tensor) -> Tensor:
        m = self.module
        if isinstance(m, nn.GroupNorm):
            x = F.group_norm(x, m.num_groups, None, None, m.eps)
        elif isinstance(m, nn.modules.batchnorm._BatchNorm):
            x = F.batch_norm(x, m.running_mean, m.running_var, None, None, False, 0.0, m.eps)
        elif isinstance(m, nn.LayerNorm):
            x = F.layer_norm(x, m.normalized_shape, None, None, m.eps)
        elif isinstance(m, nn.RMSNorm):
            x = F.rms_norm(x, tuple(m.normalized_shape), None, m.eps)
        else:
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            epsilon = rms_epsilon(m)
            assert epsilon is not None
            x = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)
        return super().inputs(self.rows(x), out)

    def save(self, x: Tensor, out: Tensor) -> Tensor | None:
        if self.weight is None:
            return None
        normalized = self.inputs(x, out)
        return self.weight.out_axis.apply(normalized) if self.weight.out_axis.is_gather else normalized

    def is_scale_of(self, x: Tensor, out: Tensor) -> bool:
        """Whether the output is normalised input times weight, or times 1 + weight: RMSNorm's variants."""
        if self.weight is None or isinstance(self.module, nn.RMSNorm) or self.channels_first:
            return True
        if isinstance(self.module, nn.LayerNorm):
            return True
        scale = self.module.get_parameter("weight").detach()
        tolerance = 8 * torch.finfo(out.dtype).eps
        normalized = self.inputs(x, out)
        return any(
            torch.allclose(out, (normalized * s).to(out.dtype), tolerance, tolerance) for s in (scale, 1 + scale)
        )

    def emit_weight(self, layer: Layer, saved: Tensor, g: Tensor, samples: Samples) -> Tensor:
        return _vector(saved, self.rows(g), layer.out_axis, samples)


class ConvUse(Use):
    """Conv1d, Conv2d, Conv3d: the inputs are patches, gathered, never unfolded in memory."""

    def __init__(self, name: str, module: nn.Module, weight: Layer | None, bias: Layer | None) -> None:
        super().__init__(name, module, weight, bias)
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        self.conv = module
        self.kernel, self.stride = list(module.kernel_size), list(module.stride)
        self.dilation, self.groups = list(module.dilation), module.groups
        # F.pad's amounts, last dimension first; "same" may pad the two sides differently.
        self.pads: list[int] = list(module._reversed_padding_repeated_twice)
        uneven = any(a != b for a, b in zip(self.pads[::2], self.pads[1::2], strict=True))
        self.pad_first = uneven or module.padding_mode != "zeros"
        self.padding = [0] * len(self.kernel) if self.pad_first else self.pads[::2][::-1]

    def rows(self, g: Tensor) -> Tensor:
        return g.flatten(2).mT

    def inputs(self, x: Tensor, out: Tensor) -> Tensor:
        if x.ndim != len(self.kernel) + 2:
            raise Untied
        if self.pad_first:
            mode = self.conv.padding_mode
            x = F.pad(x, self.pads, "constant" if mode == "zeros" else mode)
        return super().inputs(x, out)

    @property
    def keeps_patches(self) -> bool:
        """The sketched patches are kept where they are smaller than the input, whose positions are as many as the
        output's, times the strides."""
        axis = None if self.weight is None else self.weight.in_axis
        if axis is None or self.groups > 1:
            return False
        shrinkage = torch.Size(self.stride).numel()
        return axis.matrix is not None or axis.dim <= self.conv.in_channels * shrinkage

    def save(self, x: Tensor, out: Tensor) -> Tensor | None:
        if self.weight is None:
            return None
        x = self.inputs(x, out)
        return self._patches(x) if self.keeps_patches else x

    def _patches(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        axis = self.weight.in_axis
        assert axis is not None
        if axis.matrix is not None and axis.index is None:
            # A dense sketch of patches is a convolution with the sketch's rows as its kernels.
            kernels = axis.matrix.to(torch.promote_types(x.dtype, torch.float32)).view(-1, x.shape[1], *self.kernel)
            function = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]
            patches: Tensor = function(x.to(kernels.dtype), kernels, None, self.stride, self.padding, self.dilation)
            return patches.flatten(2).mT
        assert axis.index is not None
        window = (self.kernel, self.stride, self.padding, self.dilation)
        return axis.rotate(ops.sketch_patches(x, *window, axis.index, axis.weight))

    def emit_weight(self, layer: Layer, saved: Tensor, g: Tensor, samples: Samples) -> Tensor:
        if self.keeps_patches:
            return samples.sum_parts(_outer(saved, self.rows(g), layer.out_axis, Samples(len(g))))
        size = max(1, CHUNK_BYTES // (4 * layer.matrix_shape[0] * layer.matrix_shape[1]))
        dense = layer.in_axis is None or layer.in_axis.matrix is not None or layer.out_axis.matrix is not None
        if not dense:
            assert layer.in_axis is not None
            return samples.sum_parts(self._call(saved, g, *layer.in_axis.table, *layer.out_axis.table))
        parts = [
            layer.compress_exact(self._call(x, dy).view(-1, *layer.shape))
            for x, dy in zip(saved.split(size), g.split(size), strict=True)
        ]
        return samples.sum_parts(torch.cat(parts))

    def _call(self, x: Tensor, g: Tensor, *tables: Tensor | None) -> Tensor:
        """The per-sample gradients of each image, sketched by (in_index, in_weight, out_index, out_weight)."""
        in_index, in_weight, out_index, out_weight = tables or (None,) * 4
        return ops.compress_conv(
            x,
            g,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            in_index,
            in_weight,
            out_index,
            out_weight,
        )


USES: dict[str, type[Use]] = {
    "linear": LinearUse,
    "conv": ConvUse,
    "embedding": EmbeddingUse,
    "norm": NormUse,
}
