"""A Kronecker-factored block of a Fisher matrix."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dropinf_kernels import gram_update

from ..ranks import Ranks
from .blocks import Block, total
from .cholesky import solver_dtype, spans
from .damping import Damping
from .ledger import Ledger


class KroneckerBlock(Block):
    """Kronecker factors of a layer's block, in the compressed space (K-FAC), and their correction (EK-FAC).

    With C_n the gradient `[k_out, k_in]`, `L = mean_n C_n C_n^T` and `R = mean_n C_n^T C_n`, the block is
    about `(L (x) R) / trace(L)`, which has the trace of F (K-FAC: Martens and Grosse 2015, arXiv 1503.05671).
    In the eigenbases U_L and U_R its eigenvalues are products; `correct` replaces them by the second moments
    that the gradients really have there, `S = mean_n (U_L^T C_n U_R)^2` (EK-FAC: George et al. 2018, arXiv
    1806.03884).
    """

    saved = ("left", "right", "moments", "_basis")
    counted = ("corrected",)

    def __init__(self, name: str, shape: tuple[int, int], damping: Damping) -> None:
        super().__init__(name, shape[0] * shape[1], damping)
        self.shape = shape
        self.left: Tensor | None = None  # [k_out, k_out]
        self.right: Tensor | None = None  # [k_in, k_in]
        self.moments: Tensor | None = None  # [k_out, k_in]
        self.corrected = 0
        self._basis: tuple[Tensor, Tensor, Tensor] | None = None

    def update(self, c: Tensor, ledger: Ledger) -> None:
        self._changed()
        self._count(c)
        dtype = solver_dtype(c.dtype)
        if self.left is None or self.right is None:
            left, right = (torch.zeros(size, size, dtype=dtype, device=c.device) for size in self.shape)
            self.left, self.right = ledger.fresh(left), ledger.fresh(right)
        for part in spans(len(c), self.width):
            block = c[part].to(self.left.device).reshape(-1, *self.shape)
            ledger.change(self.left, partial(gram_update, self.left, block.transpose(1, 2).flatten(0, 1)))
            ledger.change(self.right, partial(gram_update, self.right, block.flatten(0, 1)))

    def merge(self, other: Block, ledger: Ledger) -> None:
        assert isinstance(other, KroneckerBlock)
        self._changed()
        self._count_of(other)
        if other.left is None or other.right is None:
            return
        self.left, self.right = ledger.add(self.left, other.left), ledger.add(self.right, other.right)

    def correct(self, c: Tensor) -> None:
        """Add the gradients `[n, K]` to the second moments in the eigenbasis."""
        if self.moments is None:
            self.moments = torch.zeros_like(self._eigen()[2])
        self.corrected += len(c)
        for part in spans(len(c), self.width):
            self.moments = self.moments + self._rotate(c[part]).square().sum(0)

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

    def share_basis(self, ranks: Ranks) -> None:
        """Take the eigenbasis of rank 0: bases of equal matrices can differ where eigenvalues are close."""
        left, right, values = (ranks.sum(x if ranks.rank == 0 else torch.zeros_like(x)) for x in self._eigen())
        self._basis = left, right, values

    def all_reduce_correction(self, ranks: Ranks) -> None:
        """Add up what `correct` added on all ranks, each of its own samples."""
        moments = torch.zeros_like(self._eigen()[2]) if self.moments is None else self.moments
        self.moments = ranks.sum(moments)
        self.corrected = int(ranks.sum(torch.tensor(self.corrected)))

    def _reduce_sums(self, ranks: Ranks, dtype: torch.dtype) -> None:
        self._changed()
        self.left = total(self.left, (self.shape[0], self.shape[0]), ranks, dtype)
        self.right = total(self.right, (self.shape[1], self.shape[1]), ranks, dtype)

    def _sizes(self) -> dict[str, list[tuple[int, ...]]]:
        left, right = ((size, size) for size in self.shape)
        return {"left": [left], "right": [right], "moments": [self.shape], "_basis": [left, right, self.shape]}

    def _has_sums(self) -> bool:
        corrected = self.moments is None or (self._basis is not None and self.corrected > 0)
        return self.left is not None and self.right is not None and corrected

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
