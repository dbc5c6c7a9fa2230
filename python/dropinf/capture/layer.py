"""The plan of one parameter: how its per-sample gradient is compressed."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from ..sketch.axis import Axis

LayerKind = Literal["linear", "conv", "embedding", "norm", "bias", "tied", "flat"]
_WRAPPER = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.|$)")


@dataclass(frozen=True, eq=False)
class Layer:
    """The plan of one parameter: how its per-sample gradient, seen as a matrix [d_out, d_in], is compressed.

    ``out_axis`` and ``in_axis`` sketch its two sides; ``in_axis`` is None for vectors and for ``flat`` layers,
    where ``out_axis`` sketches the flattened matrix. ``route`` is ``"hook"`` where the gradient is compressed
    as it is formed and ``"exact"`` where it is computed by torch.func first.
    """

    name: str
    kind: LayerKind
    parameter: str
    shape: tuple[int, ...]
    transposed: bool
    out_axis: Axis
    in_axis: Axis | None
    route: Literal["hook", "exact"]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of one compressed gradient: (k_out, k_in) or (k,)."""
        return (self.out_axis.dim,) if self.in_axis is None else (self.out_axis.dim, self.in_axis.dim)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """[d_out, d_in] of the gradient seen as a matrix; d_in is 1 for vectors."""
        return matrix_shape(self.shape, self.transposed)

    def as_matrix(self, gradient: Tensor) -> Tensor:
        """Return gradients [N, *shape] as matrices [N, d_out, d_in]."""
        flat = gradient.reshape(len(gradient), self.shape[0] if self.shape else 1, -1)
        return flat.mT if self.transposed else flat

    @property
    def is_gather(self) -> bool:
        """Whether this is plain dropout: each stored value is one entry of the gradient."""
        return all(axis.is_gather for axis in (self.out_axis, self.in_axis) if axis is not None)

    @cached_property
    def entries(self) -> Tensor:
        """The positions in the flattened parameter of the entries that a gather stores, int64 [k]."""
        rows, columns = self.matrix_shape
        assert self.out_axis.index is not None
        index = self.out_axis.index[0].long()
        if self.in_axis is None:
            return (index % columns) * rows + index // columns if self.transposed else index
        assert self.in_axis.index is not None
        others = self.in_axis.index[0].long()
        found = others * rows + index[:, None] if self.transposed else index[:, None] * columns + others
        return found.flatten()

    def compress_exact(self, gradient: Tensor) -> Tensor:
        """Sketch a whole per-sample gradient [N, *shape] -> [N, *stored_shape]."""
        if self.is_gather:
            flat = gradient.reshape(len(gradient), torch.Size(self.shape).numel())
            return flat.index_select(1, self.entries).view(-1, *self.stored_shape)
        matrix = self.as_matrix(gradient)
        if self.in_axis is None:
            return self.out_axis.apply(matrix.reshape(len(matrix), -1))
        return self.out_axis.apply(self.in_axis.apply(matrix).mT).mT

    def spread(self, stored: Tensor) -> Tensor:
        """Return the transpose of :meth:`compress_exact`: [N, *stored_shape] -> [N, *shape]; zero where it drops."""
        if self.is_gather:
            flat = stored.new_zeros(len(stored), torch.Size(self.shape).numel())
            return flat.index_add_(1, self.entries, stored.flatten(1)).view(-1, *self.shape)
        if self.in_axis is None:
            matrix = self.out_axis.spread(stored).view(len(stored), *self.matrix_shape)
        else:
            matrix = self.in_axis.spread(self.out_axis.spread(stored.mT).mT)
        return (matrix.mT if self.transposed else matrix).reshape(-1, *self.shape)

    def to(self, device: torch.device) -> Layer:
        """Return the plan with its tables on ``device``."""
        out_axis, in_axis = self.out_axis.to(device), None if self.in_axis is None else self.in_axis.to(device)
        if out_axis is self.out_axis and in_axis is self.in_axis:
            return self
        return replace(self, out_axis=out_axis, in_axis=in_axis)


def matrix_shape(shape: tuple[int, ...], transposed: bool) -> tuple[int, int]:
    """Return [d_out, d_in] of a parameter: its first dimension against the rest, swapped where transposed."""
    rows = shape[0] if shape else 1
    columns = torch.Size(shape[1:]).numel()
    return (columns, rows) if transposed else (rows, columns)


def clean_name(name: str) -> str:
    """Return a module's name without what compile, checkpoint and FSDP wrappers insert, so that masks agree."""
    return _WRAPPER.sub("", name).lstrip(".")
