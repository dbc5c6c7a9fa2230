"""Solvers of one Fisher block `F = (1/N) sum_n c_n c_n^T`: dense, diagonal and Kronecker-factored.

Each holds sums and a count: updates come in any order, merges add. Factorizations last until the sums change.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dropinf._cholesky import Cholesky, cholesky, solver_dtype, spans
from dropinf._damping import Damping, ledoit_wolf
from dropinf_kernels import gram_update

Form = Literal["primal", "dual"]


class Block(ABC):
    """One block of the Fisher matrix, of width K, over the `count` samples added so far.

    A block whose gradients are all zero solves to 0, whatever its damping: the training samples are zero
    there, so it adds nothing to any score.
    """

    saved: ClassVar[tuple[str, ...]]  # attributes that hold its sums: a tensor, several, or None

    def __init__(self, name: str, width: int, damping: Damping) -> None:
        self.name = name
        self.width = width
        self.damping = damping
        self.count = 0
        self.fourths = 0.0  # what ledoit_wolf asks for

    @abstractmethod
    def update(self, c: Tensor) -> None:
        """Add the gradients `[n, K]`."""

    @abstractmethod
    def merge(self, other: Block) -> None:
        """Add the sums of another block of the same kind and layer."""

    @abstractmethod
    def solve(self, v: Tensor) -> Tensor:
        """Return `(F + lambda I)^{-1} v` for each row of v `[n, K]`, in at least fp32."""

    @abstractmethod
    def quadratic(self, v: Tensor) -> Tensor:
        """Return `v^T (F + lambda I)^{-1} v` for each row of v `[n, K]`, as `[n]` in at least fp32."""

    @abstractmethod
    def whiten(self, v: Tensor) -> Tensor:
        """Return `w(v)` for each row of v, `[n, K]`, with `w(a) . w(b) = a^T (F + lambda I)^{-1} b`."""

    def with_damping(self, damping: Damping) -> Block:
        """Return a block of the same sums, its own copies."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(other, name, value.clone())
            elif isinstance(value, list):
                setattr(other, name, list(value))
        other.damping = damping
        return other

    def _count(self, c: Tensor) -> None:
        self.count += len(c)
        self._add_fourths(c)

    def _add_fourths(self, c: Tensor) -> None:
        for part in spans(len(c), self.width):
            self.fourths += self._fourths(c[part].to(solver_dtype(c.dtype)))

    def _count_of(self, other: Block) -> None:
        self.count += other.count
        self.fourths += other.fourths

    def _fourths(self, c: Tensor) -> float:
        """Return `sum_n |c_n|^4`, and each coordinate's own where coordinates are known apart."""
        return float(torch.linalg.vector_norm(c, dim=1).double().pow(4).sum())

    def _chosen(self, mean_diagonal: float, squares: float, fourths: float) -> float:
        return ledoit_wolf(self.count, self.width, mean_diagonal, squares, fourths)

    def singular(self, mean_diagonal: float) -> ValueError:
        """Return the error for a matrix that cannot be solved with this damping."""
        way = "damping=0.1"
        if self.damping.absolute:
            way = f"damping={0.1 * mean_diagonal:.3g} with absolute=True, or damping=0.1 with absolute=False"
        return ValueError(
            f"layer {self.name!r}: the Fisher matrix of N={self.count} samples and K={self.width} columns is "
            f"singular to working precision with damping={self.damping}; use a larger one, e.g. {way}"
        )


