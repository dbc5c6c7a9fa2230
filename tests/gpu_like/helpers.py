"""Shared by the tests on a pretended GPU: models moved there, and how near they must come to float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import dropinf
from dropinf.capture.ladder import TAPPED
from dropinf.workload import map_tensors
from tests.api.models import N, build
from tests.api.oracle import oracle, sketched
from tests.gpu_like.pretend import CUDA, move


def cast(batch: Any, dtype: torch.dtype) -> Any:
    return map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, batch)


def on_gpu(batch: Any) -> Any:
    return map_tensors(lambda t: t.to(CUDA), batch)


def near(got: Tensor, want: Tensor, factor: float = 1) -> None:
    torch.testing.assert_close(got.cpu(), want, rtol=factor * 1e-5, atol=factor * 1e-5 * float(want.abs().max()))


def errors(compressor: dropinf.Compressor, rows: dropinf.Gradients, expected: dict[str, Tensor]) -> dict[str, float]:
    """Return each layer's error relative to what its own sketch makes of the float64 gradients of all parameters."""
    assert {layer.parameter for layer in compressor.layers.values()} == set(expected)
    largest = max(float(g.norm()) for g in expected.values())
    found = {}
    for name, layer in compressor.layers.items():
        want = sketched(layer, expected[layer.parameter].double())
        got = rows[name].cpu().double()
        assert got.shape == want.shape
        found[name] = float((got - want).norm() / want.norm().clamp_min(1e-3 * largest))
    return found


def ways(compressor: dropinf.Compressor) -> dict[str, tuple[str, str]]:
    """Return how each layer's gradient was found, and why not at the floor: a wrong kernel shows here, not in rows.

    Whole gradients count as one way: recurrent modules take cuDNN on a GPU, and which of these ways runs differs.
    """
    ladder = compressor._sweep.ladder
    return {
        name: (rung if rung in TAPPED else "whole", ladder.reasons.get(name, "")) for name, rung in ladder.rungs.items()
    }


def on_hooks(compressor: dropinf.Compressor) -> bool:
    """Return whether all gradients came from hooks."""
    return {rung for rung, _ in ways(compressor).values()} == {"hook"}


def check(name: str, sketch: Any, dtype: torch.dtype = torch.float32, *, calibrate: bool = False) -> dropinf.Compressor:
    """Compress a model's batch on the GPU: it errs at most twice as much as the CPU in the same dtype, by the same ways."""
    model, batch, loss_fn = build(name)
    expected = oracle(getattr(model, "_orig_mod", model), loss_fn, batch, N)
    found = []
    for place in ("cpu", "gpu"):
        model, batch, loss_fn = build(name)
        model, batch = model.to(dtype), cast(batch, dtype)
        if place == "gpu":
            model, batch = move(model), on_gpu(batch)
        compressor = dropinf.Compressor(model, sketch, loss_fn)
        if calibrate:
            compressor.calibrate([batch])
        rows = compressor.compress([batch])
        assert not rows.flat.is_cuda  # it has left the GPU's memory
        found.append((errors(compressor, rows, expected), ways(compressor)))
    (on_cpu, ways_on_cpu), (there, ways_there) = found
    assert ways_there == ways_on_cpu
    eps = torch.finfo(dtype).eps
    assert all(there[layer] <= 2 * error + 8 * eps for layer, error in on_cpu.items()), (there, on_cpu)
    return compressor
