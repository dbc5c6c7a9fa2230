"""A full block of a Fisher matrix."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from dropinf_kernels import gram_update

from ..ranks import Ranks
from .blocks import Block, Product, Rows, total
from .cholesky import Cholesky, cholesky, scaled_columns, solver_dtype, spans
from .damping import Damping
from .ledger import Ledger
from .scale import largest

Form = Literal["primal", "dual"]
# The dual subtracts nearly equal vectors and divides by lambda. With N lambda at least so many eps of the largest
# |c_n|^2, products of the result with the rows keep four digits of fp32.
_KEPT = 4e4
_PIVOT = 128  # eps: seen are errors of 2.5 eps over the least pivot


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

    def update(self, c: Tensor, ledger: Ledger) -> None:
        self._factor, self._inner = None, {}
        self.count += len(c)
        self.rows.append(c)
        if self.gram is not None or self.form == "primal" or (self.form is None and self.count >= self.width):
            self._fold_rows(ledger)

    def merge(self, other: Block, ledger: Ledger) -> None:
        assert isinstance(other, DenseBlock)
        self._factor, self._inner = None, {}
        self.count += other.count
        self.rows += other.rows
        if other.gram is not None or self.gram is not None or (self.form is None and self.count >= self.width):
            self._fold_rows(ledger)
        factor = self._meet(other, ledger)
        if other.gram is not None:
            self.gram = ledger.add(self.gram, other.gram if factor == 1 else other.gram * factor)

    def result_dtype(self, dtype: torch.dtype, what: Product) -> torch.dtype:
        """Return float64 where rounding to float32 would lose what products of the results with the rows are."""
        factor = None if what == "quadratic" else self._factorized()
        least = _KEPT * torch.finfo(torch.float32).eps
        if factor is None or factor.ratio >= (least if what == "solve" else least * least):
            return solver_dtype(dtype)
        return torch.float64

    def _prepare(self, what: Product) -> Rows | None:
        factor = self._factorized()
        if factor is None:
            return None
        apply = {"solve": factor.solve, "quadratic": factor.quadratic, "whiten": factor.whiten}[what]
        return lambda v: apply(v.to(factor.lower.dtype))

    def _rescale(self, factor: float, ledger: Ledger) -> None:
        if self.gram is not None:
            ledger.change(self.gram, partial(self.gram.mul_, factor))

    def with_damping(self, damping: Damping) -> Block:
        other = super().with_damping(damping)
        assert isinstance(other, DenseBlock)
        other._factor = None
        return other

    def _reduce_sums(self, ranks: Ranks, dtype: torch.dtype) -> None:
        self._factor, self._inner = None, {}
        folded = int(ranks.sum(torch.tensor(int(self.gram is not None), device="cpu")))
        if folded or self.count >= self.width:
            ledger = Ledger()
            if self.gram is not None:
                ledger.fresh(self.gram)
            self._fold_rows(ledger)
            self._agree(ranks)
            self.gram = total(self.gram, (self.width, self.width), ranks, dtype)
        else:  # fewer rows than columns, of all ranks together
            rows = torch.cat([torch.empty(0, self.width, dtype=dtype, device="cpu"), *self.rows])
            self.rows = [torch.cat(ranks.gather(rows))]

    def _sizes(self) -> dict[str, list[tuple[int, ...]]]:
        return {"rows": [(self.count, self.width)], "gram": [(self.width, self.width)]}

    def _has_sums(self) -> bool:
        return bool(self.rows) != (self.gram is not None)

    def _fold_rows(self, ledger: Ledger) -> None:
        """Turn the rows into their Gram sum."""
        pieces, self.rows = self.rows, []
        for piece in pieces:
            dtype = solver_dtype(piece.dtype)
            if self.gram is None:
                self.gram = ledger.fresh(torch.zeros(self.width, self.width, dtype=dtype, device=piece.device))
            elif torch.promote_types(self.gram.dtype, dtype) != self.gram.dtype:
                self.gram = ledger.fresh(self.gram.to(dtype))
            self._measure(piece, ledger)
            for scaled in self._scaled(piece):
                ledger.change(self.gram, partial(gram_update, self.gram, scaled.to(self.gram.device)))

    def _factorized(self) -> Cholesky | None:
        """Return the cached factorization, or None if every gradient of this block is zero."""
        if self._factor is None:
            if self.gram is None and len(self.rows) != 1:
                dtype = max((row.dtype for row in self.rows), key=lambda d: torch.finfo(d).bits)
                self.rows = [torch.cat([row.to(self.rows[0].device, dtype) for row in self.rows])]
            if self.gram is None:
                self._fit(largest(self.rows[0]), Ledger())
            trace = self._squares()
            if trace == 0:
                return None
            mean = trace / (self.count * self.width)
            factor, scale = self._damped(mean, lambda: self._chosen(mean, *self._spread()), self._factorize)
            self._factor = replace(factor, scale=scale)
        return self._factor

    def _squares(self) -> float:
        if self.gram is not None:
            return float(self.gram.diagonal().sum(dtype=torch.float64))
        norms = (torch.linalg.vector_norm(row, dtype=torch.float64) for row in self.rows)
        return sum(float(norm.square()) for norm in norms) * 4.0 ** -self._power()

    def _spread(self) -> tuple[float, float]:
        """Return |F|^2 and sum_n |c_n|^4; rows that are held give both from C C^T."""
        if self.gram is not None:
            return float(self.gram.double().square().sum()) / self.count**2, self.fourths
        inner = self._matrix(solver_dtype(self.rows[0].dtype), 0.0).double()
        return float(inner.square().sum()) / self.count**2, float(inner.diagonal().square().sum())

    def _factorize(self, lam: float) -> Cholesky | None:
        """Return the factorization, in fp32 where that is enough, or None if lambda is too small."""
        if lam == 0 and self.count < self.width:
            return None
        held = self.rows[0] if self.gram is None else self.gram
        dual, dtype = self.gram is None, solver_dtype(held.dtype)
        # Pivots that are zero but for rounding were seen at up to 14 eps for widths up to 1024. A Gram sum carries
        # rounding of its own, which fp64 cannot undo: beside the least pivot it may be a fiftieth. Rows are exact.
        noise = 10 + len(held) ** 0.5
        noise = noise if dual else max(noise, _PIVOT)
        attempts = [(torch.float64, noise * torch.finfo(torch.float64 if dual else dtype).eps)]
        if dtype != torch.float64:
            attempts.insert(0, (dtype, max(len(held), _KEPT if dual else noise) * torch.finfo(dtype).eps))
        for dtype, least in attempts:
            matrix = self._matrix(dtype, lam)
            ratio = self.count * lam / float(matrix.diagonal().max()) if dual else 1.0
            if ratio < least:
                continue
            lower = cholesky(matrix, least)
            if lower is not None:
                return Cholesky(lower, lam, 1.0, held if dual else None, 2.0 ** -self._power(), ratio)
        return None

    def _matrix(self, dtype: torch.dtype, lam: float) -> Tensor:
        if self.gram is not None:
            matrix = self.gram.to(dtype) / self.count
            matrix.diagonal().add_(lam)
            return matrix
        if dtype not in self._inner:
            rows = self.rows[0]
            inner = torch.zeros(len(rows), len(rows), dtype=dtype, device=rows.device)
            for cols in spans(self.width, len(rows)):
                part = scaled_columns(rows, cols, dtype, 2.0 ** -self._power())
                inner.addmm_(part, part.T)
            self._inner[dtype] = inner
        matrix = self._inner[dtype].clone()
        matrix.diagonal().add_(self.count * lam)
        return matrix