class DenseBlock(Block):
    """A full K x K block, held as its rows while N < K and as their Gram sum from then on.

    With C the rows `[N, K]`, Woodbury's identity gives
    `(F + lambda I)^{-1} v = (v - C^T (N lambda I + C C^T)^{-1} C v) / lambda`, an N x N solve.
    """

    saved = ("rows", "gram")

    def __init__(self, name: str, width: int, damping: Damping, form: Form | None = None) -> None:
        super().__init__(name, width, damping)
        self.form = form
        self.rows: list[Tensor] = []
        self.gram: Tensor | None = None
        self._factor: Cholesky | None = None
        self._inner: dict[torch.dtype, Tensor] = {}  # C C^T, which another damping needs too

    def update(self, c: Tensor) -> None:
        self._factor, self._inner = None, {}
        self.count += len(c)
        self.rows.append(c)
        if self.gram is not None or self.form == "primal" or (self.form is None and self.count >= self.width):
            self._fold_rows()

    def merge(self, other: Block) -> None:
        assert isinstance(other, DenseBlock)
        self._factor, self._inner = None, {}
        self._count_of(other)
        self.rows += other.rows
        if other.gram is not None or self.gram is not None or (self.form is None and self.count >= self.width):
            self._fold_rows()
        if other.gram is not None:
            self.gram = other.gram.clone() if self.gram is None else self.gram + other.gram.to(self.gram.device)

    def solve(self, v: Tensor) -> Tensor:
        factor = self._factorized()
        out = torch.zeros_like(v, dtype=solver_dtype(v.dtype))
        if factor is not None:
            for part in spans(len(v), self.width):
                out[part] = factor.solve(v[part].to(factor.lower.dtype))
        return out

    def quadratic(self, v: Tensor) -> Tensor:
        factor = self._factorized()
        out = torch.zeros(len(v), dtype=solver_dtype(v.dtype), device=v.device)
        if factor is not None:
            for part in spans(len(v), self.width):
                out[part] = factor.quadratic(v[part].to(factor.lower.dtype))
        return out

    def whiten(self, v: Tensor) -> Tensor:
        factor = self._factorized()
        out = torch.zeros_like(v, dtype=solver_dtype(v.dtype))
        if factor is not None:
            root = factor.root()
            for part in spans(len(v), self.width):
                out[part] = root(v[part].to(factor.lower.dtype))
        return out

    def with_damping(self, damping: Damping) -> Block:
        other = super().with_damping(damping)
        assert isinstance(other, DenseBlock)
        other._factor = None
        return other

    def _fold_rows(self) -> None:
        """Turn the rows into their Gram sum."""
        pieces, self.rows = self.rows, []
        for piece in pieces:
            dtype = solver_dtype(piece.dtype)
            if self.gram is None:
                self.gram = torch.zeros(self.width, self.width, dtype=dtype, device=piece.device)
            elif torch.promote_types(self.gram.dtype, dtype) != self.gram.dtype:
                self.gram = self.gram.to(dtype)
            gram_update(self.gram, piece.to(self.gram.device))
            self._add_fourths(piece)

    def _factorized(self) -> Cholesky | None:
        """Return the cached factorization, or None if every gradient of this block is zero."""
        if self._factor is None:
            if self.gram is None and len(self.rows) != 1:
                dtype = max((row.dtype for row in self.rows), key=lambda d: torch.finfo(d).bits)
                self.rows = [torch.cat([row.to(self.rows[0].device, dtype) for row in self.rows])]
            trace = self._trace()
            if trace == 0:
                return None
            self._factor = self._factorize(trace / (self.count * self.width))
        return self._factor

    def _trace(self) -> float:
        """Return `sum_n |c_n|^2`."""
        if self.gram is not None:
            return float(self.gram.diagonal().sum(dtype=torch.float64))
        return float(torch.linalg.vector_norm(self.rows[0], dtype=torch.float64).square())

    def _spread(self) -> tuple[float, float]:
        """Return |F|^2 and sum_n |c_n|^4; rows that are held give both from C C^T."""
        if self.gram is not None:
            return float(self.gram.double().square().sum()) / self.count**2, self.fourths
        inner = self._matrix(solver_dtype(self.rows[0].dtype), 0.0).double()
        return float(inner.square().sum()) / self.count**2, float(inner.diagonal().square().sum())

    def _factorize(self, mean_diagonal: float) -> Cholesky:
        lam, scale = self.damping.of(mean_diagonal, lambda: self._chosen(mean_diagonal, *self._spread()))
        if lam == 0 and self.count < self.width:
            raise self.singular(mean_diagonal)
        held = self.rows[0] if self.gram is None else self.gram
        dual, dtype = self.gram is None, solver_dtype(held.dtype)
        # Pivots that are zero but for rounding were seen at up to 14 eps for widths up to 1024.
        noise = 10 + len(held) ** 0.5
        # A Gram sum in fp32 carries rounding of its own that fp64 cannot undo; rows are exact.
        attempts = [(torch.float64, noise * torch.finfo(torch.float64 if dual else dtype).eps)]
        if dtype != torch.float64:
            # The dual subtracts nearly equal vectors and divides by lambda: leave it four digits.
            attempts.insert(0, (dtype, max(len(held), 1e4 if dual else noise) * torch.finfo(dtype).eps))
        for dtype, least in attempts:
            matrix = self._matrix(dtype, lam)
            if dual and self.count * lam < least * float(matrix.diagonal().max()):
                continue
            lower = cholesky(matrix, least)
            if lower is not None:
                return Cholesky(lower, lam, scale, held if dual else None)
        raise self.singular(mean_diagonal)

    def _matrix(self, dtype: torch.dtype, lam: float) -> Tensor:
        if self.gram is not None:
            matrix = self.gram.to(dtype) / self.count
            matrix.diagonal().add_(lam)
            return matrix
        if dtype not in self._inner:
            rows = self.rows[0]
            inner = torch.zeros(len(rows), len(rows), dtype=dtype, device=rows.device)
            for cols in spans(self.width, len(rows)):
                part = rows[:, cols].to(dtype)
                inner.addmm_(part, part.T)
            self._inner[dtype] = inner
        matrix = self._inner[dtype].clone()
        matrix.diagonal().add_(self.count * lam)
        return matrix


