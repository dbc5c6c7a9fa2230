"""Derivatives of what a model makes of a batch, along directions and back, with the model left as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.preserved import Attributes, Flags, Start, renormalised
from .products import backward_products, differentiable, forward_product

Tensors = dict[str, Tensor]  # name of a parameter -> [Q, *its shape], of Q queries
Function = Callable[[nn.Module, Any], Tensor]  # (model, batch) -> losses [N], or outputs of any shape
# How far <w, J v> and <J^T w, v> may lie apart: relative to them, and to |J^T w| |v|.
_APART = {torch.float64: (1e-7, 1e-12), torch.float32: (1e-3, 1e-5)}
_APART_HALF = (0.2, 1e-2)


class Runs:
    """A model that is run on one batch several times, each from the same state.

    ``parameters``: those that are differentiated, by name.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], flags: Flags, attributes: Attributes
    ) -> None:
        self.model, self.parameters = model, dict(parameters)
        self._flags, self._attributes = flags, attributes
        self._pushes_forward = True  # until an op turns out to have no forward-mode derivative

    @contextmanager
    def on(self, batch: Any) -> Iterator[Start]:
        """Have the state that each run of a batch starts from, and put it back afterwards.

        Inside, attention and recurrent layers run by kernels that have all the derivatives.
        """
        self._attributes.check_untouched()
        self._attributes.refresh()
        changed = renormalised(self.model)
        start = Start(self._attributes, batch, copied=True, changed=changed)
        self._attributes.pending = start
        tracked = self.parameters.values()
        with self._flags.frozen(), self._flags.only(tracked), differentiable(self.model):
            yield start
            start.check_parameters(self.model, changed)
        start.restore()
        self._attributes.pending = None

    def outputs(self, function: Function, batch: Any, start: Start) -> Tensor:
        """Return what the function gives, with the graph back to the parameters.

        Raises:
            ValueError: it depends on none of them.
        """
        start.restore()
        found = function(self.model, batch)
        if not isinstance(found, Tensor) or not found.requires_grad:
            what = f"a {type(found).__name__}" if not isinstance(found, Tensor) else "a tensor without a gradient"
            name = getattr(function, "__name__", repr(function))
            raise ValueError(
                f"{name}: it returned {what}; it must return a tensor that depends on the model's parameters, computed "
                "without torch.no_grad, detach or item"
            )
        return found

    def pulled(self, outputs: Tensor, weights: Sequence[Tensor]) -> Iterator[Tensors]:
        """Yield J^T w for each w that is shaped as the outputs: parameter -> [*shape]."""
        tensors = list(self.parameters.values())
        for i, w in enumerate(weights):
            found = torch.autograd.grad(
                outputs, tensors, w, retain_graph=i + 1 < len(weights), allow_unused=True, materialize_grads=True
            )
            yield dict(zip(self.parameters, found, strict=True))

    def pushed(self, function: Function, batch: Any, directions: Tensors, start: Start) -> list[Tensor]:
        """Return J v of each direction, shaped as the outputs: in forward mode, or by two backwards if an op lacks it.

        Raises:
            RuntimeError: an op has neither derivative.
        """

        def outputs() -> Tensor:
            return function(self.model, batch)

        lacking: Exception | None = None
        if self._pushes_forward:
            try:
                return [self._forward(outputs, v, start) for v in self._each(directions)]
            except (RuntimeError, NotImplementedError) as error:
                if "forward AD" not in str(error) and "forward mode" not in str(error):
                    raise
                self._pushes_forward, lacking = False, error
        start.restore()
        try:
            return backward_products(self.model, outputs, self.parameters, self._each(directions))[1]
        except (RuntimeError, NotImplementedError) as error:
            raise RuntimeError(
                f"model: an op has neither a forward-mode nor a second derivative ({lacking or error}), so products "
                "with the curvature cannot be formed; compute that op from plain ones, or use compressed scores"
            ) from error

    def _forward(self, outputs: Callable[[], Tensor], v: Tensors, start: Start) -> Tensor:
        start.restore()
        return forward_product(self.model, outputs, self.parameters, v)[1]

    def _each(self, directions: Tensors) -> Iterator[Tensors]:
        """Yield each direction in the parameters' dtypes."""
        for q in range(len(next(iter(directions.values())))):
            yield {name: x[q].to(self.parameters[name].dtype) for name, x in directions.items()}


def check_products(w: Tensor, pushed: Tensor, pulled: Tensors, v: Tensors, q: int) -> None:
    """Raise RuntimeError unless <w, J v> is <J^T w, v>, which two independent derivatives must agree on.

    ``v[name][q]`` is the direction.
    """
    one = float((w.double() * pushed.double()).sum())
    pairs = [(g.double(), v[name][q].double()) for name, g in pulled.items()]
    other = float(sum((g * x).sum() for g, x in pairs))
    sizes = math.sqrt(sum(float(g.square().sum()) for g, _ in pairs) * sum(float(x.square().sum()) for _, x in pairs))
    dtypes = {w.dtype, *(g.dtype for g in pulled.values())}
    relative, least = max(_APART.get(dtype, _APART_HALF) for dtype in dtypes)
    if not abs(one - other) <= relative * max(abs(one), abs(other)) + least * sizes:
        raise RuntimeError(
            f"model: its forward-mode derivative along a direction and its backward differ ({one:.6g} and "
            f"{other:.6g} for the same product), so curvature products would be wrong. Likely a hook or an autograd "
            "Function changes gradients, a weight is cached or detached in forward, an op can be differentiated once "
            "only, or a state changes from call to call that no module holds; take that out, or leave the parameters "
            "out with layers="
        )
