"""How a convolution gives its compressed gradient: its inputs are patches, gathered, never unfolded in memory."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dropinf_kernels as ops

from ..sketch.axis import Axis
from .layer import Layer
from .modules import Use
from .moments import Moments
from .samples import Samples, Untied
from .sums import sketched_outer

# Flat masks of convolutions form the gradients of this many bytes of samples at a time.
CHUNK_BYTES = 1 << 24
_SPAN = 1 << 20  # elements of the largest part of an unfold


class ConvUse(Use):
    """Conv1d, Conv2d, Conv3d: the inputs are patches, gathered, never unfolded in memory."""

    settings = ("stride", "dilation", "groups", "padding", "padding_mode", "_reversed_padding_repeated_twice")

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

    def scaled(self, g: Tensor, factor: Tensor) -> Tensor:
        return g * factor.view(len(g), 1, *g.shape[2:])

    def inputs(self, x: Tensor, out: Tensor) -> Tensor:
        if x.ndim != len(self.kernel) + 2:
            raise Untied
        if self.pad_first:
            mode = self.conv.padding_mode
            x = F.pad(x, self.pads, "constant" if mode == "zeros" else mode)
        return super().inputs(x, out)

    @property
    def keeps_patches(self) -> bool:
        """Whether the sketched patches are kept instead of the input, since they are smaller.

        The input has as many positions as the output, times the strides.
        """
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
            return samples.sum_parts(sketched_outer(saved, self.rows(g), layer.out_axis, Samples(len(g))))
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
        """Return the gradient of each image, sketched by (in_index, in_weight, out_index, out_weight)."""
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

    def observe_weight(self, moments: Moments, layer: Layer, saved: Tensor, rows: Tensor, samples: Samples) -> None:  # noqa: ARG002
        moments.add_rows(layer, "out", rows)
        need = moments.need(layer, "in")
        if need is None:
            return
        kept = (need.kept or Axis.identity(layer.matrix_shape[1])).to(saved.device)
        assert kept.index is not None
        # A few samples and one group at a time, so that no full unfold exists.
        step = max(1, _SPAN // (kept.dim * math.prod(saved.shape[2:])))
        window = (self.kernel, self.stride, self.padding, self.dilation)
        for images in saved.split(step):
            for part in images.chunk(self.groups, 1):
                moments.add_moment(layer, "in", ops.sketch_patches(part, *window, kept.index, kept.weight))
