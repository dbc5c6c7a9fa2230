"""Whose row is it: the sample of every row of an output's gradient, found from two backward passes.

Backward is linear in the losses' weights. With a power of two for each sample, every row comes out multiplied by its
own sample's power, exactly, in every floating dtype: the ratio of the rows names the sample. More samples than a dtype
has powers are named digit by digit, by one more pass each. A row with two colours belongs to several samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

NONE, SEVERAL = -1, -2
Key = tuple[str, int]  # a module, and which of its gradients in a backward


@dataclass
class _Row:
    """Of each row of one gradient: where it is largest, its value there, and the sum of its magnitudes."""

    place: Tensor
    value: Tensor
    total: Tensor
    lead: torch.Size
    sample: Tensor
    scale: Tensor = field(default_factory=lambda: torch.ones(()))  # of the last pass


class Colours:
    """The samples of the rows of ``n`` samples' gradients. ``narrow``: some gradients are float16, of few powers."""

    def __init__(self, n: int, *, narrow: bool) -> None:
        self.n, self.base = n, 8 if narrow else 64
        self.passes = max(1, math.ceil(math.log(n, self.base) - 1e-9))
        self.rows: dict[Key, _Row] = {}

    def weights(self, losses: Tensor, digit: int) -> Tensor:
        """Return the losses' weights [N] of one pass."""
        power = torch.arange(self.n, device=losses.device) // self.base**digit % self.base
        return torch.exp2(power.to(losses.dtype))

    def sign(self, key: Key, g: Tensor) -> None:
        """Take a gradient [*lead, d] of all losses with weight one."""
        rows = g.reshape(-1, g.shape[-1])
        size = rows.abs()
        total, place = size.sum(1), size.argmax(1, keepdim=True) if rows.numel() else size.new_zeros(len(rows), 1)
        value = rows.gather(1, place.long())[:, 0] if rows.shape[1] else total
        known = (total > 0) & total.isfinite() & value.isfinite()
        sample = torch.where(known, 0, NONE)
        self.rows[key] = _Row(place.long(), value, total, g.shape[:-1], sample)

    def read(self, key: Key, g: Tensor, digit: int) -> None:
        """Take the same gradient of the losses with the weights of a digit."""
        row = self.rows[key]
        rows = g.reshape(-1, g.shape[-1])
        if not rows.numel():
            return
        known = row.sample != NONE
        value = torch.where(known, rows.gather(1, row.place)[:, 0] / torch.where(known, row.value, 1), 1)
        total = torch.where(known, rows.abs().sum(1) / torch.where(known, row.total, 1), 1)
        power = value.abs().double().log2().round()
        exact = torch.exp2(power)
        slack = 1e-3 * exact
        same = (value - exact).abs() <= slack
        same &= (total - exact).abs() <= slack
        same &= (power >= 0) & (power < self.base)
        sample = row.sample + power.long() * self.base**digit
        several = known & (~same | (row.sample == SEVERAL) | (sample >= self.n))
        row.sample = torch.where(known, torch.where(several, SEVERAL, sample), NONE)
        row.scale = torch.where(known & ~several, 1 / exact, 1).to(g.dtype).view(row.lead)

    def samples(self, key: Key) -> Tensor:
        """Return the sample of each row [*lead]; NONE where it has no gradient, SEVERAL where it has more than one."""
        row = self.rows[key]
        return row.sample.view(row.lead)
