"""How each sample of each step of a recorded run moved the queries' losses: one pass backwards over the steps.

Adam's adjoint carries the queries' gradients back through the optimizer's updates; what a step's gradient depends on
the weights by, its curvature, is the Fisher matrix of the step's own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .optimizers import Adjoint, Update

_NORM_EPS = 1e-6  # that torch.nn.utils.clip_grad_norm_ adds to a norm
_STABLE = 1.0  # times the weights' own, a part of them that curvature may take away in one step


@dataclass(frozen=True)
class Curvature:
    """Rows [n, K] whose Fisher matrix `rows^T diag(weight) rows` is the curvature of a step's loss; ``weight`` [n]."""

    rows: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Past:
    """One step on the mask, for the pass backwards.

    ``gradient`` [K]: what the optimizer got; ``state``: its moments [K] after the step; ``weights`` [K]: before it,
    where they decay by their gradient; ``clipped``: the factor by which gradients were clipped, and ``norm`` what the
    norm of all of them was; ``rows`` [n, K]: each sample's part of the gradient before clipping.
    """

    update: Update
    gradient: Tensor
    state: list[Tensor]
    weights: Tensor | None
    clipped: float
    rows: Tensor
    norm: float = 0.0


Product = Callable[[int, Tensor], Tensor]  # (step, [Q, K]) -> the Hessian of its loss times each


def through_clipping(gradient: Tensor, clipped: float, after: Tensor, scale: Tensor, norm: float) -> Tensor:
    """Return the adjoint of a gradient before it was clipped to a norm, [Q, K], from that of ``after`` [K].

    ``scale`` [K]: how many of the weights each column stands for. ``norm``: of the whole gradient before.
    """
    if clipped >= 1 or clipped == 0:
        return gradient * clipped
    before = after / clipped
    if norm == 0:
        return gradient * clipped
    along = (gradient * scale) @ before / (norm * (norm + _NORM_EPS))
    return clipped * (gradient - along[:, None] * before)


def bent(gradient: Tensor, direct: Tensor, curvature: Curvature, scale: Tensor) -> Tensor:
    """Return what a step's curvature adds to the adjoint of the weights before it, [Q, K].

    ``gradient`` [Q, K]: the adjoint of the step's gradient; ``direct`` [K]: how much of the gradient goes into the
    weights at once. Where that would overshoot, the step is taken implicitly, as a smaller one would have come to.
    """
    rows = curvature.rows * curvature.weight.clamp(min=0).sqrt()[:, None]
    along = (gradient * scale) @ rows.T
    pull = (rows * rows) @ (scale * direct).expand(rows.shape[1])
    if float(pull.sum()) > _STABLE:
        gram = (rows * (scale * direct)) @ rows.T
        if float(torch.linalg.matrix_norm(gram)) > _STABLE:
            gram.diagonal().add_(1)
            along = torch.cholesky_solve(along.T, torch.linalg.cholesky(gram)).T
    return along @ rows


def effects(
    query: Tensor,
    steps: Iterator[tuple[int, Past]],
    scale: Tensor,
    curvature: Callable[[int], Curvature] | None,
    product: Product | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield (step, how much each sample's part of it lowered each query's loss [Q, n]), the last step first.

    Args:
        query: gradients of the queries at the last weights [Q, K], float64.
        steps: (number, step), the last first.
        scale: how many of the model's weights each column stands for [K]: products over the columns, times this, are
            estimates of those over all weights.
        curvature: of the loss of a step; None: its gradient is taken not to depend on the weights, and derivatives are
            taken as they are, though an update changes by no more than there is of it.
        product: in its place, the Hessian of a step's loss times a matrix [Q, K].
    """
    adjoint: Adjoint | None = None
    for number, step in steps:
        if adjoint is None:
            adjoint = Adjoint(query, [torch.zeros_like(query) for _ in step.update.names])
        plain = curvature is None and product is None  # the optimizer's algebra alone
        part = None if plain else step.rows.abs().amax(0) * step.clipped
        back = step.update.back(adjoint, step.state, step.gradient, step.weights, part)
        gradient = through_clipping(back.gradient, step.clipped, step.gradient, scale, step.norm)
        yield number, -(gradient * scale) @ step.rows.T
        adjoint = back.before
        if product is not None:
            adjoint.weights = adjoint.weights + product(number, gradient)
        elif curvature is not None:
            direct = torch.as_tensor(back.direct, dtype=torch.float64) * step.clipped
            adjoint.weights = adjoint.weights + bent(gradient, direct, curvature(number), scale)
