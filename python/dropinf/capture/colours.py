"""Whose row is it: the sample of every row of an output's gradient, found from two backward passes.

Backward is linear in the losses' weights. With a power of two for each sample, every row comes out multiplied by its
own sample's power, exactly, in every floating dtype: the ratio of the rows names the sample. More samples than a dtype
has powers are named digit by digit, by one more pass each. A row with two colours belongs to several samples.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

NONE, SEVERAL = -1, -2
# How far a ratio may be from a power of two, where sums are formed in an order that changes.
SLACK = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
Key = tuple[str, int]  # a module, and which of its gradients in a backward


@dataclass
class _Rows:
    """Of the rows of one gradient: two random projections of each, [rows, 2], which scale as the row does."""

    seen: Tensor
    lead: torch.Size
    sample: Tensor
    scale: Tensor = field(default_factory=lambda: torch.ones((), device="cpu"))  # of the last pass


@functools.lru_cache(256)
def _directions(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(2, d, generator=torch.Generator().manual_seed(d), device="cpu").to(device, dtype)


def _projected(rows: Tensor) -> Tensor:
    """Return two projections of each row; where a row is multiplied by a power of two, so are they, exactly."""
    rows = rows.float() if rows.dtype == torch.float16 else rows
    return F.linear(rows, _directions(rows.shape[1], rows.dtype, rows.device))  # five times as fast as rows @ [d, 2]


class Colours:
    """The samples of the rows of ``n`` samples' gradients. ``narrow``: some gradients are float16, of few powers."""

    def __init__(self, n: int, *, narrow: bool) -> None:
        self.n, self.base = n, 8 if narrow else 64
        self.passes = max(1, math.ceil(math.log(n, self.base) - 1e-9))
        self.rows: dict[Key, _Rows] = {}
        self.spread: list[Tensor] = []  # how far ratios were from powers of two

    def weights(self, losses: Tensor, digit: int) -> Tensor:
        """Return the losses' weights [N] of one pass."""
        power = torch.arange(self.n, device=losses.device) // self.base**digit % self.base
        # From two on: what a clamp made the same in all passes is no sample's.
        return torch.exp2(power.to(losses.dtype) + 1)

    def sign(self, key: Key, g: Tensor) -> None:
        """Take a gradient [*lead, d] of all losses with weight one."""
        seen = _projected(g.reshape(-1, g.shape[-1]))
        # Entries below the smallest normal number do not scale exactly.
        least = g.shape[-1] * torch.finfo(g.dtype).tiny
        known = (seen.isfinite() & (seen.abs() > least)).all(1)
        self.rows[key] = _Rows(seen, g.shape[:-1], torch.where(known, 0, NONE))

    def read(self, key: Key, g: Tensor, digit: int) -> None:
        """Take the same gradient of the losses with the weights of a digit."""
        row = self.rows[key]
        known = row.sample != NONE
        seen = _projected(g.reshape(-1, g.shape[-1]))
        # What samples with the same weight take from each other leaves nothing; with others it does.
        least = (g.shape[-1] * torch.finfo(g.dtype).tiny + row.seen.abs()) * 2.0 ** (self.base + 1)
        cancelled = ~known & (seen.isfinite() & (seen.abs() > least)).any(1)
        ratio = torch.where(known[:, None], seen / row.seen, 1)
        power = ratio[:, :1].abs().log2().round()
        exact = torch.exp2(power)
        apart = (ratio - exact).abs() / exact
        same = (apart <= SLACK[g.dtype]).all(1)
        power, exact = power[:, 0].long() - 1, exact[:, 0]
        sample = row.sample + power * self.base**digit
        fits = same & (power >= 0) & (power < self.base) & (sample < self.n) & (row.sample != SEVERAL)
        row.sample = torch.where(known, torch.where(fits, sample, SEVERAL), torch.where(cancelled, SEVERAL, NONE))
        if len(apart):
            self.spread.append(torch.where(fits[:, None], apart, 0).amax().double())
        row.scale = torch.where(known & fits, 1 / exact, 1).to(g.dtype).view(row.lead)

    def samples(self, key: Key) -> Tensor:
        """Return the sample of each row [*lead]; NONE where it has no gradient, SEVERAL where it has more than one."""
        row = self.rows[key]
        return row.sample.view(row.lead)
