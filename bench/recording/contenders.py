"""What recorded runs are compared with: influence at the last checkpoint, TracIn and LESS over checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import dropinf
from bench.fidelity.tasks import Task, classification

from .loop import Training

DAMPINGS = (1e-3, 1e-2, 0.1, 1.0, 10.0)
FITS = 4000  # parameters of which a Gauss-Newton matrix is made whole
Found = Iterator[tuple[str, int, Tensor]]  # method, numbers a sample, scores [Q, N]


def rows(
    found: Task, model: nn.Module, sketch: dropinf.Sketch, **options: Any
) -> tuple[dropinf.Gradients, dropinf.Gradients]:
    """Compressed gradients of the training samples and of the queries at some weights."""
    compressor = dropinf.Compressor(model, sketch, found.loss_fn, **options)
    plain = dropinf.Compressor(model, sketch, found.loss_fn)
    return compressor.compress(found.batches("train")), plain.compress(found.batches("query"))


def last_checkpoint(training: Training, name: str, sketch: dropinf.Sketch, kinds: tuple[str, ...]) -> Found:
    """Influence at the last checkpoint, for each kind of Fisher matrix and damping, and dot products."""
    model, _, _ = training.run()
    train, query = rows(training.task, model, sketch)
    numbers = train.flat.shape[1]
    yield f"last checkpoint, dot, {name}", numbers, dropinf.score(query, train, kind="dot")
    for kind in kinds:
        fisher = dropinf.build_fisher(train, kind)  # type: ignore[arg-type]
        for damping in DAMPINGS:
            with contextlib.suppress(ValueError):  # singular with so little
                scores = dropinf.score(query, train, fisher.with_damping(damping))
                yield f"last checkpoint, {kind} {damping:g}, {name}", numbers, scores


def gauss_newton(training: Training) -> Found:
    """The same with the Gauss-Newton matrix of all training samples, whole."""
    model, _, _ = training.run()
    train, query = rows(training.task, model, dropinf.Identity())
    layers = dropinf.Compressor(model, dropinf.Identity(), training.task.loss_fn).layers
    matrix = _curvature(training.task, model, [layers[name].parameter for name in train.shapes])
    values, vectors = torch.linalg.eigh(matrix)
    mean = float(values.mean())
    left, right = (x.flat.double() @ vectors for x in (query, train))
    for damping in DAMPINGS:
        yield f"last checkpoint, Gauss-Newton {damping:g}", len(matrix), left / (values + damping * mean) @ right.T


def _curvature(found: Task, model: nn.Module, names: list[str]) -> Tensor:
    """The mean over training samples of J' (diag(p) - p p') J, of the logits' Jacobian J, by parameters' names."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def logits(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (x[None],))[0]

    total, n = torch.zeros((), dtype=torch.float64), 0
    for x, _ in found.batches("train"):
        jacobian = torch.func.vmap(torch.func.jacrev(logits), (None, 0))(parameters, x)
        j = torch.cat([jacobian[name].flatten(2) for name in names], 2).double()
        with torch.no_grad():
            p = model(x).softmax(-1).double()
        root = j - (p[:, None] @ j)  # J - 1 p'J, of which p weighs each class's row
        total = total + torch.einsum("nc,nci,ncj->ij", p, root, root)
        n += len(x)
    return total / n


def checkpoints(training: Training, name: str, sketch: dropinf.Sketch) -> Found:
    """TracIn and LESS over a checkpoint behind each epoch, weighted by its learning rate."""
    found = training.task
    steps = len(training.order) // found.epochs
    numbers, total = 0, {"TracIn": torch.zeros(()), "LESS": torch.zeros(())}
    for step in range(steps, len(training.order), steps):
        model, optimizer, _ = training.at(step)
        model.eval()
        rate = optimizer.param_groups[0]["lr"]
        train, query = rows(found, model, sketch)
        total["TracIn"] = total["TracIn"] + rate * dropinf.score(query, train, kind="dot")
        updates, _ = rows(found, model, sketch, preconditioner=optimizer)
        a, b = (nn.functional.normalize(x.flat.double()) for x in (query, updates))
        total["LESS"] = total["LESS"] + rate * (a @ b.T)
        numbers = train.flat.shape[1]
    for method, scores in total.items():
        yield f"{method} over {found.epochs - 1} checkpoints, {name}", numbers, scores


def contenders(training: Training) -> Found:
    """All of them, on the mask of 32 x 32 numbers a layer and on whole gradients."""
    wide = dropinf.Dropout(32)
    yield from last_checkpoint(training, "factorized", wide, ("block", "kronecker"))
    yield from checkpoints(training, "factorized", wide)
    yield from last_checkpoint(training, "whole gradients", dropinf.Identity(), ("kronecker",))  # EK-FAC
    fits = sum(p.numel() for p in training.model.parameters()) <= FITS
    if training.task.loss_fn is classification and fits:
        yield from gauss_newton(training)