class DiagonalBlock(Block):
    """The diagonal of a block."""

    saved = ("squares",)

    def __init__(self, name: str, width: int, damping: Damping) -> None:
        super().__init__(name, width, damping)
        self.squares: Tensor | None = None  # [K]

    def update(self, c: Tensor) -> None:
        self._count(c)
        for part in spans(len(c), self.width):
            self._add(c[part].to(solver_dtype(c.dtype)).square().sum(0))

    def merge(self, other: Block) -> None:
        assert isinstance(other, DiagonalBlock)
        self._count_of(other)
        if other.squares is not None:
            self._add(other.squares)

    def solve(self, v: Tensor) -> Tensor:
        return v * self._inverse()

    def quadratic(self, v: Tensor) -> Tensor:
        inverse = self._inverse()
        out = torch.empty(len(v), dtype=solver_dtype(v.dtype), device=v.device)
        for part in spans(len(v), self.width):
            out[part] = v[part].to(inverse.dtype).square() @ inverse
        return out

    def whiten(self, v: Tensor) -> Tensor:
        return v * self._inverse().sqrt()

    def _fourths(self, c: Tensor) -> float:
        return float(c.double().square().square().sum())

    def _add(self, squares: Tensor) -> None:
        self.squares = squares.clone() if self.squares is None else self.squares + squares.to(self.squares.device)

    def _inverse(self) -> Tensor:
        assert self.squares is not None
        diagonal = self.squares / self.count
        mean = float(diagonal.mean(dtype=torch.float64))
        if mean == 0:
            return diagonal
        squares = float(diagonal.double().square().sum())
        lam, scale = self.damping.of(mean, lambda: self._chosen(mean, squares, self.fourths))
        diagonal = diagonal + lam
        if float(diagonal.min()) == 0:
            raise self.singular(mean)
        return diagonal.reciprocal_().mul_(scale)


