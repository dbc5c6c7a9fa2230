"""One block of a Fisher matrix, `F = (1/N) sum_n c_n c_n^T`: what all kinds share, and the diagonal.

Each holds sums and a count: updates come in any order, merges add. Factorizations last until the sums change.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from ..files import whole_number
from ..ranks import Ranks
from .cholesky import solver_dtype, spans
from .damping import Damping, ledoit_wolf
from .ledger import Ledger
from .scale import LIMIT, RANGE, exponent_of, largest, times_power, unit_rows

T = TypeVar("T")
Product = Literal["solve", "quadratic", "whiten"]
Rows = Callable[[Tensor], Tensor]
# What a product's size depends on: powers of the rows, and of the gradients in F, by which it is divided.
_POWERS: dict[Product, tuple[int, int]] = {"solve": (1, 2), "quadratic": (2, 2), "whiten": (1, 1)}


def origins_of(source: object) -> tuple[tuple[str, str], ...]:
    """Return the model and the loss that gradients are of, as far as they say, or those that a Fisher matrix is of."""
    origin = getattr(source, "origin", None)
    return getattr(source, "origins", () if origin is None else (tuple(origin),))


class Block(ABC):
    """One block of the Fisher matrix, of width K, over the `count` samples added so far.

    A block whose gradients are all zero solves to 0, whatever its damping: the training samples are zero
    there, so it adds nothing to any score.
    """

    saved: ClassVar[tuple[str, ...]]  # attributes that hold its sums: a tensor, several, or None
    counted: ClassVar[tuple[str, ...]] = ()  # further counts of samples

    def __init__(self, name: str, width: int, damping: Damping) -> None:
        self.name = name
        self.width = width
        self.damping = damping
        self.count = 0
        self.fourths = 0.0  # what ledoit_wolf asks for
        self.exponent: int | None = None  # the sums are those of gradients over 2^exponent; None: of zeros, or none

    @abstractmethod
    def update(self, c: Tensor, ledger: Ledger) -> None:
        """Add the gradients `[n, K]`. Replace what changes, or change it through the ledger."""

    @abstractmethod
    def merge(self, other: Block, ledger: Ledger) -> None:
        """Add the sums of another block of the same kind and layer. Replace what changes, or use the ledger."""

    @abstractmethod
    def _prepare(self, what: Product) -> Rows | None:
        """Return what makes solved rows, whitened rows or quadratic forms of rows; None if every gradient is zero.

        F is that of the gradients over `2^self._power()`.
        """

    @abstractmethod
    def _squares(self) -> float:
        """Return `sum_n |c_n|^2` of the gradients over `2^self._power()`."""

    def mean_square(self) -> float:
        """Return the mean of `|c_n|^2`: the trace of F."""
        return self._squares() * 4.0 ** self._power() / max(1, self.count)

    @abstractmethod
    def _rescale(self, factor: float, ledger: Ledger) -> None:
        """Multiply the sums of squares."""

    def solve(self, v: Tensor) -> Tensor:
        """Return `(F + lambda I)^{-1} v` for each row of v `[n, K]`, in `result_dtype`."""
        return self._mapped(v, "solve")

    def quadratic(self, v: Tensor) -> Tensor:
        """Return `v^T (F + lambda I)^{-1} v` for each row of v `[n, K]`, as `[n]` in at least fp32."""
        return self._mapped(v, "quadratic")

    def whiten(self, v: Tensor) -> Tensor:
        """Return `w(v)` for each row of v, `[n, K]`, with `w(a) . w(b) = a^T (F + lambda I)^{-1} b`."""
        return self._mapped(v, "whiten")

    def result_dtype(self, dtype: torch.dtype, what: Product) -> torch.dtype:  # noqa: ARG002
        """Return the dtype of what is made of rows of a dtype."""
        return solver_dtype(dtype)

    def _mapped(self, v: Tensor, what: Product) -> Tensor:
        prepared, dtype = self._prepare(what), self.result_dtype(v.dtype, what)
        out = v.new_zeros(v.shape[:1] if what == "quadratic" else v.shape, dtype=dtype)
        if prepared is None:
            return out
        of_rows, of_block = _POWERS[what]
        for part in spans(len(v), self.width):
            rows, powers = unit_rows(v[part].to(solver_dtype(v.dtype)))
            out[part] = times_power(prepared(rows), of_rows * powers - of_block * self._power())
        return out

    def _power(self) -> int:
        """Return e, where the sums are those of gradients over 2^e."""
        return self.exponent or 0

    def _fit(self, size: float, ledger: Ledger) -> None:
        """Choose the scale before gradients of this size are added."""
        exponent = exponent_of(size)
        if exponent is not None and (self.exponent is None or math.frexp(size)[1] > self.exponent + RANGE):
            self._grow(exponent, ledger)

    def _grow(self, exponent: int, ledger: Ledger) -> None:
        """Make the sums those of gradients over 2^exponent, or over more."""
        if self.exponent is not None and exponent > self.exponent:
            factor = 4.0 ** (self.exponent - exponent)
            self.fourths *= factor * factor
            self._rescale(factor, ledger)
        self.exponent = exponent if self.exponent is None else max(self.exponent, exponent)

    def _meet(self, other: Block, ledger: Ledger) -> float:
        """Add the fourth powers of another block; return what its sums are multiplied by before they are added."""
        if other.exponent is None:
            return 1.0
        self._grow(other.exponent, ledger)
        factor = 4.0 ** (other.exponent - self._power())
        self.fourths += other.fourths * factor * factor
        return factor

    def _agree(self, ranks: Ranks) -> None:
        """Take the largest scale of all ranks."""
        found = [exponent for exponent in ranks.everyone(self.exponent) if exponent is not None]
        if found:
            ledger = Ledger()
            self._grow(max(found), ledger)
            ledger.close()

    def _scaled(self, c: Tensor) -> Iterator[Tensor]:
        """Yield the gradients in parts as they are added: as they are, where they are of a usual size."""
        power = self._power()
        for part in spans(len(c), self.width) if power else [slice(None)]:
            yield c[part].to(solver_dtype(c.dtype)) * 2.0**-power if power else c

    @abstractmethod
    def _reduce_sums(self, ranks: Ranks, dtype: torch.dtype) -> None:
        """Add up the sums of all ranks; `dtype` is that of a rank that has none."""

    @abstractmethod
    def _sizes(self) -> dict[str, list[tuple[int, ...]]]:
        """Return the shapes of what is saved under each name, where the block has it."""

    @abstractmethod
    def _has_sums(self) -> bool:
        """Return whether what was loaded is all that a block with samples has."""

    def all_reduce(self, ranks: Ranks, dtype: torch.dtype) -> None:
        """Add up the sums of all ranks in place, each of its own samples; all ranks then hold the same."""
        self.count = int(ranks.sum(torch.tensor(self.count, device="cpu")))
        self._reduce_sums(ranks, dtype)
        self.fourths = float(ranks.sum(torch.tensor(self.fourths, dtype=torch.float64, device="cpu")))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what a file keeps: plain numbers, with how many tensors there are by name, and the tensors."""
        plain: dict[str, Any] = {name: getattr(self, name) for name in ("count", "fourths", *self.counted)}
        if self._of_sums(self._power()):
            plain["exponent"] = self.exponent
        tensors: dict[str, Tensor] = {}
        for name in self.saved:
            value = getattr(self, name)
            several = isinstance(value, list | tuple)
            parts = list(value) if several else [] if value is None else [value]
            if name == "rows" and len(parts) > 1:
                parts = [torch.cat(parts)]
            plain[name] = len(parts) if several else bool(parts)
            tensors |= {f"{name}.{j}": part for j, part in enumerate(parts)}
        return plain, tensors

    def load_state(self, plain: Mapping[str, Any], count: int, tensor: Callable[[str], Tensor]) -> None:
        """Take what `state` returned of a block of `count` samples; `tensor` reads one by its name.

        Raises:
            ValueError: a number or a tensor that no such block has.
        """
        if set(plain) - {"exponent"} != {"count", "fourths", *self.counted, *self.saved}:
            raise ValueError(f"a block has {sorted(plain)}")
        if whole_number(plain["count"], "a block's count", 0) != count:
            raise ValueError(f"a block's count is {plain['count']} of {count}")
        if type(plain["fourths"]) not in (int, float) or not math.isfinite(plain["fourths"]):
            raise ValueError(f"fourths is {plain['fourths']!r}")
        self.count, self.fourths = count, float(plain["fourths"])
        for name in self.counted:
            setattr(self, name, whole_number(plain[name], name, 0))
        for name, sizes in self._sizes().items():
            if type(plain[name]) not in (bool, int) or plain[name] not in (0, len(sizes)):
                raise ValueError(f"{name} is {plain[name]!r}")
            parts = [tensor(f"{name}.{j}") for j in range(plain[name])]
            for part, size in zip(parts, sizes, strict=bool(parts)):
                if part.shape != size or not part.is_floating_point() or not bool(part.isfinite().all()):
                    raise ValueError(
                        f"{name} is {part.dtype} {list(part.shape)} or not finite; it must be {list(size)}"
                    )
            if name == "rows":
                setattr(self, name, parts)
            else:
                setattr(self, name, None if not parts else parts[0] if len(sizes) == 1 else tuple(parts))
        if count and not self._has_sums():
            raise ValueError(f"a block of {count} samples lacks some of {', '.join(self.saved)}, or has too many")
        self.exponent = self._of_sums(plain.get("exponent", 0))

    def _of_sums(self, exponent: object) -> int | None:
        """Return an exponent that is saved; None where there are no sums, or zeros."""
        if type(exponent) is not int or abs(exponent) > LIMIT:
            raise ValueError(f"an exponent is {exponent!r}; it must be a whole number from {-LIMIT} to {LIMIT}")
        sums = (getattr(self, name) for name in self.saved)
        return exponent if any(isinstance(x, Tensor) and bool(x.any()) for x in sums) else None

    def with_damping(self, damping: Damping) -> Block:
        """Return a block of the same sums, its own copies."""
        other = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(other, name, value.clone())
            elif isinstance(value, list):
                setattr(other, name, list(value))
        other.damping = damping
        return other

    def _measure(self, c: Tensor, ledger: Ledger) -> None:
        """Choose the scale for gradients `[n, K]` that will be added, and add `sum_n |c_n|^4`."""
        norms = _norms(c, self.width)
        size = float(norms.amax()) if len(norms) else 0.0
        usual = exponent_of(size) == 0
        self._fit(size if usual else largest(c), ledger)  # the norm itself may have left fp32
        norms = norms * 2.0 ** -self._power() if usual else torch.cat([_norms(x, self.width) for x in self._scaled(c)])
        self.fourths += float(norms.pow(4).sum())

    def _chosen(self, mean_diagonal: float, squares: float, fourths: float) -> float:
        return ledoit_wolf(self.count, self.width, mean_diagonal, squares, fourths)

    def _damped(
        self, mean_diagonal: float, chosen: Callable[[], float], attempt: Callable[[float], T | None]
    ) -> tuple[T, float]:
        """Return what `attempt` makes of lambda, and what the inverse is multiplied by.

        `attempt` returns None for a lambda that is too small to solve with. "auto" then takes the next power of ten.

        Raises:
            ValueError: a set damping is too small; it names one that was tried. Or gradients that are not finite.
        """
        if not math.isfinite(mean_diagonal):
            raise self._not_finite()
        unit = 4.0 ** self._power()  # of the sums
        lam, scale = self.damping.of(mean_diagonal, chosen)
        lam = lam / unit if self.damping.absolute else lam
        made = attempt(lam)
        if made is not None:
            return made, scale
        for value in (10.0**power for power in range(-3 if self.damping.value == "auto" else -1, 12)):
            named = float(f"{value * mean_diagonal * unit:.3g}") if self.damping.absolute else value
            larger = named / unit if self.damping.absolute else value * mean_diagonal
            made = attempt(larger) if larger > lam else None
            if made is not None and self.damping.value == "auto":
                return made, 1 + value
            if made is not None:
                raise self._singular(named, value)
        raise self._singular(None, None)

    def _not_finite(self) -> ValueError:
        return ValueError(
            f"layer {self.name!r}: the gradients of its N={self.count} samples hold NaN or infinite values, which no "
            "damping can solve; leave those samples out"
        )

    def _singular(self, named: float | None, share: float | None) -> ValueError:
        way = "no larger one was found to do; is a column far beyond the others?"
        if named is not None:
            both = f" with absolute=True, or damping={share:g} with absolute=False" if self.damping.absolute else ""
            way = f"use a larger one, e.g. damping={named:.3g}{both}, or gradients in float64"
        return ValueError(
            f"layer {self.name!r}: the Fisher matrix of N={self.count} samples and K={self.width} columns is "
            f"singular to working precision with damping={self.damping}; {way}"
        )


