"""Shared by the interpreter tests: how near a kernel must come to its float64 reference."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close(
    got: Tensor,
    want: Tensor,
    eps: float = torch.finfo(torch.float32).eps,
    factor: float = 16,
    magnitude: Tensor | None = None,
) -> None:
    """Compare with a float64 result by maximum and by root mean square, both relative to the largest value.

    Where terms cancel, `magnitude` is the result for the absolute values of the inputs: what rounding is relative to.
    """
    assert got.shape == want.shape
    error = (got.double() - want.double()).abs()
    if not error.numel():
        return
    scale = (want if magnitude is None else magnitude).double().abs().max().item() or 1.0
    worst = error.max().item() / scale
    assert worst <= factor * eps, f"error {worst:.2e} at {(error == error.max()).nonzero()[0].tolist()}"
    assert (error.square().mean().sqrt() / scale).item() <= factor * eps / 2
