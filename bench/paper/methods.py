"""What each method makes of a trained model: how much each training sample helps the queries, and its own loss."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import dropinf
from bench.fidelity.evaluate import METHODS, compressed, size
from bench.fidelity.mislabel import kept
from bench.fidelity.tasks import Task, classification
from bench.files import slug
from bench.recording.loop import Recorded

from .training import Trained, fit

OUT = Path("out/paper")
SKETCHES = {"dropout": "dropout", "choose": "chosen", "Gaussian": "gaussian", "PCA": "pca"}
TRACIN, ADAMW = "TracIn", "recorded adamw"
INFLUENCE = (*SKETCHES, TRACIN, ADAMW)
BASELINES = ("loss", "gradient norm", "random")
NAMES = (*INFLUENCE, *BASELINES)
CALIBRATION = 100  # training samples that `choose` and PCA read
CHECKPOINTS = 3
DRAWN_EVERY = 4  # steps, of a language model


@dataclass(frozen=True)
class Setup:
    """What the methods are asked for: at how many bytes a sample, one score of a sample or one for each query."""

    budget: int
    mean: bool = True
    own: bool = False  # each sample's influence on its own loss too


@dataclass(frozen=True)
class Scored:
    """Scores of N samples, and the CPU seconds that they took beside the training that makes the model."""

    values: Tensor  # [Q, N], or [1, N] for the mean of the queries; positive: lowers the loss
    seconds: float
    own: Tensor | None = None  # [N]
    relative: Tensor | None = None  # [Q, N], RelatIF


def scored(task: Task, seed: int, setup: Setup, folder: str) -> Callable[[str], Scored]:
    """Return what scores a task's samples by a method's name. The model is trained once; scores lie in out/paper."""
    base = functools.cache(lambda: fit(task, seed, checkpoints=CHECKPOINTS))

    def of(name: str) -> Scored:
        path = OUT / folder / f"{slug(name)}-{seed}.pt"
        return Scored(**kept(path, lambda: vars(_made(name, base(), setup))))

    return of


def _made(name: str, trained: Trained, setup: Setup) -> Scored:
    """Return a method's scores."""
    if name in SKETCHES:
        return sketched(SKETCHES[name], trained, setup)
    if name == TRACIN:
        return tracin(trained, setup)
    if name == ADAMW:
        return adamw(trained, setup)
    return baseline(name, trained)


def sketched(name: str, trained: Trained, setup: Setup) -> Scored:
    """Return influence by compressed gradients of the last weights: one Fisher matrix a layer, damping "auto"."""
    task, model = trained.task, trained.model
    dim = 0 if name == SKETCHES["choose"] else size(model, METHODS[name], setup.budget, task.loss_fn)
    began = time.process_time()
    found = compressed(task, model, name, dim, setup.budget, min(CALIBRATION, len(task.train[0])))
    fisher = dropinf.build_fisher(found.train, "block", "auto")
    values = dropinf.score(found.query, found.train, fisher)
    own = dropinf.self_influence(found.train, fisher) if setup.own else None
    seconds = time.process_time() - began
    relative = None if setup.mean else dropinf.score(found.query, found.train, fisher, kind="relative")
    return Scored(values.mean(0, keepdim=True) if setup.mean else values, seconds, own, relative)


def tracin(trained: Trained, setup: Setup) -> Scored:
    """Return dot products of dropout's gradients at checkpoints, weighted by their learning rates."""
    task, count = trained.task, len(trained.task.query[0])
    sketch = METHODS["dropout"].sketch(size(trained.model, METHODS["dropout"], setup.budget, task.loss_fn))
    train = task.batches("train")
    began = time.process_time()
    checkpoints = dropinf.Checkpoints(trained.model, trained.states, weights=trained.rates)
    every = checkpoints.score(sketch, task.loss_fn, task.batches("query") + (train if setup.own else []), train)
    seconds = time.process_time() - began
    values = every[:count].mean(0, keepdim=True) if setup.mean else every[:count]
    return Scored(values, seconds, every[count:].diagonal().clone() if setup.own else None)


def adamw(trained: Trained, setup: Setup) -> Scored:
    """Return the adjoint of AdamW along a training that is recorded; it must make the very same weights.

    Labels of classes have their losses noted and flat masks; language models, drawn labels and factorized masks.
    Seconds are those that the recorded training took longer, and of scoring.
    """
    task, classes = trained.task, trained.task.loss_fn is classification
    method = METHODS["dropout, flat" if classes else "dropout"]
    sketch = method.sketch(size(trained.model, method, setup.budget, task.loss_fn))
    with tempfile.TemporaryDirectory() as folder:
        beside = Recorded(sketch, Path(folder) / "run", classes, 0 if classes else DRAWN_EVERY)
        again = fit(task, trained.seed, recorded=beside)
        if not all(map(torch.equal, again.model.parameters(), trained.model.parameters())):
            raise RuntimeError("the recorded training made other weights")
        run = again.run
        assert run is not None
        began = time.process_time()
        compressor = dropinf.Compressor.from_masks(run.masks, again.model, task.loss_fn)
        query = compressor.compress(task.batches("query"))
        values = _by_sample(query, run, "mean" if setup.mean else None)
        values = values[None] if setup.mean else values
        own = None
        if setup.own:
            own = _by_sample(compressor.compress(task.batches("train")), run, None).diagonal().clone()
        scoring = time.process_time() - began
    return Scored(values, again.seconds - trained.seconds + scoring, own)


def _by_sample(query: dropinf.Gradients, run: dropinf.Recording, reduce: Literal["mean"] | None) -> Tensor:
    """Return a run's scores [Q, N], or [N], in the order of the samples, whose ids are their positions."""
    values, ids = dropinf.score(query, run, kind="adamw", reduce=reduce).by_id()
    return values[..., torch.tensor([int(name) for name in ids]).argsort()]


def baseline(name: str, trained: Trained) -> Scored:
    """Return scores [1, N] that know no query: low loss, small gradient, chance."""
    task, model = trained.task, trained.model
    began = time.process_time()
    if name == "loss":
        with torch.no_grad():
            values = -torch.cat([task.loss_fn(model, batch) for batch in task.batches("train")])
    elif name == "gradient norm":
        compressor = dropinf.Compressor(model, dropinf.Identity(), task.loss_fn)
        parts = [compressor.compress([batch]).flat for batch in task.batches("train", 25)]
        values = -torch.cat([part.square().sum(1) for part in parts])
    else:
        values = torch.rand(len(task.train[0]), generator=torch.Generator().manual_seed(1000 + trained.seed))
    return Scored(values[None], time.process_time() - began)


def each(score: Callable[[str], Scored], names: tuple[str, ...]) -> Iterator[tuple[str, Scored | None]]:
    """Yield (method, its scores); None where dropinf refuses, which is printed."""
    for name in names:
        yield name, _unless_refused(score, name)


def _unless_refused(score: Callable[[str], Scored], name: str) -> Scored | None:
    try:
        return score(name)
    except (dropinf.AttributionError, ValueError, RuntimeError) as error:
        print(f"{name}: refused: {error}", flush=True)
        return None
