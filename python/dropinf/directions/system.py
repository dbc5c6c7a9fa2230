"""The damped curvature as a linear system, and the loop that solves it."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import torch
from tqdm.auto import tqdm

from .conjugate import Conjugate
from .curvature import Curvature
from .preconditioner import Preconditioner
from .runs import Tensors
from .state import Held, StateFile


class Progress:
    """A bar on standard error, one unit a training batch, if it is to be shown."""

    def __init__(self, steps: int, batches: int | None, *, shown: bool) -> None:
        total = None if batches is None else steps * batches
        self._bar = tqdm(total=total, desc="refine", unit="batch") if shown else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def batch(self) -> None:
        """Note a batch that was read."""
        if self._bar is not None:
            self._bar.update()

    def step(self, state: Conjugate) -> None:
        """Show the residuals of now."""
        if self._bar is not None:
            low, high = (float(x) for x in state.residuals[-1].aminmax())
            self._bar.set_postfix_str(f"step {state.steps}, residuals {low:.2g} to {high:.2g}")


class System:
    """(C + lambda I) x = b for all queries; ``scale``: of C, relative to the preconditioner's Fisher matrix."""

    def __init__(
        self, curvature: Curvature, helper: Preconditioner | None, damping: float, scale: float, bar: Progress
    ) -> None:
        self._curvature, self._helper, self._damping, self._scale = curvature, helper, damping, scale
        self._bar = bar

    def multiply(self, v: Tensors) -> Tensors:
        """Return (C + lambda I) v."""
        found = self._curvature.product(v, self._bar.batch)
        for name, x in found.items():
            x.add_(v[name], alpha=self._damping)
        return found

    def precondition(self, r: Tensors) -> Tensors:
        """Return M^{-1} r; without a Fisher matrix r / lambda."""
        if self._helper is None:
            return {name: x / self._damping for name, x in r.items()}
        return self._helper.apply(r, self._damping, self._scale)

    def begin(self, b: Tensors, start: Tensors | None) -> Conjugate:
        """Return the state before the first step."""
        return Conjugate.begin(b, self.multiply, self.precondition, start)

    def solve(
        self, state: Conjugate, steps: int, tolerance: float | None, check: Callable[[], None], file: StateFile | None
    ) -> None:
        """Take steps until all residuals are below the tolerance, or as many as are asked for; write each to the file.

        ``check`` is called after each product, before anything is made of it that stays.

        Raises:
            ValueError: the tolerance was not reached, or the system is not positive definite.
        """
        least = max(torch.finfo(x.dtype).eps for x in state.b.values())  # below it, the recursion says nothing
        self._bar.step(state)
        while True:
            if tolerance is not None and float(state.residuals[-1].max()) <= tolerance:
                state.renew(self.multiply, self.precondition)
                check()
                if float(state.residuals[-1].max()) <= tolerance:
                    return
            if state.steps >= steps:
                break
            state.step(self.multiply, self.precondition, max(tolerance or 0.0, least))
            check()
            if file is not None:
                batches = self._curvature.batches.digest
                file.write(Held(state.tensors(), batches, self._damping, self._scale))
            self._bar.step(state)
        if tolerance is not None:
            worst = int(state.residuals[-1].argmax())
            raise ValueError(
                f"tolerance is {tolerance:g}, and after {state.steps} steps the relative residual of query {worst} is "
                f"{float(state.residuals[-1][worst]):.3g}; allow more steps (with out= a repeated call goes on), take "
                "a larger damping, which needs fewer, a precondition=, or float64 where rounding is the limit"
            )
