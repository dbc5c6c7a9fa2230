"""Scores of a recorded run: how much each sample of each step lowered the loss of each query."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..gradients import GradientSource, RunKind, StepScores, check_same_sketch
from ..origin import Origin, check_one_model
from .adjoint import Curvature, Past, effects
from .optimizers import Columns, Kind
from .steps import Step

_CAP = 100.0  # of 1 / (e^loss - 1), where a loss is nearly zero
_DRAWS = 25  # steps whose drawn rows are averaged: few alone are noise that repeats


class TracedRun(Protocol):
    """What scores are made of: a run, step by step."""

    path: Path

    def __len__(self) -> int: ...
    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def digest(self) -> Mapping[str, str]: ...
    @property
    def kind(self) -> Kind | None: ...
    @property
    def rows_alone(self) -> str: ...
    @property
    def origin(self) -> Origin | None: ...
    @property
    def columns(self) -> Columns: ...
    @property
    def scale(self) -> Tensor: ...
    def step(self, i: int) -> Step: ...
    def drawn_steps(self) -> list[int]: ...
    def backwards(self) -> Iterator[tuple[int, Step, Past]]: ...


def score_run(
    query: GradientSource,
    run: TracedRun,
    kind: RunKind = "adamw",
    *,
    curvature: bool = True,
    gamma: float = 1.0,
    window: int = 0,
    reduce: str | None = None,
    other_model: bool = False,
) -> StepScores:
    """Score each sample's part of each step of a recorded run for every query.

    Positive: its part of the step lowered the query's loss at the end. The number estimates by how much.

    Args:
        query: gradients of Q samples at the weights that the run led to, with its masks (`Run.masks`).
        run: what `record` recorded.
        kind: "adamw" carries the queries' gradients back through every update of the optimizer (AdamW, Adam or SGD;
            momentum, second moments, weight decay, schedule, clipping), bent by the curvature of each step's rows.
            "tracin" is the dot product of rows and queries, times the step's learning rate (Pruthi et al. 2020, arXiv
            2002.08484).
        curvature: False takes each step's gradient not to depend on the weights. It is then Adam's algebra alone, which
            says little: a sample's effect on the loss at the end is mostly what later steps make of it. Adam's
            derivative is then taken as it is where the samples of a first step cancel; else it is cut down to what an
            update can change by.
        gamma: times the curvature.
        window: of the steps before and behind each, whose rows' curvature is averaged with its own.
        reduce: "mean": one score of each sample's part of each step over all queries, [rows], at the cost of one query.
        other_model: let the queries be of other weights than those that the run ended with.

    Raises:
        ValueError: another kind; "adamw" of a run with rows alone; gradients of another sketch or model; a run that was
            not ended.
    """
    if kind not in ("adamw", "tracin"):
        raise ValueError(f"kind must be 'adamw' or 'tracin' for a recorded run, got {kind!r}")
    if kind == "adamw" and run.kind is None:
        raise ValueError(
            f"kind: 'adamw' follows the optimizer on a mask, and this run has rows alone: {run.rows_alone}"
        )
    if isinstance(window, bool) or not isinstance(window, int) or window < 0:
        raise ValueError(f"window is {window}; it must be a number of steps, 0 or more")
    check_same_sketch(query, run, "query and run")
    if not other_model:
        _check_end(query, run)
    if kind == "tracin" and not (curvature and gamma == 1 and window == 0):
        raise ValueError("curvature, gamma and window are of kind='adamw'; 'tracin' has no curvature")
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"gamma is {gamma}; it must be a finite number, 0 or more")
    if not len(run):
        raise ValueError(f"run: {run.path} holds no step")
    if reduce not in (None, "mean"):
        raise ValueError(f"reduce must be 'mean' for a recorded run, whose scores add up over steps, got {reduce!r}")
    wanted = torch.cat([part.flat.double().cpu() for _, part in query.blocks(4096)])
    if reduce is not None:
        wanted = wanted.mean(0, keepdim=True)  # scores are linear in it
    side = _Side(len(wanted), torch.float64 if query.dtype == torch.float64 else torch.float32)
    found = []
    for i, ids, values in _tracin(wanted, run) if kind == "tracin" else _adamw(wanted, run, curvature, gamma, window):
        side.put(values)
        found.append((i, ids))
    parts = side.parts()
    if kind == "adamw":  # the last step came first
        found.reverse()
        parts.reverse()
    joined = torch.cat(parts, 1)
    steps = torch.tensor([i for i, ids in found for _ in ids], dtype=torch.int64)
    return StepScores(joined if reduce is None else joined[0], [name for _, ids in found for name in ids], steps)


class _Side:
    """Columns [Q, n] side by side in one tensor, as they come: kept apart, they would lie between all that is freed."""

    def __init__(self, rows: int, dtype: torch.dtype) -> None:
        self._room, self._widths = torch.empty(rows, 1024, dtype=dtype), list[int]()
        self._used = 0

    def put(self, values: Tensor) -> None:
        """Take columns behind the others."""
        end = self._used + values.shape[1]
        while end > self._room.shape[1]:
            self._room = torch.cat([self._room, torch.empty_like(self._room)], 1)
        self._room[:, self._used : end] = values
        self._used = end
        self._widths.append(values.shape[1])

    def parts(self) -> list[Tensor]:
        """Return the columns of each call."""
        return list(self._room[:, : self._used].split(self._widths, 1))


def _check_end(query: GradientSource, run: TracedRun) -> None:
    if run.origin is None:
        raise ValueError(
            f"run: {run.path} was not ended, so nothing says which weights it led to; go on recording from a "
            "checkpoint, or pass other_model=True"
        )
    way_out = "Take the queries' gradients once the run is over, or pass other_model=True."
    check_one_model([query, run], ["query", "run"], way_out)


def _tracin(query: Tensor, run: TracedRun) -> Iterator[tuple[int, list[str], Tensor]]:
    """Yield (step, ids, scores [Q, n]) of TracIn: each step is a checkpoint; the queries' gradients are of the end."""
    for i in range(len(run)):
        step = run.step(i)
        rate = torch.as_tensor(run.columns.spread([step.groups[g]["lr"] for g in run.columns.groups]))
        yield i, list(step.ids), (query * run.scale * rate) @ step.rows.double().T


