"""Exact powers of two that keep sums and solves of very small and very large gradients within float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

RANGE = 32  # gradients from 2^-32 to 2^32 are added up as they are
LIMIT = 126  # 2^126 and its inverse are normal numbers of float32


def largest(c: Tensor) -> float:
    """Return the largest magnitude of c; NaN where it holds one."""
    if c.numel() == 0:
        return 0.0
    low, high = c.aminmax()
    return float(torch.maximum(low.neg(), high))


def exponent_of(size: float) -> int | None:
    """Return e so that gradients of this size are added up over 2^e; None for a size of zero, or one not finite."""
    if not 0 < size < math.inf:
        return None
    found = math.frexp(size)[1]
    return 0 if abs(found) <= RANGE else max(-LIMIT, min(LIMIT, found))


def times_power(x: Tensor, power: int | Tensor) -> Tensor:
    """Return x [n, ...] times 2^power, exactly; a tensor of powers [n] has one for each row."""
    if isinstance(power, int):
        return x if power == 0 else (x.double() * 2.0**power).to(x.dtype)
    factors = torch.ldexp(torch.ones_like(power, dtype=torch.float64), power)
    return (x.double() * factors.view(-1, *[1] * (x.dim() - 1))).to(x.dtype)


def unit_rows(v: Tensor) -> tuple[Tensor, int | Tensor]:
    """Return rows [n, K] over powers of two, and those powers: 0 where no row is of an unusual size."""
    norms = torch.linalg.vector_norm(v, dim=1)  # four times as fast as the largest entries
    if bool(((norms >= 2.0**-RANGE) & (norms <= 2.0**RANGE)).all()):
        return v, 0
    sizes = torch.linalg.vector_norm(v, ord=math.inf, dim=1)
    powers = torch.where(sizes.isfinite(), torch.frexp(sizes).exponent, 0)
    powers = torch.where(powers.abs() <= RANGE, 0, powers)
    if not bool(powers.any()):
        return v, 0
    return times_power(v, -powers), powers
