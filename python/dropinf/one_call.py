"""A compressor for one call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .capture.targets import LayerFilter
from .compressor import Compressor
from .gradients import Gradients
from .sketch.sketch import Sketch
from .workload import LossFn, check_batches


def compress(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    sketch: Sketch,
    *,
    layers: LayerFilter = None,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Gradients:
    """Calibrate on ``batches`` where the sketch needs it, then compress them: :class:`Compressor` in one call.

    Masks without statistics agree between calls with the same seed.
    """
    compressor = Compressor(model, sketch, loss_fn, layers=layers)
    check_batches(batches)
    if compressor.needs_calibration:
        if iter(batches) is batches:
            raise ValueError(f"batches: {sketch!r} reads them twice; pass a list or a DataLoader, not an iterator")
        compressor.calibrate(batches)
    return compressor.compress(batches, device=device or "cpu", progress=progress)