def _adamw(
    query: Tensor, run: TracedRun, curvature: bool, gamma: float, window: int
) -> Iterator[tuple[int, list[str], Tensor]]:
    """Yield (step, ids, scores [Q, n]), the last step first, of the optimizer's adjoint with the curvature of rows."""
    ids: dict[int, list[str]] = {}
    near = _Near(run, window)

    def past() -> Iterator[tuple[int, Past]]:
        for i, step, found in run.backwards():
            ids[i] = list(step.ids)
            near.put(i, step)
            yield i, found

    for i, values in effects(query, past(), run.scale, (lambda i: near.curvature(i, gamma)) if curvature else None):
        yield i, ids.pop(i), values


class _Near:
    """The curvature of steps, last first, from rows of steps that are near; each is read once.

    Of labels drawn from the model, those of the nearest ``_DRAWS`` steps that have some; else the step's own rows and
    those of the ``window`` steps before and behind it.
    """

    def __init__(self, run: TracedRun, window: int) -> None:
        self._run, self._window, self._drawn = run, window, run.drawn_steps()
        self._found: dict[int, Curvature] = {}

    def put(self, i: int, step: Step) -> None:
        """Take a step that was read."""
        if i not in self._found and (not self._drawn or step.drawn is not None):
            self._found[i] = curvature_of(step)

    def curvature(self, i: int, gamma: float) -> Curvature:
        """Return the curvature of a step's loss, times ``gamma``; forget what no step before it takes."""
        if self._drawn:
            places = sorted(self._drawn, key=lambda j: abs(j - i))[:_DRAWS]
        else:
            places = list(range(max(0, i - self._window), min(len(self._run), i + self._window + 1)))
        for j in places:
            if j not in self._found:
                self.put(j, self._run.step(j))
        parts = [self._found[j] for j in places]
        for j in [j for j in self._found if j > max(places) or (j == max(places) and not self._drawn)]:
            del self._found[j]
        weight = torch.cat([part.weight for part in parts]) * (gamma / len(parts))
        return Curvature(torch.cat([part.rows for part in parts]), weight)


def curvature_of(step: Step) -> Curvature:
    """Return the Fisher matrix of a step's rows: of labels drawn from the model where there are some.

    A sample's own label makes the model's Fisher matrix of one label where its weight is 1 / (e^loss - 1).
    """
    if step.drawn is not None and step.drawn_share is not None:
        return Curvature(step.drawn.double(), _inverse(step.drawn_share))
    assert step.share is not None
    each = _inverse(step.share)
    if step.losses is not None:
        each = each * (1 / torch.expm1(step.losses.double())).clamp(max=_CAP)
    return Curvature(step.rows.double(), each)


def _inverse(share: Tensor) -> Tensor:
    """Return one over the weight of each sample's loss; 0 where it has none."""
    wide = share.double()
    return torch.where(wide > 0, 1 / wide.clamp(min=torch.finfo(torch.float64).tiny), 0)
