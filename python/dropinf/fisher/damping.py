"""How much is added to the diagonal of a Fisher block before it is solved."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

# Of the shrinkage: plain dot products are as good as reached there, and the matrix is still one.
_MOST = 0.999
# Samples that hardly differ say nothing about the other directions; a Gram sum in fp32 is solved with this much.
_LEAST = 1e-4
# Where |F - mean I|^2 is this share of |F|^2, F is its mean to within rounding.
_ROUND = 1e-7


@dataclass(frozen=True)
class Damping:
    """`lambda = value * mean(diag F)`, or `lambda = value` when absolute; "auto" chooses the value of each block."""

    value: float | Literal["auto"]
    absolute: bool = False

    def __str__(self) -> str:
        return self.value if isinstance(self.value, str) else f"{self.value:g}"

    def of(self, mean_diagonal: float, chosen: Callable[[], float]) -> tuple[float, float]:
        """Return lambda, and what the inverse is multiplied by; `chosen` is asked for the value under "auto".

        Shrinking mixes F and its mean, `(1 - rho) F + rho mean I`, where a set damping adds to F. So however far blocks
        are shrunk, their scores stay comparable in size, and can be summed.
        """
        if not isinstance(self.value, str):
            return (self.value if self.absolute else self.value * mean_diagonal), 1.0
        value = chosen()
        return value * mean_diagonal, 1 + value


def damping_number(damping: object) -> float:
    """Return a damping that is a finite number of at least 0.

    Raises:
        ValueError: it is none.
    """
    try:
        number = math.nan if isinstance(damping, bool | str) else float(damping)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(
            f'damping is {damping!r}; it must be a finite number of at least 0, for instance 0.1, or "auto"'
        )
    return damping if isinstance(damping, int | float) else number


def ledoit_wolf(count: int, width: int, mean: float, squares: float, fourths: float) -> float:
    """Return the value for `F = (1/N) sum_n c_n c_n^T` that brings `F + lambda I` nearest to F of endless samples.

    `count` is N, `width` K, `mean` tr(F) / K, `squares` |F|^2 (Frobenius), `fourths` sum_n |c_n|^4. The expected
    squared distance is least for a share rho = b^2 / d^2 of `mean * I`, with d^2 = |F - mean I|^2 and b^2 the variance
    of F, (mean_n |c_n|^4 - |F|^2) / (N - 1); that is, but for its scale, F with `rho / (1 - rho)` of its mean diagonal
    added. Between 1e-4 and 0.999: equal samples have no variance, and what they leave open could not be solved.
    Source: Ledoit & Wolf, "A well-conditioned estimator for large-dimensional covariance matrices" (2004), with a known
    mean of zero and an unbiased b^2.
    """
    variance = (fourths / count - squares) / max(1, count - 1)
    distance = squares - width * mean * mean
    round_ = count < 2 or distance <= _ROUND * squares
    share = _MOST if round_ else max(_LEAST, min(_MOST, variance / distance))
    return share / (1 - share)
