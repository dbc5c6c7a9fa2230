"""Which rows of a tensor belong to which sample of its batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from dropinf_kernels.ops.checks import document_bounds


class Untied(ValueError):  # noqa: N818
    """A tensor whose leading dimensions cannot be tied to samples."""


@dataclass(frozen=True)
class Grid:
    """Samples along one leading dimension of n * m entries: m by m, or (cyclic) n by n, as in cat([a, b])."""

    dim: int = 0
    cyclic: bool = False

    def split(self, x: Tensor, lead: int, n: int) -> Tensor:
        """Return x [*lead, *features] as [n, T, *features]."""
        if self.dim >= lead or x.shape[self.dim] % n:
            raise Untied
        parts = x.shape[self.dim] // n
        x = x.unflatten(self.dim, (parts, n) if self.cyclic else (n, parts)).movedim(self.dim + self.cyclic, 0)
        return x.reshape(n, -1, *x.shape[lead + 1 :]) if x.numel() else x.reshape(n, 0, *x.shape[lead + 1 :])


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows in any order: ``sample`` [*lead] int64 names each row's sample, or -1 where it has no gradient."""

    sample: Tensor

    @cached_property
    def order(self) -> Tensor:
        """The rows, sorted by sample."""
        return torch.argsort(self.owner, stable=True)

    def cu_seqlens(self, n: int) -> Tensor:
        """Return where each sample's rows start in `order`, int32 [n + 1]."""
        counts = torch.bincount(self.owner, minlength=n)
        return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)

    @property
    def owner(self) -> Tensor:
        """The sample of each row, int64 [rows]; any where it has no gradient."""
        return self.sample.flatten().clamp(min=0)


Layout = Grid | Rows


