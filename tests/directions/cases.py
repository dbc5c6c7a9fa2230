"""Models of every kind of layer, sketches of every kind, and the oracle of a product: a backward for each sample."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import dropinf
from tests.api.models import N, build
from tests.api.oracle import dense, oracle

QUERIES = 2
SKETCHES = {
    "identity": dropinf.Identity(),
    "dropout": dropinf.Dropout(dim=(3, 2)),
    "group": dropinf.Dropout(dim=4, group=4),
    "fold": dropinf.Dropout(dim=2, keep=0.6),
    "scaled": dropinf.Dropout(dim=3, scale=True),
    "flat": dropinf.Dropout(dim=17, mode="flat"),
    "flat_fold": dropinf.Dropout(dim=7, mode="flat", keep=0.4),
    "energy": dropinf.Dropout(dim=3, sampling="energy"),
    "rank": dropinf.Dropout(dim=2, rank=4),
    "rank_fold": dropinf.Dropout(dim=2, rank=4, keep=0.8),
    "whitened": dropinf.Dropout(dim=2, rank=4, sampling="energy", whiten=True),
    "gaussian": dropinf.Gaussian(dim=3),
    "rademacher": dropinf.Rademacher(dim=3),
    "sjlt": dropinf.SJLT(dim=3),
    "pca": dropinf.PCA(dim=3),
}
MODELS = ("sequence_mlp", "cnn", "shared_positions", "tied", "raw_parameters", "gpt2")


class Case(NamedTuple):
    """A compressor with what it made of N samples, two of which are the queries."""

    model: nn.Module
    batch: object
    loss_fn: object
    compressor: dropinf.Compressor
    train: dropinf.Gradients
    query: dropinf.Gradients
    fisher: dropinf.Fisher


def make(name: str, sketch: str) -> Case:
    model, batch, loss_fn = build(name)
    compressor = dropinf.Compressor(model, SKETCHES[sketch], loss_fn)
    compressor.calibrate([batch])
    train = compressor.compress([batch])
    # The gradient of gpt2's key biases is rounding alone, which a block of its own would blow up.
    fisher = dropinf.build_fisher(train, "joint" if name == "gpt2" else "block", damping=0.3)
    return Case(model, batch, loss_fn, compressor, train, train[:QUERIES], fisher)


def spread(layer: dropinf.Layer, stored: Tensor) -> Tensor:
    """S^T of one stored gradient, with S written out as float64 matrices: [*shape]."""
    rows, columns = layer.matrix_shape
    if layer.in_axis is None:
        matrix = (stored @ dense(layer.out_axis)).view(rows, columns)
    else:
        matrix = dense(layer.out_axis).T @ stored @ dense(layer.in_axis)
    return (matrix.T if layer.transposed else matrix).reshape(layer.shape)


def products(model: nn.Module, loss_fn, batch, direction: dropinf.Direction, n: int = N) -> Tensor:
    """<grad l_n, v_q> [Q, N] by one backward a sample."""
    gradients = oracle(model, loss_fn, batch, n)
    found = torch.zeros(len(direction), n, dtype=torch.float64)
    for q in range(len(direction)):
        for name in direction.parameters:
            found[q] += gradients[name].reshape(n, -1) @ direction.tensor(name, q).flatten().to(gradients[name])
    return found


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert found.shape == expected.shape
    error = float((found.double() - expected).abs().max() / expected.abs().max())
    assert error <= tolerance, f"relative error {error:.2e}"
