"""Rows that belong to several samples: a tensor that all of them share, or samples that a loss mixes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..workload import map_tensors
from .colours import SEVERAL, Colours
from .passes import Pass
from .taps import Signature, signature_of

MOST_LOSSES = 64  # that are backpropagated one by one to name two samples in an error


def rolled(batch: Any, n: int, cu: Tensor | None, others: Collection[int]) -> Any:
    """Return the batch with its samples (the rows of packed ones) one place on, or None where nothing moves.

    ``others``: the places of tensors that are of no samples, though they may be as many.
    """
    sizes = {n} if cu is None else {int(cu[-1])}
    moved, place = 0, -1

    def roll(t: Tensor) -> Tensor:
        nonlocal moved, place
        place += 1
        if place in others or not t.ndim or len(t) not in sizes or (cu is not None and t is cu) or len(t) == 1:
            return t
        moved += not torch.equal(t, t.roll(1, 0))
        return t.roll(1, 0)

    turned = map_tensors(roll, batch)
    return turned if moved else None


def changed(batch: Any, n: int, others: Collection[int]) -> Any:
    """Return the batch with other samples: numbers one larger, ids in another order; None where nothing changes."""
    place, differs = -1, False

    def change(t: Tensor) -> Tensor:
        nonlocal place, differs
        place += 1
        if place in others or not t.ndim or len(t) != n or t.dtype == torch.bool:
            return t
        other = t + 1 if t.is_floating_point() else t.flip(-1) if t.ndim > 1 else t
        if torch.equal(other, t) and t.ndim > 1 and int(t.max()) > 1:
            other = torch.zeros_like(t)  # one id, again and again
        differs = differs or not torch.equal(other, t)
        return other

    found = map_tensors(change, batch)
    return found if differs else None


def constant(
    outputs: Callable[[Any], Mapping[str, list[Tensor]]],
    batch: Any,
    n: int,
    cu: Tensor | None,
    others: Collection[int],
) -> set[str]:
    """Return the names whose ``outputs`` of a batch are the same where its samples trade places, or all are others.

    They then depend on no sample, as a table of positions does. None is returned where that cannot be tried.
    """
    try:
        turned = rolled(batch, n, cu, others)
        if turned is None and cu is None:  # all samples are alike
            turned = changed(batch, n, others)
        if turned is None:
            return set()
        before, after = outputs(batch), outputs(turned)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return set()
    return {
        name
        for name, was in before.items()
        if len(was) == len(after.get(name, [])) and all(map(torch.equal, was, after[name]))
    }


def outputs_of(
    forward: Callable[[Any], None],
    modules: Mapping[str, nn.Module],
    signatures: Collection[Signature],
    n: int,
    batch: Any,
) -> dict[str, list[Tensor]]:
    """Return the outputs of modules in a forward of the batch, of the calls with these signatures."""
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


def mixing_leaves(losses_of: Callable[[Any], Tensor], batch: Any, n: int) -> bool:
    """Return whether every floating tensor of the batch, one row a sample, has rows that several losses depend on.

    One alone may be a table that all samples share, class weights say; where all are met, samples mix.
    """
    rows: list[Tensor] = []

    def leaf(t: Tensor) -> Tensor:
        if t.is_floating_point() and t.ndim and len(t) == n:
            t = t.detach().clone().requires_grad_()
            rows.append(t)
        return t

    with torch.enable_grad():
        losses = losses_of(map_tensors(leaf, batch))
    if not rows or len(losses) != n or not losses.requires_grad:
        return False
    colours = Colours(n, {losses.dtype, *(t.dtype for t in rows)})
    for digit in range(-1, colours.passes):
        weights = torch.ones_like(losses) if digit < 0 else colours.weights(losses, digit)
        for i, g in enumerate(torch.autograd.grad(losses, rows, weights, retain_graph=True, allow_unused=True)):
            if g is not None and digit < 0:
                colours.sign((str(i), 0), g.reshape(n, -1))
            elif g is not None:
                colours.read((str(i), 0), g.reshape(n, -1), digit)
    found = [bool((colours.samples(key) == SEVERAL).any()) for key in colours.rows]
    return bool(found) and all(found)
