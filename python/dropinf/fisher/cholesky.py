"""Cholesky factors of a damped Fisher block, in the space of its columns or of its samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

SPAN = 1 << 24  # elements of the largest temporary
BLOCK = 256  # rows that are factored at a time


def spans(size: int, other: int) -> Iterator[slice]:
    """Yield slices covering `range(size)`, of at most SPAN elements when the other axis is `other` long."""
    step = max(1, SPAN // max(1, other))
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def solver_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to factor in: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Cholesky:
    """`lower lower^T` is `F + lambda I` in the primal; `N lambda I + C C^T` in the dual, where C is `unit rows`.

    What is solved is multiplied by `scale`. `ratio` is N lambda over the largest entry of the diagonal in the dual, and
    1 in the primal: how much of the space of the rows is damping.
    """

    lower: Tensor
    damping: float
    scale: float
    rows: Tensor | None
    unit: float
    ratio: float

    def solve(self, v: Tensor) -> Tensor:
        if self.rows is None:
            return self._divide(v.T).T.mul_(self.scale)
        x = self._divide(project(self.rows, v, self.unit))  # [N, n]
        solved = v.clone()
        for cols in spans(v.shape[1], len(self.rows)):
            solved[:, cols] -= x.T @ scaled_columns(self.rows, cols, v.dtype, self.unit)
        return solved.mul_(self.scale / self.damping)

    def _divide(self, x: Tensor) -> Tensor:
        """Return `(lower lower^T)^{-1} x`. cholesky_solve copies the factor, four times the work for a few columns."""
        half = torch.linalg.solve_triangular(self.lower, x, upper=False)
        whole: Tensor = torch.linalg.solve_triangular(self.lower.T, half, upper=True)
        return whole

    def quadratic(self, v: Tensor) -> Tensor:
        inner = v.T if self.rows is None else project(self.rows, v, self.unit)
        half: Tensor = torch.linalg.solve_triangular(self.lower, inner, upper=False)
        square = half.square().sum(0)
        if self.rows is None:
            return square.mul_(self.scale)
        # Non-negative in exact arithmetic; the difference can round below zero.
        return (v.square().sum(1) - square).mul_(self.scale / self.damping).clamp_min_(0)

    def whiten(self, v: Tensor) -> Tensor:
        """Return rows w [n, K] with `w(a) . w(b) = a^T (F + lambda I)^{-1} b`.

        In the primal `L^{-1} v`. In the dual the symmetric root: with `C C^T = U diag(s) U^T`,
        `w(v) = (v + C^T U diag((sqrt(r) - 1) / s) U^T C v) / sqrt(lambda)`, `r = N lambda / (N lambda + s)`.
        """
        rows, scale = self.rows, self.scale**0.5
        if rows is None:
            white: Tensor = torch.linalg.solve_triangular(self.lower, v.T, upper=False).T * scale
            return white
        shrink, basis = self._roots
        x = ((project(rows, v, self.unit).T.double() @ basis) * shrink @ basis.T).to(v.dtype)
        out = v.clone()
        for cols in spans(v.shape[1], len(rows)):
            out[:, cols] += x @ scaled_columns(rows, cols, v.dtype, self.unit)
        return out.mul_(scale / self.damping**0.5)

    @cached_property
    def _roots(self) -> tuple[Tensor, Tensor]:
        """Return `(sqrt(r) - 1) / s` and U, in fp64."""
        assert self.rows is not None
        ridge = len(self.rows) * self.damping
        inner = self.lower.double() @ self.lower.double().T
        inner.diagonal().sub_(ridge)
        values, basis = torch.linalg.eigh(inner)
        values = values.clamp_min(torch.finfo(torch.float64).tiny)
        # Without the difference of nearly equal numbers, for small s.
        ratio = ridge / (ridge + values)
        return -1 / ((ridge + values) * (1 + ratio.sqrt())), basis


def scaled_columns(rows: Tensor, cols: slice, dtype: torch.dtype, unit: float) -> Tensor:
    """Return some columns of the rows in a dtype, times `unit`."""
    part = rows[:, cols].to(dtype)
    return part if unit == 1 else part * unit


def project(rows: Tensor, v: Tensor, unit: float) -> Tensor:
    """Return `unit rows v^T` `[N, n]` in v's dtype, without a full-width copy of rows in that dtype."""
    out = v.new_zeros(len(rows), len(v))
    for cols in spans(rows.shape[1], len(rows)):
        out.addmm_(scaled_columns(rows, cols, v.dtype, unit), v[:, cols].T)
    return out


def cholesky(matrix: Tensor, least: float) -> Tensor | None:
    """Return the lower Cholesky factor, or None if the matrix is singular to within `least`. Overwrites the matrix.

    Each pivot is compared with its own diagonal entry, `L_ii^2 / A_ii`: the error of Cholesky depends on the
    matrix scaled to unit diagonal (Higham, Accuracy and Stability of Numerical Algorithms, section 10.1), so
    layers and columns of very different size are no reason to refuse.
    """
    diagonal = matrix.diagonal().clone()
    lower = _factor(matrix) if matrix.device.type == "cpu" else _checked(matrix)
    if lower is None:
        return None
    pivots = lower.diagonal().square() / diagonal
    return lower if float(pivots.min()) >= least else None


def _checked(matrix: Tensor) -> Tensor | None:
    lower, info = torch.linalg.cholesky_ex(matrix)
    return lower if int(info) == 0 else None


def _factor(matrix: Tensor) -> Tensor | None:
    """Factor in place, by blocks of rows of the upper triangle; return the factor turned, in LAPACK's order.

    cholesky_ex spends most of its time on clearing the other triangle of a large matrix, entry by entry.
    """
    size = len(matrix)
    for i in range(0, size, BLOCK):
        j = min(i + BLOCK, size)
        corner = _checked(matrix[i:j, i:j])
        if corner is None:
            return None
        matrix[i:j, i:j] = corner.T
        matrix[j:, i:j] = 0
        rows = torch.linalg.solve_triangular(corner, matrix[i:j, j:], upper=False)
        matrix[i:j, j:] = rows
        for k in range(j, size, BLOCK):
            matrix[k : k + BLOCK, k:].addmm_(rows[:, k - j : k - j + BLOCK].T, rows[:, k - j :], alpha=-1)
    return matrix.T
