"""The independent oracle: a micro-batch of one through plain autograd, in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dropinf
from dropinf.workload import map_tensors


def oracle(model: nn.Module, loss_fn, batch, n: int) -> dict[str, Tensor]:
    """Parameter name -> per-sample gradients [N, *shape]."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in named}
    for i in range(n):
        single = map_tensors(lambda t, i=i: t[i : i + 1] if t.ndim and len(t) == n else t, batch)
        loss = loss_fn(model, single)
        assert loss.shape == (1,)
        loss.sum().backward()
        for name, p in named.items():
            rows[name].append(torch.zeros_like(p) if p.grad is None else p.grad)
            p.grad = None
    return {name: torch.stack(r) for name, r in rows.items()}


def sketched(layer: dropinf.Layer, gradient: Tensor) -> Tensor:
    """Gather (and fold) an oracle's gradient by the layer's own tables, written out with a dense S."""
    flat = gradient.flatten(2) if gradient.ndim > 2 else gradient[..., None]
    matrix = flat.mT if layer.transposed else flat
    if layer.in_axis is None:
        return matrix.flatten(1) @ dense(layer.out_axis).T
    return dense(layer.out_axis) @ matrix @ dense(layer.in_axis).T


def dense(axis: dropinf.Axis) -> Tensor:
    """The sketch of an axis as a float64 matrix [k, d]."""
    if axis.index is None:
        return axis.matrix.double()
    s = torch.zeros(axis.index.shape[1], axis.size, dtype=torch.float64)
    for f in range(len(axis.index)):
        for j, coordinate in enumerate(axis.index[f].tolist()):
            s[j, coordinate] += 1.0 if axis.weight is None else float(axis.weight[f, j])
    return s if axis.matrix is None else axis.matrix.double() @ s


def assert_equal_gradients(compressor, gradients, expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Every trainable parameter is there, and equals the sketched oracle to ``tolerance`` relative."""
    covered = {layer.parameter for layer in compressor.layers.values()}
    assert covered == set(expected)
    assert set(gradients.layers) == set(compressor.layers)
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 0
    for name, layer in compressor.layers.items():
        want = sketched(layer, expected[layer.parameter].double())
        got = gradients[name]
        assert got.shape == want.shape, name
        error = float((got.double() - want).norm() / want.norm().clamp_min(1e-5 * largest))
        assert error <= tolerance, f"{name}: relative error {error:.2e}"
