"""Whose row is it: the sample of every row of an output's gradient, found from two backward passes.

Backward is linear in the losses' weights. With a power of two for each sample, every row comes out multiplied by its
own sample's power, exactly, in every floating dtype: the ratio of the rows names the sample. More samples than a dtype
has powers are named digit by digit, by one more pass each. A row with two colours belongs to several samples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NONE, SEVERAL = -1, -2
# How far a ratio may be from a power of two, where sums are formed in an order that changes.
SLACK = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
_LOST = 1e-3  # of all gradients of a layer, in rows that are too small to tell whose they are
_ROOM = 4  # for what lies between the gradients that are seen
Key = tuple[str, int]  # a module, and which of its gradients in a backward


@dataclass
class _Rows:
    """Of the rows of one gradient: random projections of each, [rows, 2 or 4], which scale as the row does.

    ``code``: what is known of each row's sample so far; ``weak``: rows that do not scale exactly, nor far from it.
    ``owner``: the samples that the digits so far were those of, where nobody had to read them.
    """

    seen: Tensor
    size: Tensor  # of each row
    lead: torch.Size
    least: float  # size of a row that scales well enough
    normal: float  # of one that scales exactly
    code: Tensor | None = None
    weak: Tensor | None = None
    owner: Tensor | None = None
    spread: Tensor | None = None  # of ratios, as they were last compared


@functools.lru_cache(256)
def _directions(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    count = 4 if dtype == torch.float16 else 2  # that a row is small in all of them is then rare
    drawn = torch.randn(count, d, generator=torch.Generator().manual_seed(d), device="cpu")
    return drawn.to(device, torch.float32 if dtype == torch.float16 else dtype)


def _projected(rows: Tensor) -> Tensor:
    """Return projections of each row; where a row is multiplied by a power of two, so are they, exactly."""
    directions = _directions(rows.shape[1], rows.dtype, rows.device)
    return F.linear(rows.to(directions.dtype), directions)  # five times as fast as rows @ [d, 2]


class Colours:
    """The samples of the rows of ``n`` samples' gradients, which are of these dtypes.

    Each sample has a code, by chance, and each code a power of two. The powers lie apart, so that two samples in one
    row do not give the ratio of a third, however simple the factor is between their parts.
    """

    def __init__(self, n: int, dtypes: Collection[torch.dtype], *, seed: int = 0) -> None:
        self.n = n
        wide = {*dtypes} == {torch.float64}
        self.base, self.step = (8, 1) if torch.float16 in dtypes else (64, 8) if wide else (32, 3)
        self.passes = max(1, math.ceil(math.log(n, self.base) - 1e-9))
        self.codes = torch.randperm(n, generator=torch.Generator().manual_seed(seed), device="cpu")
        self.rows: dict[Key, _Rows] = {}
        self.spread: dict[Key, Tensor] = {}  # how far ratios were from powers of two
        self.unsure: list[Tensor] = []  # whether some rows are too small to tell whose they are
        self._largest: Tensor | None = None  # entry of a gradient in float16
        self._named, self._shift = self.codes.argsort(), torch.zeros((), device="cpu")
        self._weights = torch.ones(n, device="cpu")  # of the pass that runs

    def weights(self, losses: Tensor, digit: int) -> Tensor:
        """Return the losses' weights [N] of one pass."""
        if self.step > 1:  # float32 has room for large losses below one
            size = losses.detach().abs().nan_to_num().amax().log2().clamp(min=0)
            self._shift = (size / self.step).ceil() * self.step
        elif self._largest is not None and self.base == 8:  # and float16 none above its largest number
            most = self._largest * 2**self.base / torch.finfo(torch.float16).max
            self._shift = (_ROOM * most.nan_to_num()).log2().ceil().clamp(min=0)
        if self.codes.device != losses.device:  # once, not for each gradient
            self.codes = self.codes.to(losses.device, non_blocking=True)
            self._named = self._named.to(losses.device, non_blocking=True)
            self._shift = self._shift.to(losses.device)
        power = self.codes // self.base**digit % self.base
        # None is one: what a clamp made the same in all passes is no sample's.
        self._weights = torch.exp2((1 + self.step * power).to(losses.dtype) - self._shift.to(losses))
        return self._weights

    def sign(self, key: Key, g: Tensor) -> None:
        """Take a gradient [*lead, d] of all losses with weight one."""
        seen = _projected(g.reshape(-1, g.shape[-1]))
        d, limits = g.shape[-1], torch.finfo(g.dtype)
        normal = least = d * limits.tiny  # entries below the smallest normal number do not scale exactly
        if g.dtype == torch.float16:  # of which many are: there they are right to a step, each
            least = 4 * d**0.5 * limits.smallest_normal * limits.eps / SLACK[g.dtype]
            here = g.abs().amax().float() if g.numel() else torch.zeros((), device=g.device)
            self._largest = here if self._largest is None else torch.maximum(here, self._largest.to(here))
        self.rows[key] = _Rows(seen, seen.abs().amax(1), g.shape[:-1], least, normal)

    def confirm(self, key: Key, g: Tensor, owner: Tensor, *, some: bool = False) -> Tensor | None:
        """Return whether the gradient's rows are all of the samples [rows] that they are taken for, a truth value; None
        where they are to be `read`.

        Rows that are small, or not exact, are left to `read`, and float16 has too many of them. ``some``: not all rows
        may be zero.
        """
        row = self.rows[key]
        if row.code is not None or self.base == 8 or len(owner) != len(row.seen):
            return None
        factor = self._weights.to(row.seen)[owner]
        apart = (_projected(g.reshape(-1, g.shape[-1])) - row.seen * factor[:, None]).abs_().amax(1)
        spread = (apart / (row.size * factor).clamp_(min=torch.finfo(apart.dtype).tiny)).amax()
        least = torch.where(row.size == 0, torch.inf, row.size).amin()
        whole = (least > row.normal) & (least.isfinite() if some else True)
        row.spread = spread
        return (spread <= SLACK[g.dtype]) & whole

    def take(self, key: Key, owner: Tensor) -> None:
        """Have a gradient's rows be of the samples [rows] that `confirm` was asked about."""
        row = self.rows[key]
        assert row.spread is not None
        self._note_spread(key, row.spread)
        row.owner = owner

    def _begin(self, row: _Rows, digit: int) -> tuple[Tensor, Tensor]:
        """Return the code of each row before a digit is read, and which rows are weak."""
        known = row.seen.isfinite().all(1) & (row.size > row.least)
        before: int | Tensor = 0 if row.owner is None else self.codes[row.owner] % self.base**digit
        return torch.where(known, before, NONE), known & (row.size <= row.normal)

    def _note_spread(self, key: Key, found: Tensor) -> None:
        found = found.double()
        self.spread[key] = torch.maximum(found, self.spread[key]) if key in self.spread else found

    def read(self, key: Key, g: Tensor, digit: int) -> None:
        """Take the same gradient of the losses with the weights of a digit."""
        row = self.rows[key]
        if row.code is None or row.weak is None:
            row.code, row.weak = self._begin(row, digit)
        known, shift = row.code != NONE, self._shift.to(g.device)
        seen = _projected(g.reshape(-1, g.shape[-1]))
        # What samples with the same weight take from each other leaves nothing; with others it does.
        most = torch.exp2(1 + self.step * self.base - shift)
        least = (g.shape[-1] * torch.finfo(g.dtype).tiny + row.seen.abs()) * most.to(seen)
        cancelled = ~known & (seen.isfinite() & (seen.abs() > least)).any(1)
        size, place = row.seen.abs().max(1, keepdim=True)
        exponent = torch.where(known[:, None], (seen / row.seen).gather(1, place), 1).abs().log2().round()
        exact = torch.exp2(exponent)
        apart = torch.where(known, ((seen - exact * row.seen).abs() / (exact * size)).amax(1), 0)
        power = (exponent[:, 0].long() + shift.long() - 1) / self.step
        code = row.code + power.long() * self.base**digit
        fits = (apart <= SLACK[g.dtype]) & (power == power.long()) & (power >= 0) & (power < self.base)
        fits &= (code < self.n) & (row.code != SEVERAL)
        lost = torch.where(row.weak, NONE, SEVERAL)
        row.code = torch.where(known, torch.where(fits, code, lost), torch.where(cancelled, SEVERAL, NONE))
        if len(apart):
            self._note_spread(key, torch.where(fits, apart, 0).amax())
            lost = torch.where(row.code == NONE, size[:, 0], 0)
            self.unsure.append((lost > 0).any())
            if g.dtype == torch.float16 and bool(lost.sum() > _LOST * size.sum()):
                raise ValueError("gradients too small for float16 to tell whose they are; scale the loss up")

    def samples(self, key: Key) -> Tensor:
        """Return the sample of each row [*lead]; NONE where it has no gradient, SEVERAL where it has more than one."""
        code = self.rows[key].code
        assert code is not None
        named = self._named.to(code.device)
        return torch.where(code >= 0, named[code.clamp(min=0)], code).view(self.rows[key].lead)
