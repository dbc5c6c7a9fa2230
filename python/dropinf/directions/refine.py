"""Queries' influence directions on whole gradients, by conjugate gradients on the curvature of the training set."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ..capture import sharded
from ..capture.checks import check_batchnorm, check_losses, check_surroundings
from ..capture.identity import identity
from ..capture.preserved import preserved
from ..capture.targets import LayerFilter, find_targets, no_parameters
from ..compressor import Compressor
from ..files import checksum
from ..fisher.damping import damping_number
from ..fisher.fisher import Fisher
from ..loss_name import name_of_loss
from ..origin import Origin, check_one_model
from ..workload import LossFn, check_loss, check_pair, tensor_bytes, unwrap
from .conjugate import Conjugate
from .curvature import Again, Curvature, LossOfOutputs
from .direction import Direction
from .preconditioner import Preconditioner
from .runs import Runs, Tensors
from .state import StateFile
from .system import Progress, System

CurvatureKind = Literal["fisher", "gauss-newton"]
_MOVED = "What makes the batches must not train the model meanwhile, and no other thread may"


class Refined(NamedTuple):
    """What `refine` gives.

    ``residuals``: |b - (C + lambda I) x| / |b| of each query, float64 [steps + 1, Q]; the first row is of the start.
    """

    direction: Direction
    residuals: Tensor
    damping: float  # lambda, in units of the curvature


def refine(
    model: nn.Module,
    queries: Iterable[Any],
    batches: Iterable[Any],
    loss_fn: LossFn,
    *,
    curvature: CurvatureKind = "fisher",
    outputs_fn: LossFn | None = None,
    loss_of_outputs: LossOfOutputs | None = None,
    query_loss: LossFn | None = None,
    layers: LayerFilter = None,
    damping: float = 10.0,
    absolute: bool = False,
    start: Direction | None = None,
    precondition: tuple[Fisher, Compressor] | None = None,
    steps: int = 4,
    tolerance: float | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Refined:
    """Return queries as directions on whole gradients, ``x_q = (C + lambda I)^{-1} grad l_q``, by conjugate gradients.

    C is the curvature of the training set in all parameters, and is never formed: a step takes one product of it with
    all queries, which costs about two forwards and two backwards of each batch and query. Memory: four times the
    parameters for each query. ``rerank(model, batches, refined.direction, loss_fn)`` then scores samples.

    Args:
        queries: batches of Q samples in all.
        batches: of the training samples; each step reads them all, in the same order.
        loss_fn: ``(model, batch) -> losses [N]``, as for a `Compressor`.
        curvature: "fisher", C = (1/N) sum_n g_n g_n^T of the losses' gradients; or "gauss-newton",
            C = (1/N) sum_n J_n^T H_n J_n, with J_n the Jacobian of the outputs and H_n the Hessian of the loss in them.
        outputs_fn: ``(model, batch) -> outputs``, a tensor of any shape; of "gauss-newton".
        loss_of_outputs: ``(outputs, batch) -> losses [N]``, convex in the outputs, with
            ``loss_of_outputs(outputs_fn(model, batch), batch)`` the same as ``loss_fn(model, batch)``.
        query_loss: what is measured on the queries; ``loss_fn`` by default.
        layers: which parameters, as for a `Compressor`. The directions are zero on others.
        damping: lambda, in units of the mean diagonal of C, which 32 random directions or more estimate (Hutchinson).
            The trace of "gauss-newton" is often tens of times that of "fisher", so the same number is another lambda.
        absolute: ``damping`` is lambda itself.
        start: directions of the same queries to begin from, such as ``direction(query, fisher, compressor)``; the
            multiple of each that is nearest to the solution is taken.
        precondition: a Fisher matrix and the Compressor whose mask it is of, plain `Dropout` or `Identity`. On entries
            that are not kept, the preconditioner is the damping alone. "kronecker" on `Identity` is EK-FAC.
        steps: at most so many.
        tolerance: the relative residual that each query must reach; its last value is computed anew from x. None: take
            the steps, whatever the residual. A few steps are a regularisation of their own.
        out: a file that keeps the state after each step. A repeated call goes on from it, to the same bytes.
        progress: show a bar on standard error, with the largest residual.

    Raises:
        TypeError: not a module, a function, a Direction, a Fisher or a Compressor.
        ValueError: a tolerance that was not reached; batches that can be read once only, or change; losses that are
            not [N]; a BatchNorm in train mode; shards; a curvature that is not positive; a file of other work.
        RuntimeError: an op without the derivatives that are needed, or derivatives that contradict each other.

    Source: Martens, "Deep learning via Hessian-free optimization" (2010); for influence, Koh & Liang,
    arXiv 1703.04730.
    """
    check_pair(model, loss_fn)
    number = _check_numbers(damping, steps, tolerance)
    _check_functions(curvature, outputs_fn, loss_of_outputs, query_loss)
    inner = unwrap(model)
    check_surroundings()
    check_batchnorm(inner)
    train, asked = Again(batches, "batches"), Again(queries, "queries")
    parameters = _parameters(inner, layers)
    with preserved(inner) as (flags, attributes):
        runs = Runs(inner, parameters, flags, attributes)
        curved = Curvature(runs, train, loss_fn, outputs_fn, loss_of_outputs)
        b = query_gradients(runs, asked, query_loss or loss_fn)
        known = identity(inner)
        losses = [name_of_loss(f) for f in (loss_fn, query_loss, outputs_fn, loss_of_outputs) if f is not None]
        about = {
            "model": known, "curvature": curvature, "damping": number, "absolute": absolute,
            "parameters": sorted(parameters), "losses": losses, "queries": asked.digest,
        }  # fmt: skip
        begun = None if start is None else _spread(start, b, known)
        about["start"] = "" if begun is None else checksum(b"".join(map(tensor_bytes, begun.values())))
        helper = None if precondition is None else Preconditioner(*_pair(precondition), inner, parameters)
        about["precondition"] = "" if helper is None else helper.digest()
        file = None if out is None else StateFile(Path(out), about)
        held = None if file is None else file.read()
        if held is not None:
            train.check(held.batches)
        scales = (held.damping, held.scale) if held else _scales(curved, runs, loss_fn, number, absolute, helper)
        with Progress(steps, train.count, shown=progress) as bar:
            system = System(curved, helper, *scales, bar)
            state = Conjugate.from_tensors(b, held.tensors) if held else system.begin(b, begun)
            _check_taken(state, steps, tolerance, out)
            system.solve(state, steps, tolerance, lambda: _check_still(inner, known), file)
    return Refined(Direction.dense(state.x, inner), torch.stack(state.residuals), scales[0])


def query_gradients(runs: Runs, queries: Again, loss_fn: LossFn) -> Tensors:
    """Return the whole gradient of each query's loss, name -> [Q, *shape] in at least float32, one backward a query."""
    found: dict[str, list[Tensor]] = {name: [] for name in runs.parameters}
    for batch in queries:
        with runs.on(batch) as start:
            losses = runs.outputs(loss_fn, batch, start)
            check_losses(losses, batch, None)
            for g in runs.pulled(losses, list(torch.eye(len(losses), dtype=losses.dtype, device=losses.device))):
                for name, x in g.items():
                    found[name].append(x.to(torch.promote_types(x.dtype, torch.float32)))
    return {name: torch.stack(parts) for name, parts in found.items()}


