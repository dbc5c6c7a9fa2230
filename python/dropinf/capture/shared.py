"""Rows that belong to several samples: a tensor that all of them share, or samples that a loss mixes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..workload import map_tensors
from .hooks import Pass, Signature, signature_of

MOST_LOSSES = 64  # that are backpropagated one by one to name two samples in an error


def constant(
    forward: Callable[[Any], None],
    modules: Mapping[str, nn.Module],
    signatures: Collection[Signature],
    batch: Any,
    n: int,
    cu: Tensor | None,
) -> set[str]:
    """Return the modules whose calls of these signatures give the same where the samples of the batch trade places.

    Such a call depends on no sample, as a table of positions does. None is returned where that cannot be tried.
    """
    sizes = {n} if cu is None else {int(cu[-1])}
    moved = 0

    def roll(t: Tensor) -> Tensor:
        nonlocal moved
        if not t.ndim or len(t) not in sizes or (cu is not None and t is cu) or len(t) == 1:
            return t
        moved += not torch.equal(t, t.roll(1, 0))
        return t.roll(1, 0)

    try:
        rolled = map_tensors(roll, batch)
        if not moved:
            return set()
        before = _outputs(forward, modules, signatures, batch, n)
        after = _outputs(forward, modules, signatures, rolled, n)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return set()
    return {
        name
        for name in modules
        if len(before[name]) == len(after[name]) and all(map(torch.equal, before[name], after[name]))
    }


def _outputs(
    forward: Callable[[Any], None],
    modules: Mapping[str, nn.Module],
    signatures: Collection[Signature],
    batch: Any,
    n: int,
) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {name: [] for name in modules}

    def note(name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if signature_of(name, x, out, n) in signatures:
            found[name].append(out.detach().clone())

    handles = [m.register_forward_hook(partial(note, name), with_kwargs=True) for name, m in modules.items()]
    try:
        forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def meeting(current: Pass, losses: Tensor, name: str) -> tuple[int, int] | None:
    """Return two samples whose losses both have a gradient in one row of a module's output."""
    owner: dict[tuple[int, int], int] = {}
    for n in range(min(len(losses), MOST_LOSSES)):
        weights = torch.zeros_like(losses)
        weights[n] = 1
        for call, rows in enumerate(current.rows_of(losses, weights, name)):
            for row in rows.reshape(-1, rows.shape[-1]).ne(0).any(1).nonzero().flatten().tolist():
                if owner.setdefault((call, row), n) != n:
                    return owner[call, row], n
    return None
