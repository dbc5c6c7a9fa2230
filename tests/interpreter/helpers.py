"""Shared by the interpreter tests: where they run, and how near a kernel must come to its float64 reference."""

from __future__ import annotations

import os

import torch
from torch import Tensor

ON_GPU = os.environ.get("DROPINF_GPU") == "1" and os.environ.get("TRITON_INTERPRET") != "1"
# The interpreter computes bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]


def on_cpu(*bounds: int) -> Tensor:
    """Return cu_seqlens that the host checks: on a GPU the stream does, where a wrong one ends the context."""
    return torch.tensor(bounds, device="cpu")


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
