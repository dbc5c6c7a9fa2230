"""Exact influence of samples, and of their tokens: products of whole gradients with directions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..capture.checks import check_losses
from ..capture.sweep import progress_bar
from ..workload import LossFn, tensors
from .direction import Direction
from .exact import Way, exact


def rerank(
    model: nn.Module, batches: Iterable[Any], direction: Direction, loss_fn: LossFn, *, way: Way = "auto"
) -> Tensor:
    """Return ``<grad l_n, v_q>`` [Q, N] of every sample of the batches and every direction, with whole gradients.

    One forward-mode product a batch and query (Pearlmutter 1994), and for each batch one ordinary forward and
    backward with which the products are compared; of the first batch and of 4, 16, 64, ... three products more tell
    how large each gradient is, so that none hides behind larger ones. No gradient of a single sample is formed. With a
    direction of :func:`direction` these are the scores of :func:`score` that no rounding of stored rows has touched;
    with one of :meth:`Direction.dense` they are what no compressed score is. A loss that depends on other samples of
    its batch is taken as it stands there. To search first and look again at what was found::

        best = dropinf.score(query, index, fisher, top=1000)  # TopK(values, indices [Q, 1000])
        rows = best.indices.unique()  # positions in the training set
        batches = [collate(part) for part in rows.split(32)]
        exact = dropinf.rerank(model, batches, direction, loss_fn)  # [Q, len(rows)]; columns as in rows

    Args:
        model: with the weights that the direction belongs to. It is left exactly as it was.
        batches: of any structure that `loss_fn` takes, on the device that it takes them from.
        direction: Q directions in the weight space of the model.
        loss_fn: ``loss_fn(model, batch) -> Tensor [N]``, one loss per sample, as for a `Compressor`.
        way: "forward"; "backward", which differentiates a backward (as many numbers, from a graph of both passes);
            or "auto": forward, and from the first batch on that it is not right for, backward.

    Returns:
        `[Q, N]` in the host's memory, in the order of the batches; fp32, or fp64 where losses or directions are.

    Raises:
        TypeError, ValueError: an argument of another kind; losses that are not [N] or not finite; another model, or
            other weights than the direction's; shards; a BatchNorm in train mode; products that are not finite.
        AttributionError: no way agrees with plain autograd, or the model has an op that neither way can differentiate.
    """
    with exact(model, direction, loss_fn, way, "rerank") as products, progress_bar(batches, False) as given:
        columns = [products(batch, _check_samples) for batch in given]
    if not columns:
        raise ValueError("batches: it is empty (or an iterator that is used up); pass at least one batch")
    return torch.cat(columns, 1)


def tokens(model: nn.Module, direction: Direction, batch: Any, loss_fn: LossFn, *, way: Way = "auto") -> Tensor:
    """Return ``<grad l_nt, v_q>`` [Q, N, T] of every token's own loss: what each token of a sample adds to its score.

    As :func:`rerank`, of one batch whose losses are kept apart; products are linear in the loss, so the tokens of a
    sample sum to its score where their losses sum to its loss. A token here is a term of the loss (the prediction of
    one token, given those before), and not an input.

    Args:
        model, direction, way: as in :func:`rerank`.
        batch: one batch.
        loss_fn: ``loss_fn(model, batch) -> Tensor [N, T]``, or of any more dimensions; not summed over tokens, and 0
            where there is none.

    Returns:
        `[Q, *shape of the losses]` in the host's memory; fp32, or fp64 where losses or directions are.

    Raises:
        TypeError, ValueError, AttributionError: as :func:`rerank`; losses that have one dimension.
    """
    with exact(model, direction, loss_fn, way, "tokens") as products:
        return products(batch, _check_tokens)


def _check_samples(losses: Any, batch: Any) -> None:
    count = len(losses) if isinstance(losses, Tensor) and losses.ndim else 0
    edges = (t for t in tensors(batch) if t.ndim == 1 and not t.is_floating_point() and len(t) == count + 1)
    check_losses(losses, batch, None, count if any(bool((t.diff() > 0).all()) for t in edges) else None)  # documents


def _check_tokens(losses: Any, batch: Any) -> None:  # noqa: ARG001
    if not isinstance(losses, Tensor) or losses.ndim < 2 or not losses.is_floating_point() or not losses.numel():
        what = f"{losses.dtype} {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"loss_fn must return floating-point losses of tokens, [N, T], it returned {what}; do not sum them "
            "(reduction='none'), or use dropinf.rerank for samples"
        )
