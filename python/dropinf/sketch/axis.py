"""The sketch of one axis, as tables: what the ops take, and what is saved."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dropinf_kernels import sketch as _gather
from dropinf_kernels.ops.plain import gather_runs, runs_of


@dataclass(frozen=True, eq=False)
class Axis:
    """The sketch of one axis, R^size -> R^dim: a table (``index``, ``weight``), a dense ``matrix``, or both.

    Table: ``(S x)[j] = sum_f weight[f, j] * x[index[f, j]]``, ``index`` int32 [fan_in, dim], ``weight``
    float32 [fan_in, dim] or None (all ones). Dense: ``S x = matrix @ x``, ``matrix`` float32 [dim, size].
    Both: the matrix, [dim, kept], rotates the ``kept`` values of the table.
    ``group`` promises that ``index`` consists of aligned runs of that length.
    """

    size: int
    index: Tensor | None = None
    weight: Tensor | None = None
    matrix: Tensor | None = None
    group: int = 1

    @classmethod
    def identity(cls, size: int) -> Axis:
        """Return an axis of ``size`` that is kept whole."""
        return cls(size, torch.arange(size, dtype=torch.int32, device="cpu")[None], group=size)

    @property
    def dim(self) -> int:
        """The number of stored values, k."""
        if self.matrix is not None:
            return len(self.matrix)
        assert self.index is not None
        return int(self.index.shape[1])

    @property
    def is_whole(self) -> bool:
        """Whether nothing is dropped: the sketch is the identity."""
        return self.matrix is None and self.weight is None and self.dim == self.size

    @property
    def is_gather(self) -> bool:
        """Whether this is plain dropout: each output is one input, so the sketch commutes with elementwise products."""
        return self.matrix is None and self.weight is None

    @property
    def gathers_first(self) -> bool:
        """Whether values are gathered, one each, before anything else is made of them."""
        return self.index is not None and self.weight is None and not self.is_whole

    @cached_property
    def _runs(self) -> Tensor:
        """The runs of ``group`` that a gather keeps."""
        assert self.index is not None
        return runs_of(self.index[0], self.group)

    @property
    def table(self) -> tuple[Tensor | None, Tensor | None]:
        """(index, weight) as the ops take them: (None, None) where the axis is whole."""
        return (None, None) if self.is_whole else (self.index, self.weight)

    def apply(self, x: Tensor) -> Tensor:
        """Sketch [..., size] to [..., dim], in the dtype of ``x`` (at least float32 where ``matrix`` is used)."""
        if self.is_whole:
            return x
        if self.is_gather and not x.is_cuda:
            # The op without its checks.
            return gather_runs(x.detach() if x.requires_grad else x, self._runs, self.group)
        if self.index is not None:
            x = _gather(x, self.index, self.weight, self.group)
        return self.rotate(x)

    def rotate(self, gathered: Tensor) -> Tensor:
        """Multiply the values of the table, [..., kept], by the matrix, if there is one: [..., dim]."""
        if self.matrix is None:
            return gathered
        dtype = torch.promote_types(gathered.dtype, torch.float32)
        return gathered.to(dtype) @ self.matrix.to(dtype).T

    def spread(self, sketched: Tensor) -> Tensor:
        """Return ``S^T y``, the transpose of :meth:`apply`: [..., dim] to [..., size], in the dtype of ``y``
        (at least float32 where ``matrix`` is used)."""
        if self.is_whole:
            return sketched
        if self.matrix is not None:
            dtype = torch.promote_types(sketched.dtype, torch.float32)
            sketched = sketched.to(dtype) @ self.matrix.to(dtype)
        if self.index is None:
            return sketched
        found = sketched.new_zeros(*sketched.shape[:-1], self.size)
        for i, row in enumerate(self.index):
            part = sketched if self.weight is None else sketched * self.weight[i].to(sketched.dtype)
            found.index_add_(-1, row.long(), part)
        return found

    def fold(self, gathered: Tensor) -> Tensor:
        """Finish a table sketch whose ``index.flatten()`` is gathered already: [..., fan_in * dim] -> [..., dim]."""
        if self.weight is None:
            return gathered
        parts = gathered.view(*gathered.shape[:-1], len(self.weight), self.dim)
        return (parts * self.weight.to(gathered.dtype)).sum(-2)

    def scaled(self, factors: Tensor) -> Axis:
        """Return this sketch with every coordinate multiplied by its factor first.

        ``factors`` [size]; or [kept], of the table's values, where a rotation follows a table.
        """
        factors = factors.float()
        weight, matrix = self.weight, self.matrix
        if matrix is not None and (self.index is None or len(factors) == matrix.shape[1] != self.size):
            matrix = matrix * factors
        else:
            assert self.index is not None
            weight = factors[self.index.long()] * (1.0 if weight is None else weight)
        return Axis(self.size, self.index, weight, matrix, self.group)

    def to(self, device: torch.device) -> Axis:
        """Return the same sketch with its tables on ``device``."""
        tables = {name: table.to(device) for name, table in self.tensors().items()}
        if all(tables[name] is table for name, table in self.tensors().items()):
            return self
        return Axis(self.size, tables.get("index"), tables.get("weight"), tables.get("matrix"), self.group)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tables by field name, for saving and for :meth:`digest`."""
        parts = {"index": self.index, "weight": self.weight, "matrix": self.matrix}
        return {name: table for name, table in parts.items() if table is not None}

    def digest(self) -> bytes:
        """Return a fingerprint of the map: two axes with equal digests compress alike."""
        h = hashlib.blake2b(str(self.size).encode(), digest_size=16)
        for name, table in self.tensors().items():
            h.update(f"{name}{tuple(table.shape)}".encode())
            h.update(table.cpu().contiguous().numpy().tobytes())
        return h.digest()