def _scales(
    curved: Curvature, runs: Runs, loss_fn: LossFn, damping: float, absolute: bool, helper: Preconditioner | None
) -> tuple[float, float]:
    """Return lambda, and how large the curvature is relative to the empirical Fisher matrix."""
    is_scaled = helper is not None and curved.kind == "gauss-newton"
    mean = 0.0 if absolute and not is_scaled else curved.mean_diagonal()
    scale = mean / Curvature(runs, curved.batches, loss_fn).mean_diagonal() if is_scaled else 1.0
    return (damping if absolute else damping * mean), scale


def _parameters(model: nn.Module, layers: LayerFilter) -> dict[str, nn.Parameter]:
    """Return the parameters to refine on, by name. Raise ValueError where there are none, or they are shards."""
    if any(sharded.is_sharded(p) for p in model.parameters()):
        raise ValueError("model: its parameters are shards (FSDP2); refine takes whole ones: load it on one device")
    targets, skipped = find_targets(model, layers)
    if not targets:
        raise ValueError(f"model: nothing to refine; {skipped or no_parameters(model)}")
    return {target.parameter: target.tensor for target in targets.values()}


def _spread(start: Direction, b: Tensors, model: str) -> Tensors:
    """Return directions on whole parameters, name -> [Q, *shape]. Raise an error where they are of other work."""
    if not isinstance(start, Direction):
        raise TypeError(
            f"start must be a Direction, such as dropinf.direction(query, fisher, compressor), got {start!r}"
        )
    check_one_model([start, _Known(Origin(model, ""))], ["start", "model"], "Make the direction with this model")
    count = len(next(iter(b.values())))
    if len(start) != count:
        raise ValueError(f"start: it is of {len(start)} queries, and queries has {count}; make it of the same queries")
    unknown = [name for name in start.parameters if name not in b]
    if unknown:
        raise ValueError(f"start: its parameter {unknown[0]!r} is not refined; name it in layers=")
    found = {name: torch.zeros_like(x) for name, x in b.items()}
    for name in start.parameters:
        for q in range(count):
            found[name][q] = start.tensor(name, q)
    return found


