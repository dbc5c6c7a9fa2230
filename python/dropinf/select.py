"""Choosing training data by scores: the samples to keep, with reasons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .gradients import GradientSource, StepScores
from .recording import Run

_NAMED = 3  # queries that a reason names


class Selection(NamedTuple):
    """Samples, best first: their ids, their scores [k], and why each was taken."""

    ids: list[str]
    scores: Tensor
    reasons: list[str]


def select(
    scores: Tensor | StepScores | Run,
    *,
    target: GradientSource | None = None,
    keep: float | None = None,
    budget: int | None = None,
    ids: Sequence[object] | None = None,
    diversity: float = 0.0,
    gradients: GradientSource | None = None,
) -> Selection:
    """Return the samples that lower the target's loss most.

    Args:
        scores: of samples for queries [Q, N], whose mean counts, or [N]; those of a run's steps, which are summed by
            sample; or a recorded run, scored for ``target`` by "adamw", or "tracin" where it has rows alone.
        target: gradients of the queries that a run is scored for, as of a validation set.
        keep: the part of the samples to take, above 0 and at most 1. Or ``budget``: how many.
        ids: of the N samples; None: their positions. The scores of a run have their own: with it and ``gradients``,
            the id of each sample of the gradients.
        diversity: from 0 to 1, how much of a sample's rank goes by how unlike it is to those taken before (maximal
            marginal relevance: Carbonell and Goldstein 1998). It needs ``gradients`` of the N samples, held in memory.

    Raises:
        ValueError: both or neither of keep and budget, numbers out of range, scores that are not finite, a run without
            a target, diversity without gradients.
    """
    values, names = _values(scores, target, ids, gradients)
    count = _count(len(names), keep, budget)
    mean = values.mean(0)
    if not bool(mean.isfinite().all()):
        raise ValueError("scores: some are not finite")
    if not 0 <= diversity <= 1:
        raise ValueError(f"diversity is {diversity}; it must lie between 0 and 1")
    near: list[float] | None = None
    if diversity:
        if gradients is None or len(gradients) != len(names):
            raise ValueError(f"gradients: diversity needs those of the {len(names)} samples")
        rows = torch.cat([part.flat.float() for _, part in gradients.blocks(4096)])
        if isinstance(scores, Run | StepScores):
            assert ids is not None
            at = {str(name): i for i, name in enumerate(ids)}
            rows = rows[[at[name] for name in names]]
        chosen, near = _unlike(mean, rows, count, diversity)
    else:
        chosen = mean.argsort(descending=True, stable=True)[:count]
    places = mean.argsort(descending=True, stable=True).argsort()
    reasons = [_reason(values[:, i], int(places[i]), len(names)) for i in chosen.tolist()]
    if near is not None:
        reasons = [
            f"{why}; cosine {cos:.2f} to the nearest taken before" for why, cos in zip(reasons, near, strict=True)
        ]
    return Selection([names[i] for i in chosen.tolist()], mean[chosen], reasons)


def _values(
    scores: Tensor | StepScores | Run,
    target: GradientSource | None,
    ids: Sequence[object] | None,
    gradients: GradientSource | None,
) -> tuple[Tensor, list[str]]:
    """Return scores [Q, N] and the samples' names."""
    if isinstance(scores, Run):
        if target is None:
            raise ValueError("target: a recorded run is scored for queries; pass their gradients")
        scores = scores.score(target, "adamw" if scores.kind is not None else "tracin")
    if isinstance(scores, StepScores):
        values, names = scores.by_id()
        values = values if values.ndim == 2 else values[None]
        if (ids is None) != (gradients is None):
            raise ValueError(
                "ids: the scores of a run have their own, in the order in which samples were trained on; pass ids with "
                "gradients alone, the id of each of their samples"
            )
        if ids is not None and {str(name) for name in ids} != set(names):
            raise ValueError("ids: those of the gradients' samples are not those of the run's")
        return values, names
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores is {type(scores).__name__}; it must be a tensor, a run, or the scores of one")
    values = scores if scores.ndim == 2 else scores[None]
    if values.ndim != 2 or not values.numel():
        raise ValueError(f"scores has shape {list(scores.shape)}; it must be [Q, N] or [N], of at least one sample")
    names = [str(i) for i in (range(values.shape[1]) if ids is None else ids)]
    if len(names) != values.shape[1]:
        raise ValueError(f"ids has {len(names)} names; it must have one for each of the {values.shape[1]} samples")
    return values, names


def _count(n: int, keep: float | None, budget: int | None) -> int:
    if (keep is None) == (budget is None):
        raise ValueError("keep, budget: pass one of them, the part of the samples to take or their number")
    if keep is not None:
        if not 0 < keep <= 1:
            raise ValueError(f"keep is {keep}; it must be a part of the samples, above 0 and at most 1")
        return max(1, round(keep * n))
    assert budget is not None
    if not 1 <= budget <= n:
        raise ValueError(f"budget is {budget}; it must be from 1 to the number of samples, {n}")
    return budget


def _unlike(mean: Tensor, rows: Tensor, count: int, diversity: float) -> tuple[Tensor, list[float]]:
    """Return the samples that are taken one by one, and the cosine of each to the nearest taken before."""
    rows = torch.nn.functional.normalize(rows, dim=1)
    worth = mean.argsort().argsort().to(rows) / max(1, len(mean) - 1)  # ranks: scores have no scale that cosines share
    nearest = torch.zeros_like(worth)
    left = torch.ones(len(mean), dtype=torch.bool)
    chosen, near = [], []
    for _ in range(count):
        value = torch.where(left, (1 - diversity) * worth - diversity * nearest, -torch.inf)
        best = int(value.argmax())
        chosen.append(best)
        near.append(float(nearest[best]))
        left[best] = False
        nearest = torch.maximum(nearest, rows @ rows[best])
    return torch.tensor(chosen), near


def _reason(values: Tensor, place: int, n: int) -> str:
    """Return why a sample is taken: its rank, its score, and the queries that it helps most."""
    best = values.argsort(descending=True)[:_NAMED].tolist()
    named = f", most of queries {', '.join(map(str, best))}" if len(values) > 1 else ""
    return f"rank {place + 1} of {n}, score {float(values.mean()):+.3g}{named}"
