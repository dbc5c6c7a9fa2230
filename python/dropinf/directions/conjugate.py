"""Conjugate gradients for several right-hand sides at once, whose state can be written and read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .runs import Tensors

Linear = Callable[[Tensors], Tensors]


def dots(a: Tensors, b: Tensors) -> Tensor:
    """Return the dot products of rows, [Q] in float64 on the CPU, query by query."""
    return torch.stack(
        [
            torch.stack([(x[q].double() * b[name][q].double()).sum().cpu() for name, x in a.items()]).sum()
            for q in range(len(next(iter(a.values()))))
        ]
    )


def _rows(tensors: Tensors, at: Tensor) -> Tensors:
    return {name: x[at.to(x.device)] for name, x in tensors.items()}


def _add(to: Tensors, at: Tensor, factors: Tensor, x: Tensors) -> None:
    """Add factors [q] times x [q, *shape] to the rows ``at`` [q]."""
    for name, y in to.items():
        scaled = factors.to(y.device, y.dtype).view(-1, *[1] * (y.dim() - 1)) * x[name]
        y.index_add_(0, at.to(y.device), scaled)


@dataclass
class Conjugate:
    """Solves A x = b for Q right-hand sides, each with its own scalars, one product of A with all a step.

    A and the preconditioner M^{-1} are symmetric and positive definite. Dot products are in float64, vectors as given.
    Source: Hestenes & Stiefel (1952); preconditioned as in Shewchuk (1994), B3.

    ``residuals``: |b - A x| / |b| of each query, before the first step and after each: a list of [Q] in float64.
    """

    b: Tensors
    x: Tensors
    r: Tensors  # b - A x, by the recursion
    p: Tensors  # the next direction
    rho: Tensor  # <r, M^{-1} r>, float64 [Q]
    residuals: list[Tensor]
    sizes: Tensor = field(init=False)  # |b|, float64 [Q]

    def __post_init__(self) -> None:
        self.sizes = dots(self.b, self.b).sqrt()

    @classmethod
    def begin(cls, b: Tensors, multiply: Linear, precondition: Linear, start: Tensors | None = None) -> Conjugate:
        """Return the state at x = 0, or at the multiple of ``start`` that is nearest to the solution, in A's norm.

        Raises ValueError where b is not finite.
        """
        x, r = {name: torch.zeros_like(v) for name, v in b.items()}, {name: v.clone() for name, v in b.items()}
        found = cls(b, x, r, {}, torch.empty(0), [])
        if not bool(found.sizes.isfinite().all()):
            q = int((~found.sizes.isfinite()).nonzero()[0])
            raise ValueError(f"queries: the gradient of query {q} is not finite; look at its loss")
        if start is not None:
            product, every = multiply(start), torch.arange(len(found.sizes))
            curved = dots(start, product)
            best = torch.where(curved > 0, dots(start, b) / curved, torch.zeros_like(curved))
            _add(x, every, best, start)
            _add(r, every, -best, product)
        z = precondition(r)
        found.p, found.rho = z, dots(r, z)
        found.residuals.append(found._relative(dots(r, r).sqrt()))
        return found

    @property
    def steps(self) -> int:
        """The number of steps that were taken."""
        return len(self.residuals) - 1

    def _relative(self, norms: Tensor) -> Tensor:
        """Return norms of residuals relative to |b|; 0 where b is 0, which is solved as it is."""
        return torch.where(self.sizes > 0, norms / self.sizes, torch.zeros_like(norms))

    def step(self, multiply: Linear, precondition: Linear, tolerance: float) -> None:
        """Take one step for each query whose relative residual is above the tolerance.

        Raises ValueError where A is not positive definite along a direction.
        """
        at = (self.residuals[-1] > tolerance).nonzero().flatten()
        norms = self.residuals[-1].clone()
        if len(at):
            p = _rows(self.p, at)
            ap = multiply(p)
            curved = dots(p, ap)
            bad = ~(curved > 0)
            if bool(bad.any()):
                raise ValueError(
                    f"damping: the damped curvature is not positive along the direction of query {int(at[bad][0])} "
                    f"({float(curved[bad][0]):.3g}), where conjugate gradients do not work; take a larger damping, or "
                    'curvature="fisher", which no loss makes negative'
                )
            alpha = self.rho[at] / curved
            _add(self.x, at, alpha, p)
            _add(self.r, at, -alpha, ap)
            r = _rows(self.r, at)
            z = precondition(r)
            rho = dots(r, z)
            _add(z, torch.arange(len(at)), rho / self.rho[at], p)
            for name, y in self.p.items():
                y[at.to(y.device)] = z[name]
            self.rho[at] = rho
            norms[at] = dots(r, r).sqrt() / self.sizes[at]
        self.residuals.append(norms)

    def renew(self, multiply: Linear, precondition: Linear) -> None:
        """Compute the residual anew as b - A x, and begin from there with the next step."""
        ax = multiply(self.x)
        self.r = {name: v - ax[name] for name, v in self.b.items()}
        self.p = precondition(self.r)
        self.rho = dots(self.r, self.p)
        self.residuals[-1] = self._relative(dots(self.r, self.r).sqrt())

    def tensors(self) -> dict[str, Tensor]:
        """Return what a file keeps."""
        parts: Mapping[str, Tensors] = {"x": self.x, "r": self.r, "p": self.p}
        kept = {f"{part}.{name}": v for part, held in parts.items() for name, v in held.items()}
        return kept | {"rho": self.rho, "residuals": torch.stack(self.residuals)}

    @classmethod
    def from_tensors(cls, b: Tensors, tensors: Mapping[str, Tensor]) -> Conjugate:
        """Return the state that `tensors` gave, for the same right-hand sides."""
        x, r, p = ({name: tensors[f"{part}.{name}"].to(v.device) for name, v in b.items()} for part in ("x", "r", "p"))
        return cls(b, x, r, p, tensors["rho"], list(tensors["residuals"]))
