"""Scores against dense float64 matrices, and top-k against the whole matrix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dropinf.gradients
from dropinf.fisher import Fisher, FisherKind, build_fisher
from dropinf.gradients import Gradients, Shapes
from dropinf.score import ScoreKind, TopK, score, self_influence
from dropinf_kernels import score_topk

SHAPES: Shapes = {"fc": (3, 4), "bias": (3,), "head": (2, 5)}
DIGEST = {"fc": "aa", "bias": "bb", "head": "cc"}
K = 25
KINDS: list[FisherKind] = ["block", "joint", "diagonal", "kronecker"]
SCORES: list[ScoreKind] = ["influence", "dot", "cosine", "relative"]
SIZES = [2, 8, 60]  # below every width, between them, above all of them


def make(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Gradients:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    flat = torch.randn(n, K, generator=generator, dtype=torch.float64) @ mix
    return Gradients(flat.to(dtype), SHAPES, DIGEST)


def fisher_block(c: Tensor, shape: tuple[int, ...] | None, kind: str, damping: float) -> Tensor:
    """F + lambda I of one block from its definition; `shape` is that of one layer, None for joint."""
    fisher = torch.einsum("nk,nl->kl", c, c) / len(c)
    ridge = damping * torch.diag(fisher.diagonal().mean().expand(len(fisher)))
    if kind == "diagonal":
        return torch.diag(fisher.diagonal()) + ridge
    if kind == "kronecker" and shape is not None and len(shape) == 2:
        cube = c.reshape(-1, *shape)
        left, right = torch.einsum("nij,nkj->ik", cube, cube), torch.einsum("nji,njk->ik", cube, cube)
        basis = torch.kron(torch.linalg.eigh(left)[1], torch.linalg.eigh(right)[1])
        return basis @ torch.diag((c @ basis).square().mean(0)) @ basis.T + ridge
    return fisher + ridge


def expected_scores(query: Tensor, train: Gradients, fisher_kind: str, kind: str, damping: float) -> Tensor:
    c = train.flat
    if kind == "dot":
        return query @ c.T
    if kind == "cosine":
        return torch.nn.functional.cosine_similarity(query[:, None], c[None], dim=-1)
    if fisher_kind == "joint":
        matrix = fisher_block(c, None, fisher_kind, damping)
    else:
        parts = [fisher_block(train[n].flatten(1), s, fisher_kind, damping) for n, s in SHAPES.items()]
        matrix = torch.block_diag(*parts)
    solved = torch.linalg.solve(matrix, c.T)  # [K, N]
    influence = query @ solved
    return influence / (c.T * solved).sum(0).sqrt() if kind == "relative" else influence


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-8) -> None:
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"relative error {error:.2e}"


def dense_top(scores: Tensor, k: int, largest: bool = True) -> tuple[Tensor, Tensor]:
    """Top-k of a whole matrix, ties to the lowest index."""
    values, indices = scores.sort(dim=1, descending=largest, stable=True)
    return values[:, :k], indices[:, :k]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read train seven rows at a time, so that small problems stream too."""
    monkeypatch.setattr(dropinf.gradients, "BLOCK_ROWS", 7)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("fisher_kind", KINDS)
def test_every_kind_follows_its_definition(fisher_kind: FisherKind, kind: ScoreKind, n: int) -> None:
    train, query = make(n), make(5, seed=1)
    fisher = build_fisher(train, fisher_kind, damping=0.2)
    expected = expected_scores(query.flat, train, fisher_kind, kind, 0.2)
    scores = score(query, train, fisher, kind=kind)
    assert scores.dtype == torch.float64
    assert_near(scores, expected)
    for largest in (True, False):
        for k in (1, 9, 100):
            best = score(query, train, fisher, kind=kind, top=k, largest=largest)
            values, indices = dense_top(expected, k, largest)
            assert torch.equal(best.indices, indices)
            assert_near(best.values, values)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("fisher_kind", KINDS)
