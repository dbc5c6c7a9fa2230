"""What one batch showed of whose rows are whose, held against the ops of its forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .colours import NONE
from .labels import Labels, Piece, compact, unlabelled
from .layer import Layer
from .modules import Use
from .op_calls import OpUse, mark_data
from .outside import Outside
from .passes import Pass

# Of a capture's name, its output's shape and the samples of its rows [*lead] by the ops (NONE: these do not say): the
# samples that the rows are of, or None where they are of others than was found.
Settle = Callable[[str, torch.Size, Tensor], Tensor | None]


class Shown:
    """The outputs that are captured, as a forward that is followed makes them.

    ``uses``: the hooked modules. ``names``: the captures that had a gradient, all of which must be shown.
    ``is_shared``: whether each sample has its own copy of what a call gives.
    """

    def __init__(
        self,
        labels: Labels,
        uses: Mapping[str, Use],
        names: Iterable[str],
        settle: Settle,
        is_shared: Callable[[str, Tensor, Tensor], bool],
    ) -> None:
        self.labels, self.uses, self.settle = labels, uses, settle
        self._left, self._is_shared = set(names), is_shared
        self.busy = False  # what runs is not the model's
        self.outside: Followed | None = None  # what shows the ops that use parameters
        self._fit = True

    def __deepcopy__(self, _memo: Any) -> Shown:
        return self  # of a model that is copied while it is hooked

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Have hooks on the modules inside."""
        uses = self.uses.items()
        handles = [
            u.module.register_forward_hook(partial(self._leave, name, u), prepend=True, with_kwargs=True)
            for name, u in uses
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def fits(self) -> bool:
        """Whether all rows are of the samples that they were found to be of."""
        return self._fit and not self._left

    def show(self, name: str, use: Use, out: Tensor) -> None:
        """Compare the rows of a captured output; those that no op gives a sample get the one that was found."""
        self.busy = True
        try:
            self._left.discard(name)
            rows = _rows(use, out, self.labels.of(out))
            settled = self.settle(name, out.shape, rows)
            if settled is None:
                self._fit = False
            elif settled is not rows:
                own = use.scaled(torch.ones(out.shape, dtype=torch.int32, device=out.device), settled.to(torch.int32))
                self.labels.put(out, own, fixed=False)
        finally:
            self.busy = False

    def _leave(self, name: str, use: Use, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if module is not use.module or not isinstance(out, Tensor) or not out.ndim:
            return
        if self._is_shared(name, next(iter((*args, *kwargs.values()))), out):
            self._left.discard(name)
        else:
            self.show(name, use, out)


class Followed(Outside):
    """The ops of one forward that use parameters, shown and not tapped."""

    def __init__(self, current: Pass, raw: Mapping[int, Layer], constant: set[str], shown: Shown) -> None:
        super().__init__(current, raw, constant)
        self.shown = shown

    def _run(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], _derived: list[Tensor]) -> Any:
        return function(*args, **kwargs)  # with a graph to the parameters: gradients flow

    def _tap(self, use: OpUse, result: Tensor, *_: Any) -> Tensor:
        result = result.clone() if use.guessed else result  # which has labels of its own
        self.shown.show(use.name, use, result)
        mark_data(result)
        return result


def _rows(use: Use, out: Tensor, labels: Tensor | None) -> Tensor:
    """Return the samples of an output's rows, [*lead]."""
    lead = use.rows(torch.empty(out.shape, device="meta")).shape[:-1]
    if labels is None:
        return unlabelled(lead, out.device)
    for small in (compact(labels), labels):
        rows = Piece(use.rows(small), firm=True).over([-1]).labels.squeeze(-1)
        if _fits(rows.shape, lead):
            break
    return rows.expand(lead)


def _fits(shape: torch.Size, lead: torch.Size) -> bool:
    try:
        return bool(torch.broadcast_shapes(shape, lead) == lead)
    except RuntimeError:
        return False


def settled(current: Pass, name: str, shape: torch.Size, rows: Tensor) -> Tensor | None:
    """Return the samples of rows by what ``current`` found, where the ops give them none; see `Settle`."""
    found = [current.tied(k) for k in current.emitted_keys if k[0] == name and current.shapes[k] == shape]
    fitting = [samples for samples in found if samples.agree(rows)]
    if found and not fitting:
        return None
    if not found or not bool((rows == NONE).any()):
        return rows
    owners = [samples.owners(rows.shape, rows.device) for samples in fitting]
    same = all(torch.equal(owners[0], other) for other in owners[1:])
    return owners[0] if same else None
