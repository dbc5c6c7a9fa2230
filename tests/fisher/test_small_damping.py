"""Damping so small that fp32 loses it, samples that are all equal, and dampings that an error names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import dropinf
from dropinf.fisher import Fisher, FisherKind, build_fisher
from dropinf.fisher.damping import ledoit_wolf
from dropinf.gradients import Gradients, Shapes
from dropinf.score import ScoreKind, score, self_influence
from tests.fisher.test_fisher import DIGEST, KINDS, SHAPES, Stream, assert_near, make
from tests.index.small import make_batches, make_compressor

DAMPINGS = [1e-1, 1e-3, 1e-5, 1e-6, 1e-8]
WIDE: Shapes = {"a": (8, 32), "b": (256,)}
WIDE_DIGEST = {"a": "x", "b": "y"}


def wide(n: int, seed: int, size: float = 1.0) -> Gradients:
    flat = torch.randn(n, 512, generator=torch.Generator().manual_seed(seed)) * size
    flat[:, :256] *= 1e-3  # layers of different size
    return Gradients(flat, WIDE, WIDE_DIGEST)


def inverse(train: Gradients, kind: str, damping: float) -> Tensor:
    """(F + lambda I)^{-1} of all layers, in fp64, as one matrix: from the singular values of the rows."""
    layers = [train.flat] if kind == "joint" else [train[name].flatten(1) for name in train.shapes]
    blocks = []
    for c in layers:
        lam = damping * float(c.double().square().sum()) / c.numel()
        _, s, v = torch.linalg.svd(c.double(), full_matrices=True)
        eigen = torch.zeros(c.shape[1], dtype=torch.float64)
        eigen[: len(s)] = s.square() / len(c)
        blocks.append(v.T / (eigen + lam) @ v)
    return torch.block_diag(*blocks)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("size", [1.0, 1e-30])
@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("kind", ["block", "joint"])
def test_scores_of_fewer_samples_than_columns(kind: FisherKind, damping: float, size: float, tmp_path: Path) -> None:
    """In memory, streamed, to a file and as the best; of samples that are in F, whose part orthogonal to it is zero."""
    train, query = wide(100, 0, size), wide(5, 1, size)
    one, asked = (Gradients(x.flat.double() / size, WIDE, WIDE_DIGEST) for x in (train, query))
    solver = inverse(one, kind, damping)
    expected, own = asked.flat @ solver @ one.flat.T, (one.flat @ solver * one.flat).sum(1)
    fisher = build_fisher(Stream(train, 30), kind, damping)
    wanted: list[tuple[ScoreKind, Tensor]] = [("influence", expected), ("relative", expected / own.sqrt())]
    for name, right in wanted:
        for source in (train, Stream(train, 7)):
            found = score(query, source, fisher, kind=name)
            assert found.dtype == torch.float32
            assert error(found, right) < 1e-4
        best = score(query, Stream(train, 7), fisher, kind=name, top=9)
        assert best.values.dtype == torch.float32
        assert error(best.values, right.topk(9).values) < 1e-4
        assert (
            error(-score(query, train, fisher, kind=name, top=9, largest=False).values, (-right).topk(9).values) < 1e-4
        )
        assert error(score(query, train, fisher, kind=name, out=tmp_path / "scores.npy"), right) < 1e-4
    assert error(self_influence(Stream(train, 7), fisher), own) < 1e-4


@pytest.mark.parametrize("damping", DAMPINGS)
@pytest.mark.parametrize("kind", ["block", "joint"])
def test_solved_and_whitened_rows(kind: FisherKind, damping: float, tmp_path: Path) -> None:
    train, query = wide(100, 0), wide(5, 1)
    solver = inverse(train, kind, damping)
    expected = query.flat.double() @ solver @ train.flat.double().T
    fisher = build_fisher(train, kind, damping)
    solved = fisher.solve(query).flat
    assert error(solved, query.flat.double() @ solver) < 1e-4
    assert error(solved.double() @ train.flat.double().T, expected) < 1e-4
    assert error(fisher.whiten(query).flat @ fisher.whiten(train).flat.T, expected) < 1e-4
    fisher.save(tmp_path / "fisher")
    assert error(score(query, train, Fisher.load(tmp_path / "fisher")), expected) < 1e-4
    if damping == 0.1:  # the usual one costs no fp64
        assert solved.dtype == fisher.whiten(query).flat.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "int8", "bfloat16"])
def test_an_index_at_a_small_damping(dtype: Literal["float32", "int8", "bfloat16"], tmp_path: Path) -> None:
    """Its rows are read as the Fisher read them; exported rows keep what products need."""
    index = make_compressor().compress(make_batches(), out=tmp_path / "index", dtype=getattr(torch, dtype))
    held = index[:].flat[:9].float()
    digest = {"all": "x"}
    train = Gradients(held, {"all": (held.shape[1],)}, digest)
    assert held.shape[1] > 2 * len(held)
    joint = Gradients(index[:].flat.float(), train.shapes, digest)
    few = dropinf.build_fisher(index[:9], "joint", 1e-8)
    solver = inverse(train, "joint", 1e-8)
    expected = (joint.flat.double() @ solver @ joint.flat.double().T)[:, :9]
    assert error(score(index[:], index, few)[:, :9], expected) < 1e-4
    for name in ("rows.npy", "rows.safetensors"):
        index.whitened(tmp_path / name, few)
    white = few.whiten(index[:]).flat
    read = torch.from_numpy(np.load(tmp_path / "rows.npy"))
    assert torch.equal(read, load_file(tmp_path / "rows.safetensors")["rows"])
    assert error(white @ read.T[:, :9], expected) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-30, 1.0])
@pytest.mark.parametrize("n", [2, 8, 60, 3000])
@pytest.mark.parametrize("kind", KINDS)
def test_auto_of_equal_samples(kind: FisherKind, n: int, size: float, dtype: torch.dtype) -> None:
    """F = c c^T: along c the solve divides by the mean of the spectrum's own size, |c|^2."""
    row = make(1).flat * size / 1e3
    train = Gradients(row.expand(n, -1).to(dtype).contiguous(), SHAPES, DIGEST)
    fisher = build_fisher(train, kind, "auto")
    assert fisher.solve(train).flat.isfinite().all()
    found = fisher.quadratic(train)
    white = fisher.whiten(train).flat
    assert_near(white.square().sum(1), found.double(), 1e-4)
    if kind in ("block", "joint"):  # of which each layer, or all together, give 1
        assert_near(found, torch.full((n,), 1.0 if kind == "joint" else 3.0, dtype=torch.float64), 2e-3)


