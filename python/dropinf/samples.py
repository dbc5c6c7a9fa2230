"""Which rows of a batch belong to which sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
