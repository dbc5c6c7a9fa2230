"""Scores that are means over several checkpoints of a model, as TracIn and TRAK have them."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .compressor import Compressor
from .fisher.fisher import FisherKind, build_fisher
from .score import score
from .sketch.sketch import Sketch
from .workload import LossFn, check_model

State = Mapping[str, Any] | str | os.PathLike[str]


class Checkpoints:
    """A model at several instants of its training.

    Args:
        model: whose weights take each checkpoint's values in turn, and have their own again afterwards.
        states: state dictionaries, or files that `torch.save` wrote of them.
        weights: of each checkpoint's scores, such as its learning rate (TracIn: Pruthi et al. 2020, arXiv 2002.08484);
            None: their mean, as over TRAK's models (Park et al. 2023, arXiv 2303.14186).

    Raises:
        ValueError: no states, the model's own weights among them, another number of weights, or one not finite.
    """

    def __init__(self, model: nn.Module, states: Sequence[State], weights: Sequence[float] | None = None) -> None:
        check_model(model)
        if not states:
            raise ValueError("states: it is empty; pass at least one state dictionary")
        if weights is not None and len(weights) != len(states):
            raise ValueError(
                f"weights has {len(weights)} numbers; it must have one for each of the {len(states)} states"
            )
        if weights is not None and not all(math.isfinite(w) for w in weights):
            raise ValueError(f"weights: some are not finite: {list(weights)}")
        live = {p.data_ptr() for p in model.parameters()}
        for i, state in enumerate(states):
            if not isinstance(state, Mapping | str | os.PathLike):
                raise TypeError(
                    f"states[{i}] is {type(state).__name__}; it must be a state dictionary, or a file that torch.save "
                    "wrote of one"
                )
            if isinstance(state, Mapping) and any(
                isinstance(x, Tensor) and x.data_ptr() in live for x in state.values()
            ):
                raise ValueError(
                    f"states[{i}] holds the model's own weights, which the training went on to change; copy them when "
                    "you take them: copy.deepcopy(model.state_dict())"
                )
        self.model, self.states = model, list(states)
        self.weights = [1 / len(states)] * len(states) if weights is None else [float(w) for w in weights]

    def score(
        self,
        sketch: Sketch,
        loss_fn: LossFn,
        query: Iterable[Any],
        train: Iterable[Any],
        *,
        fisher: FisherKind | None = None,
        damping: float | str = "auto",
        **options: Any,
    ) -> Tensor:
        """Return the weighted sum of each checkpoint's scores [Q, N].

        ``query``, ``train``: batches, read anew for each checkpoint: lists or loaders, no iterators. ``fisher``: the
        kind of the Fisher matrix of each checkpoint; None: dot products. ``options``: as in `Compressor`.
        """
        for name, batches in (("query", query), ("train", train)):
            if iter(batches) is batches:
                raise ValueError(
                    f"{name}: it is an iterator, which is used up by the first checkpoint; pass a list or a loader"
                )
            if isinstance(getattr(batches, "sampler", None), torch.utils.data.RandomSampler):
                raise ValueError(f"{name}: it is a loader that shuffles, anew for each checkpoint; pass shuffle=False")
        total: Tensor | None = None
        for weight in self._each():
            compressor = Compressor(self.model, sketch, loss_fn, **options)
            if compressor.needs_calibration:
                compressor.calibrate(train)
            rows, asked = compressor.compress(train), compressor.compress(query)
            matrix = build_fisher(rows, fisher, damping) if fisher is not None else None  # type: ignore[arg-type]
            found = score(asked, rows, matrix, kind="dot" if fisher is None else "influence") * weight
            total = found if total is None else total + found
        assert total is not None
        return total

    def _each(self) -> Iterator[float]:
        """Yield each checkpoint's weight, with its state in the model."""
        with _kept(self.model):
            for state, weight in zip(self.states, self.weights, strict=True):
                held = state if isinstance(state, Mapping) else torch.load(state, map_location="cpu")
                self.model.load_state_dict(held)
                yield weight


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Put a model's weights and buffers back afterwards."""
    before = copy.deepcopy(model.state_dict())
    try:
        yield
    finally:
        model.load_state_dict(before)
