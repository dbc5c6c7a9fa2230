"""One block of a Fisher matrix, `F = (1/N) sum_n c_n c_n^T`: what all kinds share, and the diagonal.

Each holds sums and a count: updates come in any order, merges add. Factorizations last until the sums change.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..files import whole_number
from ..ranks import Ranks
from .cholesky import solver_dtype, spans
from .damping import Damping, ledoit_wolf
from .ledger import Ledger


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

    @abstractmethod
    def update(self, c: Tensor, ledger: Ledger) -> None:
        """Add the gradients `[n, K]`. Replace what changes, or change it through the ledger."""

    @abstractmethod
    def merge(self, other: Block, ledger: Ledger) -> None:
        """Add the sums of another block of the same kind and layer. Replace what changes, or use the ledger."""

    @abstractmethod
    def solve(self, v: Tensor) -> Tensor:
        """Return `(F + lambda I)^{-1} v` for each row of v `[n, K]`, in at least fp32."""

    @abstractmethod
    def quadratic(self, v: Tensor) -> Tensor:
        """Return `v^T (F + lambda I)^{-1} v` for each row of v `[n, K]`, as `[n]` in at least fp32."""

    @abstractmethod
    def whiten(self, v: Tensor) -> Tensor:
        """Return `w(v)` for each row of v, `[n, K]`, with `w(a) . w(b) = a^T (F + lambda I)^{-1} b`."""

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
        self.count = int(ranks.sum(torch.tensor(self.count)))
        self._reduce_sums(ranks, dtype)
        self.fourths = float(ranks.sum(torch.tensor(self.fourths, dtype=torch.float64)))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what a file keeps: plain numbers, with how many tensors there are by name, and the tensors."""
        plain: dict[str, Any] = {name: getattr(self, name) for name in ("count", "fourths", *self.counted)}
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
        if set(plain) != {"count", "fourths", *self.counted, *self.saved}:
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

    def _count(self, c: Tensor) -> None:
        self.count += len(c)
        self._add_fourths(c)

    def _add_fourths(self, c: Tensor) -> None:
        for part in spans(len(c), self.width):
            self.fourths += self._fourths(c[part].to(solver_dtype(c.dtype)))

    def _count_of(self, other: Block) -> None:
        self.count += other.count
        self.fourths += other.fourths

    def _fourths(self, c: Tensor) -> float:
        """Return `sum_n |c_n|^4`; a diagonal block sums the fourth powers of its coordinates instead."""
        return float(torch.linalg.vector_norm(c, dim=1).double().pow(4).sum())

    def _chosen(self, mean_diagonal: float, squares: float, fourths: float) -> float:
        return ledoit_wolf(self.count, self.width, mean_diagonal, squares, fourths)

    def singular(self, mean_diagonal: float) -> ValueError:
        """Return the error for a matrix that cannot be solved with this damping."""
        way = "damping=0.1"
        if self.damping.absolute:
            way = f"damping={0.1 * mean_diagonal:.3g} with absolute=True, or damping=0.1 with absolute=False"
        return ValueError(
            f"layer {self.name!r}: the Fisher matrix of N={self.count} samples and K={self.width} columns is "
            f"singular to working precision with damping={self.damping}; use a larger one, e.g. {way}"
        )


class DiagonalBlock(Block):
    """The diagonal of a block."""

    saved = ("squares",)

    def __init__(self, name: str, width: int, damping: Damping) -> None:
        super().__init__(name, width, damping)
        self.squares: Tensor | None = None  # [K]

    def update(self, c: Tensor, ledger: Ledger) -> None:  # noqa: ARG002
        self._count(c)
        for part in spans(len(c), self.width):
            self._add(c[part].to(solver_dtype(c.dtype)).square().sum(0))

    def merge(self, other: Block, ledger: Ledger) -> None:  # noqa: ARG002
        assert isinstance(other, DiagonalBlock)
        self._count_of(other)
        if other.squares is not None:
            self._add(other.squares)

    def solve(self, v: Tensor) -> Tensor:
        return v * self._inverse()

    def quadratic(self, v: Tensor) -> Tensor:
        inverse = self._inverse()
        out = torch.empty(len(v), dtype=solver_dtype(v.dtype), device=v.device)
        for part in spans(len(v), self.width):
            out[part] = v[part].to(inverse.dtype).square() @ inverse
        return out

    def whiten(self, v: Tensor) -> Tensor:
        return v * self._inverse().sqrt()

    def _reduce_sums(self, ranks: Ranks, dtype: torch.dtype) -> None:
        self.squares = total(self.squares, (self.width,), ranks, dtype)

    def _sizes(self) -> dict[str, list[tuple[int, ...]]]:
        return {"squares": [(self.width,)]}

    def _has_sums(self) -> bool:
        return self.squares is not None

    def _fourths(self, c: Tensor) -> float:
        return float(c.double().square().square().sum())

    def _add(self, squares: Tensor) -> None:
        self.squares = squares.clone() if self.squares is None else self.squares + squares.to(self.squares.device)

    def _inverse(self) -> Tensor:
        assert self.squares is not None
        diagonal = self.squares / self.count
        mean = float(diagonal.mean(dtype=torch.float64))
        if mean == 0:
            return diagonal
        squares = float(diagonal.double().square().sum())
        lam, scale = self.damping.of(mean, lambda: self._chosen(mean, squares, self.fourths))
        diagonal = diagonal + lam
        if float(diagonal.min()) == 0:
            raise self.singular(mean)
        return diagonal.reciprocal_().mul_(scale)


def total(x: Tensor | None, shape: tuple[int, ...], ranks: Ranks, dtype: torch.dtype) -> Tensor:
    """Return the sum of `x` over all ranks; a rank that has none counts as zeros of `shape`."""
    return ranks.sum(torch.zeros(shape, dtype=dtype) if x is None else x)