class _Known(NamedTuple):
    origin: Origin


def _check_still(model: nn.Module, before: str) -> None:
    """Raise ValueError where the model is not the one that it was before."""
    parts = [_Known(Origin(one, "")) for one in (before, identity(model))]
    check_one_model(parts, ["the model at the beginning", "after a step"], _MOVED)


def _pair(precondition: object) -> tuple[Fisher, Compressor]:
    """Return a Fisher matrix and its Compressor. Raise TypeError where it is no such pair."""
    if isinstance(precondition, tuple) and len(precondition) == 2:
        fisher, compressor = precondition
        if isinstance(fisher, Fisher) and isinstance(compressor, Compressor):
            return fisher, compressor
    raise TypeError(f"precondition must be a pair (Fisher, Compressor), got {precondition!r}")


def _check_numbers(damping: float, steps: int, tolerance: float | None) -> float:
    """Return the damping as a number. Raise ValueError where a number is none, or out of its range."""
    if isinstance(damping, str) or damping_number(damping) <= 0:
        raise ValueError(f"damping is {damping!r}; it must be a finite number above 0, for instance 10")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"steps is {steps!r}; it must be a whole number of at least 0, for instance 4")
    if tolerance is not None and (isinstance(tolerance, bool) or not 0 < tolerance < 1):
        raise ValueError(f"tolerance is {tolerance!r}; it must lie between 0 and 1, for instance 1e-3, or be None")
    return float(damping)


def _check_functions(curvature: str, outputs_fn: object, loss_of_outputs: object, query_loss: object) -> None:
    """Raise an error where the functions are not those of the kind of curvature."""
    if curvature not in get_args(CurvatureKind):
        raise ValueError(f"curvature is {curvature!r}; it must be one of {', '.join(get_args(CurvatureKind))}")
    if query_loss is not None:
        check_loss(query_loss)
    for name, given in (("outputs_fn", outputs_fn), ("loss_of_outputs", loss_of_outputs)):
        if curvature == "fisher" and given is not None:
            raise ValueError(f'{name} is of curvature="gauss-newton", and curvature is "fisher"; leave it out')
        if curvature == "gauss-newton" and not callable(given):
            raise TypeError(
                f"{name} must be a function with curvature='gauss-newton', got {given!r}: outputs_fn(model, batch) -> "
                "outputs, and loss_of_outputs(outputs, batch) -> losses [N]"
            )


def _check_taken(state: Conjugate, steps: int, tolerance: float | None, out: object) -> None:
    """Raise ValueError where a file has taken more steps than are asked for."""
    if tolerance is None and state.steps > steps:
        raise ValueError(
            f"steps is {steps}, and {out} has taken {state.steps}; ask for as many or more, or name another file"
        )
