"""How well scores predict what retraining does: the field's measures, each with an interval.

Scores follow the library's sign: positive means that training on n lowers q's loss. Whatever retrains a model is the
caller's function; nothing here trains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_RESAMPLES = 1000
_SPAN = 1 << 22  # elements of the largest temporary


@dataclass(frozen=True)
class Estimate:
    """A mean over queries, with the 95 % interval [``low``, ``high``] of a percentile bootstrap."""

    value: float
    low: float
    high: float
    per_query: Tensor

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ranks(x: Tensor) -> Tensor:
    """Return the ranks from 1 along the last axis, float64; equal values share their mean rank."""
    x = x.contiguous()
    ordered = x.sort(-1).values
    below, upto = (torch.searchsorted(ordered, x, right=right) for right in (False, True))
    return (below + upto + 1).double() / 2


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Return the correlation along the last axis, float64; 0 where one of the two is constant."""
    x, y = (v.double() - v.double().mean(-1, keepdim=True) for v in (x, y))
    norm = x.norm(dim=-1) * y.norm(dim=-1)
    return torch.where(norm > 0, (x * y).sum(-1) / norm.clamp_min(torch.finfo(torch.float64).tiny), 0.0)


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Return the rank correlation along the last axis, float64; ties as in scipy.stats.spearmanr.

    Source: Spearman (1904).
    """
    return pearson(ranks(x), ranks(y))


def sample_subsets(n: int, count: int, *, fraction: float = 0.5, seed: int = 0) -> Tensor:
    """Draw subsets of equal size for :func:`lds`: bool [count, n], the same for equal arguments on every machine."""
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction}: it is the share of samples in a subset")
    order = torch.rand(count, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).argsort(1)
    subsets = torch.zeros(count, n, dtype=torch.bool)
    return subsets.scatter_(1, order[:, : max(1, round(fraction * n))], True)


def lds(scores: Tensor, subsets: Tensor, losses: Tensor, *, seed: int = 0) -> Estimate:
    """Return the linear datamodeling score: how well the summed scores of subsets rank what retraining on them gives.

    It is the rank correlation over subsets, for each query.
    scores [Q, N]; subsets bool [M, N]; losses [M, Q], query q's loss under a model trained on subset m (the mean over
    seeds, where there are several). The interval resamples subsets and queries.
    Source: Park et al., "TRAK", arXiv 2303.14186, section 2 (with the model's output -loss).
    """
    predicted, actual = datamodel(scores, subsets, losses)
    per_query = spearman(predicted, actual)
    generator = torch.Generator().manual_seed(seed)
    models = torch.randint(len(subsets), (_RESAMPLES, 1, len(subsets)), generator=generator)
    queries = torch.randint(len(scores), (_RESAMPLES, len(scores), 1), generator=generator)
    step = max(1, _SPAN // predicted.numel())
    parts = [
        spearman(predicted[q, m], actual[q, m]).mean(1)
        for q, m in zip(queries.split(step), models.split(step), strict=True)
    ]
    return _estimate(per_query, torch.cat(parts))


def datamodel(scores: Tensor, subsets: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed scores and negative losses that :func:`lds` correlates, float64 [Q, M]; arguments as there."""
    _check("subsets", subsets, scores.shape[1], "the scores' N")
    if losses.shape != (len(subsets), len(scores)):
        raise ValueError(
            f"losses has shape {list(losses.shape)}; it must be [M, Q] = [{len(subsets)}, {len(scores)}]: one row per "
            "subset, one column per query"
        )
    predicted = scores.double() @ subsets.to(scores.device).double().T  # [Q, M]
    actual = -losses.double().T.to(predicted.device)
    if not bool(predicted.isfinite().all() and actual.isfinite().all()):
        raise ValueError("scores or losses are not finite; a retrained model may have diverged")
    return predicted, actual


def agreement(scores: Tensor, reference: Tensor, *, seed: int = 0) -> Estimate:
    """Return the rank correlation, for each query, of two methods' scores [Q, N]: it is free of training noise."""
    if scores.shape != reference.shape:
        raise ValueError(
            f"scores has shape {list(scores.shape)} and reference {list(reference.shape)}; they must agree"
        )
    return _over_queries(spearman(scores, reference.to(scores.device)), seed)


def leave_one_out(scores: Tensor, changes: Tensor, *, seed: int = 0) -> Estimate:
    """Return the correlation of scores [Q, N] with leave-one-out retraining.

    ``changes[q, n]``: query q's loss after training without n, minus that with it.

    Source: Koh & Liang, "Understanding black-box predictions via influence functions", arXiv 1703.04730, section 4.
    """
    if scores.shape != changes.shape:
        raise ValueError(f"changes has shape {list(changes.shape)}; it must be the scores', {list(scores.shape)}")
    return _over_queries(pearson(scores, changes.to(scores.device)), seed)


def mislabel_auc(self_influence: Tensor, flipped: Tensor) -> float:
    """Return the area under the ROC curve of finding wrong labels, ``flipped`` bool [N], by self-influence [N].

    It is the chance that a flipped sample lies above a clean one, ties counting one half.
    Source: Hanley & McNeil (1982); the task is Koh & Liang's (arXiv 1703.04730, section 5.4).
    """
    _check("flipped", flipped[None], len(self_influence), "the number of samples")
    positive = int(flipped.sum())
    negative = len(flipped) - positive
    if not positive or not negative:
        raise ValueError(f"flipped marks {positive} of {len(flipped)} samples; it must mark some and not all")
    above = ranks(self_influence)[flipped.to(self_influence.device)].sum().item() - positive * (positive + 1) / 2
    return above / (positive * negative)


def brittleness(
    scores: Tensor, retrain: Callable[[Tensor], Tensor], counts: Sequence[int], *, seed: int = 0
) -> dict[int, Estimate]:
    """Return, by count, the fraction of queries misclassified after retraining without their ``count`` top samples.

    ``retrain(kept bool [N]) -> bool [Q]``: which queries a model trained on those samples classifies rightly. It is
    called Q times per count. Source: Ilyas et al., "Datamodels", arXiv 2202.00622, section 4.2.
    """
    found = {}
    for count in counts:
        wrong = []
        for q, row in enumerate(scores):
            kept = torch.ones(len(row), dtype=torch.bool)
            kept[row.topk(count).indices.cpu()] = False
            wrong.append(not bool(retrain(kept)[q]))
        found[count] = _over_queries(torch.tensor(wrong).double(), seed)
    return found


def tail_patch(
    scores: Tensor, before: Tensor, step: Callable[[Tensor], Tensor], count: int, *, seed: int = 0
) -> Estimate:
    """Return how much training on a query's ``count`` top samples lowers its loss, from the finished model.

    ``before`` [Q]: losses of the finished model. ``step(indices int64 [count]) -> [Q]``: losses after a training step
    on those samples from the finished model, which the function restores. Positive is good.
    Source: Chang et al., "Scalable Influence and Fact Tracing for LLM Pretraining", arXiv 2410.17413, section 4.
    """
    gains = [before[q] - step(row.topk(count).indices)[q] for q, row in enumerate(scores)]
    return _over_queries(torch.stack(gains).double(), seed)


def _check(name: str, mask: Tensor, n: int, what: str) -> None:
    if mask.dtype != torch.bool or mask.shape[1:] != (n,):
        raise ValueError(
            f"{name} is {mask.dtype} {list(mask.shape)}; it must be bool, with {what}, {n}, as last length"
        )


def _over_queries(per_query: Tensor, seed: int) -> Estimate:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(per_query), (_RESAMPLES, len(per_query)), generator=generator)
    return _estimate(per_query, per_query.cpu()[chosen].mean(1))


def _estimate(per_query: Tensor, means: Tensor) -> Estimate:
    low, high = torch.quantile(means.cpu().double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(per_query.mean()), low, high, per_query)
