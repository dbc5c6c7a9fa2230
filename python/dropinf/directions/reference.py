"""One ordinary backward of the untouched model, with which the products of a batch are compared.

For random weights r, ``sum_n r_n <grad l_n, v>`` must be ``<grad of sum_n r_n l_n, v>``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..capture.audit import TOLERANCE, coarsest, random_weights
from ..capture.preserved import gradients_taken
from .products import Named


class Reference:
    """The gradient of the weighted sum of a batch's losses, as plain autograd has it.

    ``parameters`` must require gradients. ``sizes`` [*losses.shape]: of the products that will be compared; each is
    then weighed by about its inverse, so that none hides behind larger ones.
    """

    def __init__(
        self,
        model: nn.Module,
        losses_of: Callable[[], Tensor],
        parameters: Mapping[str, nn.Parameter],
        place: int,
        sizes: Tensor | None = None,
    ) -> None:
        self._gradients: dict[str, Tensor] = {}
        seen = _Dtypes()
        take: dict[Tensor, Callable[[Tensor], None]] = {p: partial(self._take, name) for name, p in parameters.items()}
        with torch.enable_grad(), gradients_taken(model.parameters(), take):
            with seen:
                losses = losses_of()
            self.dtype = coarsest({*seen.found, *(p.dtype for p in parameters.values()), losses.dtype})
            if not losses.requires_grad:
                raise ValueError(
                    "loss_fn: its losses do not depend on any parameter of the direction; compute them without "
                    "torch.no_grad, detach or item"
                )
            usable = sizes is not None and sizes.shape == losses.shape and bool(sizes.isfinite().all())
            of_each = sizes.flatten() if sizes is not None and usable else None
            self._r = random_weights(losses.flatten(), of_each, self.dtype, None, place).view_as(losses)
            losses.backward(self._r)
        self.losses = losses.detach()

    def _take(self, name: str, g: Tensor) -> None:
        g = g.detach().to_dense() if g.is_sparse else g.detach()
        self._gradients[name] = self._gradients[name] + g if name in self._gradients else g

    def error(self, v: Named, losses: Tensor, products: Tensor) -> float:
        """Return how far products [*losses.shape] with one direction are from this gradient's, relative to what they
        are sums of; or how far the losses are from those of the untouched model."""
        terms = products.double() * self._r.double()
        total, size, squares = terms.new_zeros(()), terms.abs().sum(), terms.new_zeros(())
        for name, g in self._gradients.items():
            both = g.to(v[name].dtype) * v[name]
            part = both.sum(dtype=torch.float64).to(total)
            total, size = total + part, size + part.abs()
            squares = squares + torch.linalg.vector_norm(both, dtype=torch.float64).to(total).square()
        size = size + squares.sqrt()
        apart = (terms.sum() - total).abs()
        found = float(apart / size) if size else float(apart)
        moved = (losses - self.losses).nan_to_num().abs().max() / self.losses.nan_to_num().abs().max().clamp(min=1e-30)
        return max(found, float(moved))

    def agrees(self, error: float) -> bool:
        """Return whether an error is one that rounding explains."""
        return error <= TOLERANCE[self.dtype]


class _Dtypes(TorchFunctionMode):
    """Notes the dtypes that a forward computes in."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point():
            self.found.add(result.dtype)
        return result
