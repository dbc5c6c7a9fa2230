"""When a batch is audited, and what an audit finds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set

import torch
from torch import Tensor

from . import sharded
from .audit import LITTLE, OTHERWISE, TOLERANCE, Audited, Expected, coarsest, expected, is_due, norm, sketched
from .checks import not_finite
from .knowledge import Knowledge, Plan
from .ladder import RUNGS
from .layer import Layer
from .passes import Pass
from .preserved import Flags, Start
from .taps import any_true


class Proof:
    """The audit of one batch, the ``place``-th of its call: what its rows must sum to is computed once."""

    def __init__(self, known: Knowledge, layers: Mapping[str, Layer], flags: Flags, start: Start, place: int) -> None:
        self.known, self.flags, self.start, self.place = known, flags, start, place
        self.layers = {n: layer for n, layer in layers.items() if _has_gradient(known.targets[n].tensor)}
        self._expected: Expected | None = None
        self._weighted = False
        self.says_nothing = False  # no layer had a gradient when it was audited

    def why(self, plan: Plan, reached: frozenset[str], unforeseen: str | None = None) -> str | None:
        """Return why the batch is to be audited, or None.

        ``reached``: the modules that got a gradient; ``unforeseen``: why its look does not matter.
        """
        known = self.known
        if known.audit == "never" or not self.layers:
            return None
        if known.audit == "every":
            return "every batch"
        if not known.audits:
            return "first batch"
        if reached not in plan.gradients:
            return "new look"
        if unforeseen is not None:
            return unforeseen
        return self._by_place if is_due(self.place) else None

    @property
    def _by_place(self) -> str:
        return f"batch {self.place} of its call"

    def first_gradients(self, plan: Plan, store: Mapping[str, Tensor]) -> list[Tensor]:
        """Return whether layers have a gradient that had none in any audit of batches that look alike."""
        if self.known.audit == "never":
            return []
        return [store[name].any() for name in self.layers if name not in plan.compared]

    def sums(self, current: Pass) -> Expected | None:
        """Return what rows of some layers must sum to, by what their parameters got in the same backward, if any."""
        names, weights = current.summed & self.layers.keys(), current.weights
        if self.known.audit == "never" or not names or weights is None:
            return None
        found = {name: weights.new_zeros(self.layers[name].stored_shape) for name in names}
        found |= {name: sketched(self.layers[name], current.sums[name]) for name in names & current.sums.keys()}
        return Expected(weights, found, weights)

    def unequal(self, want: Expected, store: Mapping[str, Tensor], dtype: torch.dtype) -> str | None:
        """Return that rows that differ from what they must sum to are not as coarse as half precision, or None."""
        errors = want.errors({name: store[name] for name in self.layers}, self.layers, dtype)
        coarse = dtype.itemsize < 4 and all(errors.get(name, 0) <= TOLERANCE[dtype] for name in want.sketches)
        return None if coarse else "rows do not sum to their parameter's gradient"

    def _below_floor(self, why: str, want: Expected, store: Mapping[str, Tensor], dtype: torch.dtype) -> list[str]:
        """Return layers far below the largest that differ from plain autograd's sum: by rounding, or by a fault."""
        rungs, usual = self.known.ladder.rungs, is_due(self.place) and why == self._by_place
        sure = RUNGS[-1:] if not usual else (RUNGS[0], RUNGS[-1])
        names = [name for name in self.layers if rungs[name] not in sure]
        differ = want.differ({name: store[name] for name in names}, dtype)
        return [name for name, wrong in differ.items() if bool(wrong)]

    def doubted(self, store: Mapping[str, Tensor], current: Pass, dtype: torch.dtype) -> Tensor | None:
        """Return of each sample [N] whether colours may have missed a part of it; None where rows were not looked at.

        Where samples meet in a row, what lies below the exactness of colours goes to the other sample. It may be much
        of what a sample has that is far below others: in all layers, or in one whose colours were not exact.
        """
        colours = current.colours
        if self.known.audit == "never" or not self.layers or colours is None:
            return None
        spread: dict[str, Tensor] = {}
        for (name, _), found in colours.spread.items():
            for plan in current.uses[name].plans:
                spread[plan.name] = torch.maximum(found, spread[plan.name]) if plan.name in spread else found
        each = [norm(store[name].flatten(1), 1) for name in self.layers]
        device = each[0].device
        norms = torch.stack([x.to(device) for x in each])
        sizes = (norms / norms.amax(1, keepdim=True)).nan_to_num()
        zero, eps = norms.new_zeros(()), torch.finfo(dtype).eps
        apart = torch.stack([spread.get(name, zero).to(norms) for name in self.layers])
        found = (sizes * TOLERANCE[dtype] < apart[:, None]).any(0) | (sizes.amax(0) * TOLERANCE[dtype] < eps)
        for unsure in colours.unsure:
            found |= unsure.to(device)
        return found

    def expect(
        self,
        losses_of: Callable[[], Tensor],
        store: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype = torch.float32,
        only: Tensor | None = None,
    ) -> Expected:
        """Return what the batch's rows, or ``only`` some [N], must sum to, from the model as its user has it.

        ``store``: rows to compare with, computed in ``dtype`` at the coarsest. Samples are weighted so that a small
        one's counts as much as a large one's.
        """
        if only is not None:
            return self._expect(losses_of, store, dtype, only)
        if self._expected is None or (store is not None and not self._weighted):
            self._weighted = store is not None
            self._expected = self._expect(losses_of, store, dtype)
        return self._expected

    def _expect(
        self,
        losses_of: Callable[[], Tensor],
        store: Mapping[str, Tensor] | None,
        dtype: torch.dtype,
        only: Tensor | None = None,
        r: Tensor | None = None,
    ) -> Expected:
        parameters = {name: self.known.targets[name].tensor for name in self.layers}
        sizes = None if store is None else _norms([store[name] for name in self.layers])
        self.start.restore()
        model, place = self.known.model, self.place
        found = expected(model, losses_of, self.layers, parameters, self.flags, sizes, dtype, only, place, r)
        self.start.restore()
        if r is None and any_true(not_finite(found.sketches)):  # half precision may hold rows, and not their sum
            return self._expect(losses_of, store, dtype, only, found.r * LITTLE)
        return found

    def coarsest(self, dtypes: Set[torch.dtype]) -> torch.dtype:
        """Return the least precise dtype of parameters and of what was seen."""
        return coarsest({*dtypes, *(self.known.targets[name].tensor.dtype for name in self.layers)})

    def wrong(
        self,
        store: Mapping[str, Tensor],
        losses: Tensor,
        dtype: torch.dtype,
        plan: Plan,
        why: str,
        want: Expected,
        losses_of: Callable[[], Tensor],
    ) -> dict[str, float]:
        """Compare rows with plain autograd. Return the error of each layer that is wrong; record it if none is."""
        known, slack = self.known, TOLERANCE[dtype]
        errors = want.errors({name: store[name] for name in self.layers}, self.layers, dtype)
        wrong = {name: error for name, error in errors.items() if not error <= slack}
        apart = (want.losses - losses.to(want.losses)).nan_to_num().abs().max()
        if not apart <= slack * want.losses.nan_to_num().abs().max():  # the model does something else under hooks
            wrong |= {name: math.inf for name in known.ladder.on("hook") if name not in wrong}
        # A gradient that is rounding alone, as of an attention's key bias, is no layer's fault: whitened, it is large.
        doubted = want.rounding_alone(wrong, dtype)
        sure = {name: error for name, error in wrong.items() if name not in doubted}
        faint = doubted or ([] if wrong else self._below_floor(why, want, store, dtype))
        if faint:
            otherwise = self._expect(losses_of, None, dtype, r=want.r * OTHERWISE)
            wrong = sure | want.beyond_rounding(faint, store, otherwise, dtype)
        compared = errors.keys()
        errors = {name: error for name, error in errors.items() if name in wrong or name not in doubted}
        self.says_nothing = not errors  # zeros are right in any way
        if errors and not wrong:
            known.audits.append(Audited(self.place, why, errors))
            plan.compared |= compared
        return wrong


def _norms(rows: Sequence[Tensor]) -> Tensor:
    """Return the norm of each sample's rows of all layers, [N]."""
    return norm(torch.stack([norm(c.flatten(1), 1).cpu() for c in rows], 1), 1)


def _has_gradient(parameter: Tensor) -> bool:
    """Return whether a parameter can have a gradient of its own: shards and quantized weights have none."""
    return parameter.is_floating_point() and not sharded.is_sharded(parameter)