class KroneckerBlock(Block):
    """Kronecker factors of a layer's block, in the compressed space (K-FAC), and their correction (EK-FAC).

    With C_n the gradient `[k_out, k_in]`, `L = mean_n C_n C_n^T` and `R = mean_n C_n^T C_n`, the block is
    about `(L (x) R) / trace(L)`, which has the trace of F (K-FAC: Martens and Grosse 2015, arXiv 1503.05671).
    In the eigenbases U_L and U_R its eigenvalues are products; `correct` replaces them by the second moments
    that the gradients really have there, `S = mean_n (U_L^T C_n U_R)^2` (EK-FAC: George et al. 2018, arXiv
    1806.03884).
    """

    saved = ("left", "right", "moments", "_basis")

    def __init__(self, name: str, shape: tuple[int, int], damping: Damping) -> None:
        super().__init__(name, shape[0] * shape[1], damping)
        self.shape = shape
        self.left: Tensor | None = None  # [k_out, k_out]
        self.right: Tensor | None = None  # [k_in, k_in]
        self.moments: Tensor | None = None  # [k_out, k_in]
        self.corrected = 0
        self._basis: tuple[Tensor, Tensor, Tensor] | None = None

    def update(self, c: Tensor) -> None:
        self._changed()
        self._count(c)
        dtype = solver_dtype(c.dtype)
        if self.left is None or self.right is None:
            self.left = torch.zeros(self.shape[0], self.shape[0], dtype=dtype, device=c.device)
            self.right = torch.zeros(self.shape[1], self.shape[1], dtype=dtype, device=c.device)
        for part in spans(len(c), self.width):
            block = c[part].to(self.left.device).reshape(-1, *self.shape)
            gram_update(self.left, block.transpose(1, 2).flatten(0, 1))
            gram_update(self.right, block.flatten(0, 1))

    def merge(self, other: Block) -> None:
        assert isinstance(other, KroneckerBlock)
        self._changed()
        self._count_of(other)
        if other.left is None or other.right is None:
            return
        if self.left is None or self.right is None:
            self.left, self.right = other.left.clone(), other.right.clone()
        else:
            self.left = self.left + other.left.to(self.left.device)
            self.right = self.right + other.right.to(self.right.device)

    def correct(self, c: Tensor) -> None:
        """Add the gradients `[n, K]` to the second moments in the eigenbasis."""
        if self.moments is None:
            self.moments = torch.zeros_like(self._eigen()[2])
        self.corrected += len(c)
        for part in spans(len(c), self.width):
            self.moments += self._rotate(c[part]).square().sum(0)

    def solve(self, v: Tensor) -> Tensor:
        left, right, _ = self._eigen()
        inverse = self._inverse()
        out = torch.empty_like(v, dtype=solver_dtype(v.dtype))
        for part in spans(len(v), self.width):
            out[part] = (left @ (self._rotate(v[part]) * inverse) @ right.T).flatten(1)
        return out

    def quadratic(self, v: Tensor) -> Tensor:
        inverse = self._inverse()
        out = torch.empty(len(v), dtype=solver_dtype(v.dtype), device=v.device)
        for part in spans(len(v), self.width):
            out[part] = (self._rotate(v[part]).square() * inverse).sum((1, 2))
        return out

    def whiten(self, v: Tensor) -> Tensor:
        root = self._inverse().sqrt()
        out = torch.empty_like(v, dtype=solver_dtype(v.dtype))
        for part in spans(len(v), self.width):
            out[part] = (self._rotate(v[part]) * root).flatten(1)
        return out

    def _changed(self) -> None:
        self._basis = self.moments = None
        self.corrected = 0

    def _rotate(self, v: Tensor) -> Tensor:
        """Return `U_L^T V U_R` for each row of v `[n, K]`, as `[n, k_out, k_in]`."""
        left, right, _ = self._eigen()
        rotated: Tensor = left.T @ v.to(left.device, left.dtype).reshape(-1, *self.shape) @ right
        return rotated

    def _eigen(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return U_L, U_R and the product eigenvalues `[k_out, k_in]`."""
        if self._basis is None:
            assert self.left is not None
            assert self.right is not None
            left, basis_left = torch.linalg.eigh(self.left / self.count)
            right, basis_right = torch.linalg.eigh(self.right / self.count)
            # Eigenvalues of a sum of squares; rounding can push a zero below zero.
            left, right = left.clamp_min(0), right.clamp_min(0)
            values = torch.outer(left, right / right.sum().clamp_min(torch.finfo(right.dtype).tiny))
            self._basis = basis_left, basis_right, values
        return self._basis

    def _inverse(self) -> Tensor:
        """Return `1 / (S + lambda)`, `[k_out, k_in]`, scaled as the damping says."""
        values = self._eigen()[2] if self.moments is None else self.moments / self.corrected
        largest, mean = float(values.max()), float(values.mean(dtype=torch.float64))
        if mean == 0:
            return values
        squares = float(values.double().square().sum())
        lam, scale = self.damping.of(mean, lambda: self._chosen(mean, squares, self.fourths))
        # What eigh cannot tell from zero is zero, unless a damping stands in for it.
        least = torch.finfo(values.dtype).eps * largest * (max(self.shape) if lam == 0 else 1)
        damped = values + lam
        if float(damped.min()) < least:
            raise self.singular(mean)
        return damped.reciprocal_().mul_(scale)