class DiagonalBlock(Block):
    """The diagonal of a block."""

    saved = ("squares",)

    def __init__(self, name: str, width: int, damping: Damping) -> None:
        super().__init__(name, width, damping)
        self.squares: Tensor | None = None  # [K]

    def update(self, c: Tensor, ledger: Ledger) -> None:
        self.count += len(c)
        for part in spans(len(c), self.width):
            rows = c[part].to(solver_dtype(c.dtype))
            squares = rows.square().sum(0)
            size = float(squares.max()) ** 0.5
            usual = exponent_of(size) == 0 and not self._power()
            self._fit(size if usual else largest(rows), ledger)
            if not usual:
                rows = rows * 2.0 ** -self._power()
                squares = rows.square().sum(0)
            self.fourths += float(rows.double().square().square().sum())
            self._add(squares)

    def merge(self, other: Block, ledger: Ledger) -> None:
        assert isinstance(other, DiagonalBlock)
        self.count += other.count
        factor = self._meet(other, ledger)
        if other.squares is not None:
            self._add(other.squares * factor)

    def _rescale(self, factor: float, ledger: Ledger) -> None:  # noqa: ARG002
        if self.squares is not None:
            self.squares = self.squares * factor

    def _prepare(self, what: Product) -> Rows | None:
        inverse = self._inverse()
        if inverse is None:
            return None
        if what == "quadratic":
            return lambda v: v.to(inverse.dtype).square() @ inverse
        factors = inverse if what == "solve" else inverse.sqrt()
        return lambda v: v * factors

    def _reduce_sums(self, ranks: Ranks, dtype: torch.dtype) -> None:
        self._agree(ranks)
        self.squares = total(self.squares, (self.width,), ranks, dtype)

    def _sizes(self) -> dict[str, list[tuple[int, ...]]]:
        return {"squares": [(self.width,)]}

    def _has_sums(self) -> bool:
        return self.squares is not None

    def _squares(self) -> float:
        return 0.0 if self.squares is None else float(self.squares.sum(dtype=torch.float64))

    def _add(self, squares: Tensor) -> None:
        self.squares = squares.clone() if self.squares is None else self.squares + squares.to(self.squares.device)

    def _inverse(self) -> Tensor | None:
        """Return `1 / (diag F + lambda)`, `[K]`, scaled as the damping says; None if it is zero everywhere."""
        assert self.squares is not None
        diagonal = self.squares / self.count
        mean = float(diagonal.mean(dtype=torch.float64))
        if mean == 0:
            return None
        squares = float(diagonal.double().square().sum())
        inverse, scale = self._damped(
            mean, lambda: self._chosen(mean, squares, self.fourths), lambda lam: reciprocal(diagonal, lam, 0.0)
        )
        return inverse * scale


def reciprocal(values: Tensor, lam: float, least: float) -> Tensor | None:
    """Return `1 / (values + lambda)`, in fp64 where fp32 lacks the range; None if one is below `least`, or zero."""
    damped, limits = values + lam, torch.finfo(values.dtype)
    if float(damped.min()) <= limits.tiny or float(damped.max()) >= 1 / limits.tiny:
        damped = values.double() + lam
    smallest = float(damped.min())
    return damped.reciprocal() if smallest >= least and smallest > torch.finfo(damped.dtype).tiny else None


def _norms(c: Tensor, width: int) -> Tensor:
    """Return `|c_n|` of gradients `[n, K]`, in float64."""
    parts = [torch.linalg.vector_norm(c[part].to(solver_dtype(c.dtype)), dim=1) for part in spans(len(c), width)]
    return torch.cat(parts).double() if parts else torch.zeros(0, dtype=torch.float64, device=c.device)


def total(x: Tensor | None, shape: tuple[int, ...], ranks: Ranks, dtype: torch.dtype) -> Tensor:
    """Return the sum of `x` over all ranks; a rank that has none counts as zeros of `shape`."""
    return ranks.sum(torch.zeros(shape, dtype=dtype, device="cpu") if x is None else x)