@dataclass(frozen=True)
class Samples:
    """The samples of a batch: ``n`` of them, or documents packed at ``cu_seqlens``.

    ``layout``: where a tensor has them; None: in its leading dimension, row by row of each sample (or packed).
    """

    n: int
    cu_seqlens: Tensor | None = None
    layout: Layout | None = None
    each: bool | None = None  # whether what has a row for each document is packed so; None: that is not known

    def bound(self, lead: torch.Size) -> Samples:
        """Return these for what has fewer leading dimensions than rows [*lead] whose samples are known.

        As many rows as there are documents are one of each only where the rows themselves are.
        """
        if self.cu_seqlens is None or self.layout is not None:
            return self
        found = replace(self, each=lead.numel() == self.n)
        found.__dict__.update(packed=self.packed, _bounds=self._bounds)  # read and copied once
        return found

    @cached_property
    def packed(self) -> int:
        """How many rows the documents have; read once."""
        assert self.cu_seqlens is not None
        return int(self.cu_seqlens[-1])

    @cached_property
    def _bounds(self) -> dict[torch.device, Tensor]:
        return {}

    def bounds(self, device: torch.device) -> Tensor:
        """Return `cu_seqlens` on a device, checked and copied there once."""
        cu = self.cu_seqlens
        assert cu is not None
        if cu.device == device:
            return cu
        if device not in self._bounds:
            document_bounds(cu, self.packed)
            self._bounds[device] = cu.to(device, non_blocking=True)
        return self._bounds[device]

    def tie(self, x: Tensor, features: int = 1) -> tuple[Tensor, Tensor | None]:
        """Return [*lead, *features] as ([N, T, *features], None), or, packed, as ([rows, *features], cu_seqlens)."""
        if isinstance(self.layout, Grid):
            return self.layout.split(x, x.ndim - features, self.n), None
        if self.layout is None and self.cu_seqlens is None and x.ndim == 2 + features and x.shape[0] == self.n:
            return x, None
        lead = x.shape[: x.ndim - features]
        kept = x.shape[x.ndim - features :]
        rows = lead.numel()
        if isinstance(self.layout, Rows):
            if rows != self.layout.sample.numel():
                raise Untied
            return x.reshape(rows, *kept).index_select(0, self.layout.order), self.layout.cu_seqlens(self.n)
        if self.cu_seqlens is not None:
            if rows == self.packed:
                return x.reshape(rows, *kept), self.bounds(x.device)
            if rows == self.n and self.each is not False:
                return x.reshape(rows, 1, *kept), None
            # Heads beside the positions, before or behind them: each position is several rows.
            positions = [i for i, size in enumerate(lead) if size == self.packed]
            if len(positions) == 1:
                several = rows // lead[positions[0]]
                return x.movedim(positions[0], 0).reshape(rows, *kept), self.bounds(x.device) * several
        elif self.n and (lead[0] if lead else 1) % self.n == 0:
            return x.reshape(self.n, rows // self.n, *kept), None
        raise Untied

    def along(self, dims: Sequence[int]) -> Samples:
        """Return the samples of a tensor whose leading dimensions are some of this one's, in a new order.

        Raises Untied where a row's sample does not follow from these dimensions.
        """
        if self.n == 1:
            return Samples(1)
        if isinstance(self.layout, Rows):
            sample = self.layout.sample
            if max(dims) < sample.ndim:
                sample = sample.movedim(list(dims), list(range(len(dims))))
                one = sample.reshape(*sample.shape[: len(dims)], -1)
                first = one.amax(-1)
                if bool(((one == first[..., None]) | (one < 0)).all()):
                    return replace(self, layout=Rows(first))
        elif self.cu_seqlens is None or self.layout is not None:
            grid = self.layout or Grid()
            if grid.dim in dims:
                return replace(self, layout=replace(grid, dim=list(dims).index(grid.dim)))
        raise Untied

    def agree(self, sample: Tensor) -> bool:
        """Return whether rows [*lead] are tied to the samples that they are known to be of; -1 fits any."""
        try:
            rows, cu = self.tie(sample, 0)
        except Untied:
            return False
        owner = torch.arange(self.n, device=rows.device)
        if cu is None:
            owner = owner[:, None]
        else:
            owner = torch.repeat_interleave(owner, cu.diff().long(), output_size=len(rows))
        return bool(((rows == owner) | (rows == -1)).all())

    def owners(self, lead: torch.Size, device: torch.device) -> Tensor:
        """Return the sample of each row [*lead], int64."""
        places, cu = self.tie(torch.arange(lead.numel(), device=device).reshape(lead), 0)
        owner = torch.arange(self.n, device=device)
        if cu is None:
            owner = owner[:, None]
        else:
            owner = torch.repeat_interleave(owner, cu.diff().long().to(device), output_size=len(places))
        found = torch.empty(lead.numel(), dtype=torch.int64, device=device)
        found[places.flatten()] = owner.expand(places.shape).flatten()
        return found.reshape(lead)

    def sum_parts(self, parts: Tensor) -> Tensor:
        """Return [N, ...], the sums over each sample's parts in [N * m, ...], or packed [rows, ...]."""
        if isinstance(self.layout, Rows):
            return self._sum_scattered(parts, self.layout.sample)
        if self.layout is None and self.cu_seqlens is not None and len(parts) == self.packed:
            owner = torch.repeat_interleave(self.bounds(parts.device).diff().long(), output_size=len(parts))
            return parts.new_zeros(self.n, *parts.shape[1:]).index_add_(0, owner, parts)
        if self.layout is None and len(parts) == self.n and self.each is not False:
            return parts
        if self.layout is None and self.cu_seqlens is not None:
            raise Untied
        grid = self.layout or Grid()
        if self.n == 0 or len(parts) % self.n or grid.dim:
            raise Untied
        return grid.split(parts[:, None], 2, self.n).sum(1)

    def _sum_scattered(self, parts: Tensor, sample: Tensor) -> Tensor:
        if len(sample) != len(parts):
            raise Untied
        each = sample.reshape(len(parts), -1)  # positions of an image
        owner = each.amax(1) if each.shape[1] else each.new_zeros(len(parts))
        if bool(((each != owner[:, None]) & (each >= 0)).any()):
            raise Untied
        return parts.new_zeros(self.n, *parts.shape[1:]).index_add_(0, owner.clamp(min=0), parts)


def learn(sample: Tensor, samples: Samples) -> tuple[Layout | None, bool]:
    """Return the layout of rows whose samples are known [*lead], and whether no other layout would fit them.

    Layouts that are proven hold for later batches; `Rows` hold for these alone. None is the usual layout.
    """
    several = len(sample[sample >= 0].unique()) > 1
    grids: list[Layout | None] = [None] if samples.agree(sample) else []
    if grids and samples.cu_seqlens is not None:
        return None, several  # as the user says
    for dim, size in enumerate(sample.shape):
        if size == 0 or size % samples.n:
            continue
        for cyclic in (False, True):
            redundant = (cyclic and size == samples.n) or (dim == 0 and not cyclic and samples.cu_seqlens is None)
            grid = Grid(dim, cyclic)
            if not redundant and Samples(samples.n, None, grid).agree(sample):
                grids.append(grid)
    if len(grids) == 1:
        return grids[0], several
    if grids and grids[0] is None:
        return None, False
    return Rows(sample), False
