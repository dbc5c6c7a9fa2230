"""Whether a step's rows sum to the gradient that the optimizer gets, and what was done to it in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..capture.audit import FLOOR, FLOOR_OF_SUMS, TOLERANCE
from ..capture.ladder import AttributionError
from ..capture.layer import Layer
from .checks import unlike_step

_UNCHANGED = 1e-3  # from one, a factor is rounding's
_OTHERWISE = 1e-2  # of a layer's gradient, apart from a factor that all layers have; half precision rounds that much


class Balance:
    """Compares rows, the gradients of backward and those of the optimizer, layer by layer."""

    def __init__(self, layers: Mapping[str, Layer], widths: Sequence[int]) -> None:
        self._layers, self._widths = layers, list(widths)
        self._norm: float | None = None  # that gradients are clipped to

    def begin(self, rows: list[Tensor], want: Tensor, dtype: torch.dtype) -> int:
        """Return from which on the rows [n, K] of several backwards sum to the gradient [K].

        It is the first but behind a step that was skipped. ``dtype``: the coarsest that was computed in. Raises
        AttributionError where none do.
        """
        if not bool(want.isfinite().all()):
            raise AttributionError(
                "run: the gradient that the optimizer gets is not finite, and so would be the weights; skip such a "
                "step, as a GradScaler does (scaler=)"
            )
        first: dict[str, float] = {}
        for begin in range(len(rows)):
            wrong = self._differ(rows[begin:], want, dtype)
            if not wrong:
                return begin
            first = first or wrong
        raise unlike_step(first)

    def _differ(self, rows: list[Tensor], want: Tensor, dtype: torch.dtype) -> dict[str, float]:
        """Return the layers whose rows do not sum to the gradient, with how far they are off."""
        missing = torch.stack([x.sum(0) for x in rows]).sum(0) - want
        apart = torch.stack(torch._foreach_norm(missing.split(self._widths))).double()
        parts = [torch.stack(torch._foreach_norm(x.split(self._widths, 1))).double() for x in rows]
        sizes = torch.linalg.vector_norm(torch.stack(parts), dim=0)
        floors = [(FLOOR if len(layer.shape) > 1 else FLOOR_OF_SUMS)[dtype] for layer in self._layers.values()]
        floor = torch.tensor(floors, dtype=torch.float64).to(sizes) * sizes.max()
        errors = apart / (sizes + floor).clamp(min=torch.finfo(torch.float64).tiny)
        if bool((errors <= TOLERANCE[dtype]).all()):
            return {}
        found = dict(zip(self._layers, errors.tolist(), strict=True))
        return {name: error for name, error in found.items() if not error <= TOLERANCE[dtype]}

    def clipped(self, before: Tensor, after: Tensor, scale: float) -> float:
        """Return the factor by which a gradient [K] was clipped between backward and step; 1 where it was not.

        ``scale``: of the loss, which was divided out of it. Raises AttributionError where it is no one factor.
        """
        if scale == 1 and torch.equal(before, after):
            return 1.0
        wide, found = before.double(), after.double()
        factor = float(wide @ found / (wide @ wide).clamp(min=torch.finfo(torch.float64).tiny))
        both = zip(self._layers, (found - factor * wide).split(self._widths), found.split(self._widths), strict=True)
        for name, apart, size in both:
            if float(apart.norm()) > _OTHERWISE * float(size.norm()):
                raise AttributionError(
                    f"layer {name}: its gradient was changed between backward and optimizer.step(), and not by the one "
                    "factor that clipping all to a norm is; take that out, or clip all by clip_grad_norm_"
                )
        clipped = factor * scale
        if clipped < 0:
            raise AttributionError("run: the gradient's sign was changed between backward and optimizer.step()")
        if clipped > 1 + _UNCHANGED:
            raise AttributionError(
                f"run: gradients were multiplied by {clipped:.3g} between backward and optimizer.step(); clipping "
                "makes them smaller. Scale the loss instead, or pass scaler= where a GradScaler does (and only there)"
            )
        return 1.0 if abs(clipped - 1) < _UNCHANGED else clipped

    def check_norm(self, gradients: list[Tensor]) -> float:
        """Return the norm of all gradients, which are smaller than backward made them.

        Raises AttributionError where they are not clipped to one norm.
        A factor of another kind does not depend on the gradients, and the pass backwards would be wrong by that.
        """
        norm = float(torch.stack([x.norm().double().cpu() for x in gradients]).norm())
        before, self._norm = self._norm, norm
        if before is not None and abs(norm - before) > _OTHERWISE * before:
            raise AttributionError(
                f"run: gradients were made smaller between backward and optimizer.step(), to a norm of {norm:.4g} now "
                f"and of {before:.4g} before, which clipping to one norm does not do; divide the loss instead"
            )
        return norm