def test_self_influence_is_the_diagonal(fisher_kind: FisherKind, n: int) -> None:
    train = make(n)
    fisher = build_fisher(train, fisher_kind)
    assert_near(self_influence(train, fisher), score(train, train, fisher).diagonal())


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("largest", [True, False])
def test_ties_go_to_the_lowest_index(largest: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.randint(-1, 2, (100, 3), generator=generator).to(dtype)
    train = Gradients(flat, {"w": (3,)}, {"w": "a"})
    for k in (1, 5, 6, 7, 8, 40, 100, 1000):
        best = score(train[:6], train, kind="dot", top=k, largest=largest)
        values, indices = dense_top(flat[:6] @ flat.T, k, largest)
        assert torch.equal(best.values, values)
        assert torch.equal(best.indices, indices)


class Recorder(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("kind", SCORES)
def test_top_never_holds_the_matrix(kind: ScoreKind, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []

    def recorded(q: Tensor, c: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows.append(len(c))
        return score_topk(q, c, *args, **kwargs)

    monkeypatch.setattr("dropinf.index.products.score_topk", recorded)
    n, q = 20_000, 64
    flat = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))
    train = Gradients(flat, {"w": (8,)}, {"w": "a"})
    fisher = build_fisher(train)
    with Recorder() as seen:
        best = score(train[:q], train, fisher, kind=kind, top=3)
    assert best.values.shape == best.indices.shape == (q, 3)
    assert seen.largest <= 2 * q * 4096 < q * n
    assert max(rows) <= 4096  # so that what the op holds is bounded, where the recorder cannot see into it
    assert sum(rows) == n
    with Recorder() as whole:
        score(train[:q], train, fisher, kind=kind)
    assert whole.largest == q * n


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_scores(kind: ScoreKind, dtype: torch.dtype) -> None:
    train, query = make(60, dtype=dtype), make(5, seed=1, dtype=dtype)
    fisher = build_fisher(train)
    scores = score(query, train, fisher, kind=kind)
    assert scores.dtype == torch.float32
    expected = expected_scores(query.flat.double(), train.to(torch.float64), "block", kind, 0.1)
    assert_near(scores, expected, 1e-4)
    best = score(query, train, fisher, kind=kind, top=4)
    assert best.values.dtype == torch.float32
    assert_near(best.values, dense_top(expected, 4)[0], 1e-4)
    mixed = score(query, train.to(torch.float64), fisher, kind=kind, top=60)
    assert mixed.values.dtype == torch.float64
    assert self_influence(train, fisher).dtype == torch.float32


@pytest.mark.parametrize("kind", SCORES)
def test_zero_samples_score_zero(kind: ScoreKind) -> None:
    flat, ask = make(20).flat.clone(), make(3, seed=1).flat.clone()
    flat[4] = 0
    ask[1] = 0
    train, query = Gradients(flat, SHAPES, DIGEST), Gradients(ask, SHAPES, DIGEST)
    fisher = build_fisher(train)
    scores = score(query, train, fisher, kind=kind)
    assert torch.isfinite(scores).all()
    assert (scores[:, 4] == 0).all()
    assert (scores[1] == 0).all()
    assert (scores[0, 5:] != 0).all()
    assert torch.isfinite(score(query, train, fisher, kind=kind, top=20).values).all()


def test_positive_means_that_training_lowers_the_loss() -> None:
    """One gradient step on a training sample changes the query's loss by minus the dot product."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, generator=generator, dtype=torch.float64)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    y = torch.randn(30, generator=generator, dtype=torch.float64)
    train = Gradients((x @ weight - y).unsqueeze(1) * x, {"w": (4,)}, {"w": "a"})
    step, loss = 1e-6, (x @ weight - y).square() / 2
    after = torch.stack([(x @ (weight - step * g) - y).square() / 2 for g in train.flat], dim=1)  # [query, train]
    assert_near(score(train, train, kind="dot"), (loss.unsqueeze(1) - after) / step, 1e-3)
    assert (score(train, train, build_fisher(train)).diagonal() > 0).all()


class Stream:
    """A GradientSource that is not Gradients, as an index on disk is."""

    def __init__(self, held: Gradients) -> None:
        self.held = held
        self.shapes, self.digest, self.dtype, self.device = held.shapes, held.digest, held.dtype, held.device

    def __len__(self) -> int:
        return len(self.held)

    def blocks(self, rows: int) -> Iterator[tuple[int, Gradients]]:
        return self.held.blocks(min(rows, 3))


@pytest.mark.parametrize("kind", SCORES)
def test_a_stream_scores_as_memory_does(kind: ScoreKind) -> None:
    train, query = make(20), make(5, seed=1)
    fisher = build_fisher(train)
    assert_near(score(Stream(query), Stream(train), fisher, kind=kind), score(query, train, fisher, kind=kind))
    streamed = score(query, Stream(train), fisher, kind=kind, top=4)
    assert torch.equal(streamed.indices, score(query, train, fisher, kind=kind, top=4).indices)
    assert_near(self_influence(Stream(train), fisher), self_influence(train, fisher))


@pytest.mark.parametrize("kind", SCORES)
def test_empty_queries_and_train(kind: ScoreKind) -> None:
    train = make(20)
    fisher = build_fisher(train)
    assert score(train[:0], train, fisher, kind=kind).shape == (0, 20)
    assert score(train[:2], train[:0], fisher, kind=kind).shape == (2, 0)
    assert score(train[:0], train, fisher, kind=kind, top=3).values.shape == (0, 3)
    best = score(train[:2], train[:0], fisher, kind=kind, top=3)
    assert isinstance(best, TopK)
    assert best.indices.shape == (2, 0)
    assert score(Stream(train[:0]), train, fisher, kind=kind).shape == (0, 20)


@pytest.mark.parametrize("top", [0, -1, 2.0, True])
def test_bad_top(top: Any) -> None:
    train = make(4)
    with pytest.raises(ValueError, match=f"top is {top!r}; it must be an int of at least 1"):
        score(train, train, kind="dot", top=top)


def test_bad_arguments() -> None:
    train = make(4)
    with pytest.raises(ValueError, match="kind is 'dots'; it must be one of 'influence', 'dot', 'cosine', 'rel"):
        score(train, train, kind="dots")  # type: ignore[call-overload]
    for kind in ("influence", "relative"):
        with pytest.raises(ValueError, match=f"fisher is None; kind='{kind}' needs build_fisher"):
            score(train, train, kind=kind)
    with pytest.raises(ValueError, match="largest is False without top"):
        score(train, train, kind="dot", largest=False)
    with pytest.raises(ValueError, match="fisher has no samples"):
        self_influence(train, Fisher())


def test_other_sketches_are_refused() -> None:
    train = make(4)
    fisher = build_fisher(train)
    other = Gradients(train.flat, SHAPES, {**DIGEST, "head": "zz"})
    message = "differ: layer 'head' has the same shape but different masks"
    with pytest.raises(ValueError, match=f"query and train {message}"):
        score(other, train, kind="dot")
    for kind in ("influence", "relative"):
        with pytest.raises(ValueError, match=f"fisher and train {message}"):
            score(other, other, fisher, kind=kind)
    with pytest.raises(ValueError, match=f"fisher and train {message}"):
        self_influence(other, fisher)
