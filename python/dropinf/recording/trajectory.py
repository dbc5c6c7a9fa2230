"""Where the recorded gradients should have led the weights: what changes them beside the optimizer's steps is seen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .optimizers import Update
from .steps import Step

_ROUNDED = 1e-2  # of how far a step goes: half precision keeps so much of it
_DIGITS = 8  # roundings of a weight


class Trajectory:
    """Follows the optimizer on the mask. ``state``: its moments [K] before the next step.

    ``names``, ``widths``: of the layers; ``exact``: the rounding of each one's dtype.
    """

    def __init__(
        self, names: Sequence[str], widths: Sequence[int], exact: Sequence[float], state: list[Tensor]
    ) -> None:
        self._names, self._widths = names, list(widths)
        self._exact = torch.tensor(exact, dtype=torch.float64)
        self._state = [_wide(x) for x in state]
        self._weights: Tensor | None = None  # behind the last step
        self._moved: Tensor | None = None  # how far it went

    def check(self, weights: Tensor) -> None:
        """Raise ValueError where weights [K] are not where the last step should have led."""
        if self._weights is None or self._moved is None:
            return
        found = _wide(weights)
        apart, moved, size = (
            torch.stack(torch._foreach_norm(x.split(self._widths))) for x in (found - self._weights, self._moved, found)
        )
        least = torch.finfo(torch.float32).tiny
        wrong = ~(apart <= _ROUNDED * moved + _DIGITS * self._exact * size + least)
        if bool(wrong.any()):
            i = int(wrong.int().argmax())
            off, went = float(apart[i]), float(moved[i])
            raise ValueError(
                f"layer {self._names[i]}: its weights are not where the recorded steps lead (off by {off:.2g}; the "
                f"last step went {went:.2g}). Were they changed beside optimizer.step() (clamped, averaged, loaded, by "
                "another optimizer), or its state or settings by a hook or beside the loop? Record without that, or "
                "end the recording before"
            )

    def resume(self, update: Update, last: Step, state: list[Tensor]) -> None:
        """Take the last step that was recorded before. ``state``: before it."""
        assert last.weights is not None
        now, self._state = self._state, [_wide(x) for x in state]
        self.follow(update, last, last.weights)
        self._state = now

    def follow(self, update: Update, step: Step, weights: Tensor) -> None:
        """Take a step. ``weights`` [K]: before it."""
        before, gradient = _wide(weights), _wide(step.gradient)
        self._state = update.advance(self._state, gradient, before)
        self._weights = update.move(self._state, gradient, before)
        self._moved = self._weights - before


def _wide(x: Tensor) -> Tensor:
    return x.detach().double().cpu()