@pytest.mark.parametrize("rounding", [-1e-8, 0.0, 1e-10, 1e-8])
def test_rounding_does_not_choose(rounding: float) -> None:
    """Without a variance the least share is taken; where F is its own mean, the largest."""
    assert ledoit_wolf(8, 12, 1.0, 144.0, 8 * 144.0 * (1 + rounding)) == pytest.approx(1e-4, rel=1e-3)
    assert ledoit_wolf(8, 12, 1.0, 12.0 * (1 + rounding), 8 * 12.0) == pytest.approx(999)


@pytest.mark.parametrize("kind", KINDS)
def test_auto_of_one_entry_for_all(kind: FisherKind) -> None:
    """A diagonal that is its own mean has no distance from it."""
    train = Gradients(torch.full((40, 25), 0.1), SHAPES, DIGEST)
    found = build_fisher(train, kind, "auto").quadratic(train)
    expected = {"diagonal": 25.0, "joint": 1.0}.get(kind, 3.0)
    assert_near(found, torch.full((40,), expected, dtype=torch.float64), 2e-3)


def short_of_a_rank(n: int, size: float, dtype: torch.dtype) -> Gradients:
    flat = make(n).flat
    flat[:, 0:4], flat[:, 24] = 0, flat[:, 23] - flat[:, 22]
    flat[:, 20] *= 1e6  # beside which 0.1 of the mean is hardly anything in fp32
    return Gradients((flat * size).to(dtype), SHAPES, DIGEST)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e25])
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("n", [8, 60])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damping_that_an_error_names_solves(
    kind: FisherKind, n: int, absolute: bool, size: float, dtype: torch.dtype
) -> None:
    train = short_of_a_rank(n, size, dtype)
    with pytest.raises(ValueError, match="is singular to working precision with damping=0; use a larger one") as caught:
        build_fisher(train, kind, 0.0, absolute=absolute).solve(train)
    solves_as_named(train, kind, absolute, str(caught.value))
    if absolute and kind != "diagonal":  # which divides by anything but zero
        with pytest.raises(ValueError, match=r"singular to working precision with damping=1e\S+; use") as caught:
            build_fisher(train, kind, 1e-40 * size * size, absolute=True).solve(train)
        solves_as_named(train, kind, absolute, str(caught.value))


def solves_as_named(train: Gradients, kind: FisherKind, absolute: bool, message: str) -> None:
    """Each damping that a message names solves its layer; the next message may be of another one."""
    layer, named = re.search(r"layer '(.*?)'", message), re.findall(r"damping=([\d.e+-]+)", message.split("e.g. ")[1])
    assert layer is not None
    assert layer[1] in ("all layers", *SHAPES)
    assert len(named) == (2 if absolute else 1), message
    own = train
    if kind != "joint":
        own = Gradients(train[layer[1]].flatten(1).contiguous(), {layer[1]: SHAPES[layer[1]]}, {layer[1]: "a"})
    for value, flag in zip(named, (absolute, False), strict=False):
        assert build_fisher(own, kind, float(value), absolute=flag).quadratic(own).isfinite().all()


@pytest.mark.parametrize("damping", [0.1, "auto"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("n", [8, 60])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_are_not_finite_name_the_layer(
    kind: FisherKind, n: int, bad: float, damping: float | Literal["auto"]
) -> None:
    flat = make(n).flat.clone()
    flat[3, 13] = bad  # in "bias"
    fisher = build_fisher if kind != "kronecker" else lambda *a: Fisher(*a[1:]).update(a[0])
    name = "all layers" if kind == "joint" else "bias"
    with pytest.raises(ValueError, match=f"layer '{name}'.* N={n} samples hold NaN or infinite values"):
        fisher(Gradients(flat, SHAPES, DIGEST), kind, damping).solve(make(2))
