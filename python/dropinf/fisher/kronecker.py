"""A Kronecker-factored block of a Fisher matrix."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from dropinf_kernels import gram_update

from ..ranks import Ranks
from .blocks import Block, Product, Rows, reciprocal, total
from .cholesky import solver_dtype, spans
from .damping import Damping
from .ledger import Ledger
from .scale import largest


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
        self.count += len(c)
        self._measure(c, ledger)
        dtype = solver_dtype(c.dtype)
        if self.left is None or self.right is None:
            left, right = (torch.zeros(size, size, dtype=dtype, device=c.device) for size in self.shape)
            self.left, self.right = ledger.fresh(left), ledger.fresh(right)
        for scaled in self._scaled(c):
            for part in spans(len(scaled), self.width):
                block = scaled[part].to(self.left.device).reshape(-1, *self.shape)
                ledger.change(self.left, partial(gram_update, self.left, block.transpose(1, 2).flatten(0, 1)))
                ledger.change(self.right, partial(gram_update, self.right, block.flatten(0, 1)))

    def merge(self, other: Block, ledger: Ledger) -> None:
        assert isinstance(other, KroneckerBlock)
        self._changed()
        self.count += other.count
        factor = self._meet(other, ledger)
        if other.left is None or other.right is None:
            return
        left, right = (x if factor == 1 else x * factor for x in (other.left, other.right))
        self.left, self.right = ledger.add(self.left, left), ledger.add(self.right, right)

    def correct(self, c: Tensor, ledger: Ledger) -> None:
        """Add the gradients `[n, K]` to the second moments in the eigenbasis."""
        self._eigen()  # of the factors as they are: a larger scale may leave nothing of them
        self._fit(largest(c), ledger)
        if self.moments is None:
            self.moments = torch.zeros_like(self._eigen()[2])
        self.corrected += len(c)
        for scaled in self._scaled(c):
            for part in spans(len(scaled), self.width):
                self.moments = self.moments + self._rotate(scaled[part]).square().sum(0)

    def _prepare(self, what: Product) -> Rows | None:
        inverse = self._inverse()
        if inverse is None:
            return None
        if what == "quadratic":
            return lambda v: (self._rotate(v).square() * inverse).sum((1, 2))
        root = inverse.sqrt()
        if what == "whiten":
            return lambda v: (self._rotate(v) * root).flatten(1)
        left, right = (basis.to(inverse.dtype) for basis in self._eigen()[:2])
        return lambda v: (left @ (self._rotate(v) * inverse) @ right.T).flatten(1)

    def _squares(self) -> float:
        return 0.0 if self.left is None else float(self.left.diagonal().sum(dtype=torch.float64))

    def correction(self) -> tuple[int, float]:
        """Return of how many samples the corrected eigenvalues are, and the mean of their `|c_n|^2`."""
        total = 0.0 if self.moments is None else float(self.moments.sum(dtype=torch.float64))
        return self.corrected, total * 4.0 ** self._power() / max(1, self.corrected)

    def _rescale(self, factor: float, ledger: Ledger) -> None:
        for total_ in (self.left, self.right):
            if total_ is not None:
                ledger.change(total_, partial(total_.mul_, factor))
        if self.moments is not None:
            self.moments = self.moments * factor
        if self._basis is not None:
            self._basis = *self._basis[:2], self._basis[2] * factor

    def share_basis(self, ranks: Ranks) -> None:
        """Take the eigenbasis of rank 0: bases of equal matrices can differ where eigenvalues are close."""
        left, right, values = (ranks.sum(x if ranks.rank == 0 else torch.zeros_like(x)) for x in self._eigen())
        self._basis = left, right, values

    def all_reduce_correction(self, ranks: Ranks) -> None:
        """Add up what `correct` added on all ranks, each of its own samples."""
        self._agree(ranks)
        moments = torch.zeros_like(self._eigen()[2]) if self.moments is None else self.moments
        self.moments = ranks.sum(moments)
        self.corrected = int(ranks.sum(torch.tensor(self.corrected, device="cpu")))

    def _reduce_sums(self, ranks: Ranks, dtype: torch.dtype) -> None:
        self._changed()
        self._agree(ranks)
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
            (left, basis_left), (right, basis_right) = (self._eigh(x / self.count) for x in (self.left, self.right))
            # Eigenvalues of a sum of squares; rounding can push a zero below zero.
            left, right = left.clamp_min(0), right.clamp_min(0)
            values = torch.outer(left, right / right.sum().clamp_min(torch.finfo(right.dtype).tiny))
            self._basis = basis_left, basis_right, values
        return self._basis

    def _eigh(self, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Return eigenvalues and eigenvectors; one that fails in fp32, or gives NaN, is asked in fp64."""
        if not bool(factor.diagonal().sum().isfinite()):
            raise self._not_finite()
        try:
            values, basis = torch.linalg.eigh(factor)
            failed = not bool(values.sum().isfinite() & basis.sum().isfinite())
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            failed = True
        if failed:
            values, basis = (x.to(factor.dtype) for x in torch.linalg.eigh(factor.double()))
        return values, basis

    def _inverse(self) -> Tensor | None:
        """Return `1 / (S + lambda)`, `[k_out, k_in]`, scaled as the damping says; None if it is zero everywhere."""
        values = self._eigen()[2] if self.moments is None else self.moments / self.corrected
        top, mean = float(values.max()), float(values.mean(dtype=torch.float64))
        if mean == 0:
            return None
        squares = float(values.double().square().sum())
        # What eigh cannot tell from zero is zero, unless a damping stands in for it.
        least = torch.finfo(values.dtype).eps * top

        def attempt(lam: float) -> Tensor | None:
            return reciprocal(values, lam, least * (max(self.shape) if lam == 0 else 1))

        inverse, scale = self._damped(mean, lambda: self._chosen(mean, squares, self.fourths), attempt)
        return inverse * scale
