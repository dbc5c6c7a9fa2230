"""Fisher against its definition: explicit matrices in float64, solved densely."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dropinf.fisher import Fisher, FisherKind, build_fisher
from dropinf.fisher.dense import Form
from dropinf.gradients import Gradients, Shapes
from dropinf.score import score

SHAPES: Shapes = {"fc": (3, 4), "bias": (3,), "head": (2, 5)}
DIGEST = {"fc": "aa", "bias": "bb", "head": "cc"}
K = 25
KINDS: list[FisherKind] = ["block", "joint", "diagonal", "kronecker"]
SIZES = [2, 8, 60]  # below every width, between them, above all of them


def make(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Gradients:
    """Correlated gradients whose columns differ in size by a factor of 100."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    flat = torch.randn(n, K, generator=generator, dtype=torch.float64) @ mix * torch.logspace(-1, 1, K)
    return Gradients(flat.to(dtype), SHAPES, DIGEST)


def damped_block(c: Tensor, shape: tuple[int, ...] | None, kind: str, damping: float, absolute: bool) -> Tensor:
    """F + lambda I of one block from its definition; `shape` is that of one layer, None for joint."""
    fisher = torch.stack([torch.outer(row, row) for row in c]).mean(0)
    lam = damping if absolute else damping * float(fisher.diagonal().mean())
    if kind == "diagonal":
        fisher = torch.diag(fisher.diagonal())
    if kind in ("kronecker", "kfac") and shape is not None and len(shape) == 2:
        matrices = [row.reshape(shape) for row in c]
        left = torch.stack([m @ m.T for m in matrices]).mean(0)
        right = torch.stack([m.T @ m for m in matrices]).mean(0)
        fisher = torch.kron(left, right) / left.trace()
        if kind == "kronecker":
            basis = torch.kron(torch.linalg.eigh(left)[1], torch.linalg.eigh(right)[1])
            fisher = basis @ torch.diag((c @ basis).square().mean(0)) @ basis.T
    return fisher + lam * torch.eye(len(fisher), dtype=torch.float64)


def oracle(train: Gradients, kind: str, damping: float = 0.1, absolute: bool = False) -> Tensor:
    """Return (F + lambda I)^{-1} as one dense `[K, K]`."""
    if kind == "joint":
        matrix = damped_block(train.flat, None, kind, damping, absolute)
    else:
        layers = ((train[name].flatten(1), shape) for name, shape in train.shapes.items())
        matrix = torch.block_diag(*(damped_block(c, shape, kind, damping, absolute) for c, shape in layers))
    return torch.linalg.solve(matrix, torch.eye(K, dtype=torch.float64))


def assert_near(found: Tensor, expected: Tensor, tolerance: float = 1e-8) -> None:
    assert torch.isfinite(found).all()
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_solve_and_quadratic_follow_the_definition(kind: FisherKind, n: int, absolute: bool) -> None:
    train, query = make(n), make(5, seed=1)
    fisher = build_fisher(train, kind, 0.3, absolute=absolute)
    inverse = oracle(train, kind, 0.3, absolute)
    solved = fisher.solve(query)
    assert_near(solved.flat, query.flat @ inverse)
    assert solved.digest == query.digest
    assert_near(fisher.quadratic(query), torch.einsum("nk,kl,nl->n", query.flat, inverse, query.flat))
    assert fisher.count == n
    assert len(fisher.solve(query[:0])) == len(fisher.quadratic(query[:0])) == 0


@pytest.mark.parametrize("n", SIZES)
def test_without_correction_kronecker_is_kfac(n: int) -> None:
    train, query = make(n), make(5, seed=1)
    fisher = Fisher("kronecker").update(train)
    assert_near(fisher.solve(query).flat, query.flat @ oracle(train, "kfac"))
    fisher.correct(train[: n // 2]).correct(train[n // 2 :])
    assert_near(fisher.solve(query).flat, query.flat @ oracle(train, "kronecker"))
    fisher.update(query)
    both = Gradients.cat([train, query])
    assert_near(fisher.solve(query).flat, query.flat @ oracle(both, "kfac"))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", ["block", "joint"])
def test_primal_and_dual_agree(kind: FisherKind, n: int) -> None:
    train, query = make(n), make(5, seed=1)
    primal, dual = (Fisher(kind, _form=form).update(train) for form in ("primal", "dual"))
    assert_near(primal.solve(query).flat, dual.solve(query).flat)
    assert_near(primal.quadratic(query), dual.quadratic(query))


def test_the_smaller_form_is_held() -> None:
    fisher = Fisher("block").update(make(4))
    held = [block.gram is not None for _, block in fisher._blocks]  # type: ignore[attr-defined]
    assert held == [False, True, False]
    fisher.update(make(6, seed=1))
    held = [block.gram is not None for _, block in fisher._blocks]  # type: ignore[attr-defined]
    assert held == [False, True, True]
    assert fisher._blocks[2][1].rows == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("sizes", [(1, 1), (3, 2, 1), (8, 30), (30, 8, 1, 2), (20, 20)])
@pytest.mark.parametrize("kind", KINDS)
def test_updates_in_any_order_and_merges_equal_one_build(kind: FisherKind, sizes: tuple[int, ...]) -> None:
    parts = [make(n, seed=i) for i, n in enumerate(sizes)]
    whole, query = Gradients.cat(parts), make(5, seed=50)
    expected = build_fisher(whole, kind).solve(query).flat
    backwards, left, right = Fisher(kind), Fisher(kind), Fisher(kind)
    for part in reversed(parts):
        backwards.update(part)
        backwards.update(part[:0])
    left.update(parts[0])
    for part in parts[1:]:
        right.update(part)
    right.solve(query)  # a factorization that the merge must drop
    for merged in (backwards, Fisher(kind).merge(right).merge(Fisher(kind)).merge(left), left.merge(right)):
        assert merged.count == len(whole)
        if kind == "kronecker":
            merged.correct(whole)
        assert_near(merged.solve(query).flat, expected)


def test_a_merge_leaves_the_other_alone() -> None:
    query = make(5, seed=50)
    for kind in KINDS:
        for n in SIZES:
            other = Fisher(kind).update(make(n, seed=3))
            before = other.solve(query).flat
            Fisher(kind).merge(other).update(make(40, seed=4))
            Fisher(kind).update(make(40, seed=4)).merge(other)
            other.update(query[:0])  # drops the factorization, so that the sums themselves are compared
            assert_near(other.solve(query).flat, before)
            other.update(query)
            assert not torch.equal(other.solve(query).flat, before)


class Stream:
    """A GradientSource that is not Gradients, as an index on disk is."""

    def __init__(self, held: Gradients, rows: int) -> None:
        self.held, self.rows = held, rows
        self.shapes, self.digest, self.dtype, self.device = held.shapes, held.digest, held.dtype, held.device

    def __len__(self) -> int:
        return len(self.held)

    def blocks(self, rows: int) -> Iterator[tuple[int, Gradients]]:
        return self.held.blocks(min(rows, self.rows))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_gives_what_memory_gives(kind: FisherKind, n: int) -> None:
    train = make(n)
    fisher, streamed = build_fisher(train, kind), build_fisher(Stream(train, 3), kind)
    assert_near(streamed.quadratic(Stream(train, 5)), fisher.quadratic(train))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-4)])
def test_low_precision_gradients(kind: FisherKind, n: int, dtype: torch.dtype, tolerance: float) -> None:
    train, query = make(n, dtype=dtype), make(5, seed=1, dtype=dtype)
    exact, exact_query = train.to(torch.float64), query.to(torch.float64)
    solved = build_fisher(train, kind).solve(query)
    assert solved.dtype == torch.float32
    expected = exact_query.flat @ oracle(exact, kind)
    for name in SHAPES:
        reference = Gradients(expected, SHAPES, DIGEST)[name]
        assert_near(solved[name], reference, tolerance)


@pytest.mark.parametrize("form", ["primal", "dual"])
def test_fp32_falls_back_to_fp64_where_it_must(form: Form) -> None:
    shapes, digest = {"w": (40,)}, {"w": "a"}
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(30, 40, generator=generator)
    flat[:, 1:] += 1000 * flat[:, :1]  # one direction dwarfs the others
    train = Gradients(flat, shapes, digest)
    fisher = Fisher("block", 2e-6, _form=form).update(train)
    if form == "primal":  # whose Gram sum in fp32 would leave errors of a fifth
        with pytest.raises(
            ValueError, match=r"singular to working precision with damping=2e-06; .* gradients in float64"
        ):
            fisher.solve(train)
        fisher = Fisher("block", 2e-6, _form=form).update(train.to(torch.float64))
    solved = fisher.solve(train)
    factor = fisher._blocks[0][1]._factor  # type: ignore[attr-defined]
    assert solved.dtype == torch.float64 or form == "primal"
    assert factor.lower.dtype == torch.float64
    c = flat.double()
    moment = c.T @ c / 30
    damped = moment + 2e-6 * moment.diagonal().mean() * torch.eye(40)
    assert_near(solved.flat, torch.linalg.solve(damped, c.T).T, 1e-6)


DEGENERATE = {
    "rank 2": lambda r: (r(300, 2) @ r(2, 8)).bfloat16().float(),
    "offset": lambda r: r(300, 8) + 300,
    "rank 30": lambda r: r(100, 30) @ r(30, 64),
    "one large": lambda r: torch.cat([1e4 * r(500, 1), r(500, 63)], 1),
    "full": lambda r: r(65, 64),
    "dual": lambda r: r(63, 30) @ r(30, 64),
}


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("damping", [1e-7, 1e-6, 1e-5, 1e-4, 1e-3])
def test_small_dampings_are_right_or_refused(damping: float, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    flat = DEGENERATE[kind](lambda *size: torch.randn(*size, generator=generator))
    rows = Gradients(flat, {"w": (flat.shape[1],)}, {"w": "a"})
    try:
        got = score(rows, rows, build_fisher(rows, "block", damping)).double()
    except ValueError as error:
        assert "singular to working precision" in str(error)  # noqa: PT017
        assert kind in ("rank 2", "offset", "rank 30")
        return
    c = flat.double()
    moment = c.T @ c / len(c)
    want = c @ torch.linalg.solve(moment + damping * moment.diagonal().mean() * torch.eye(len(moment)), c.T)
    assert float((got - want).abs().max() / want.abs().max()) < 0.04


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("damping", [0.0, 0.1])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", ["block", "diagonal", "kronecker"])
def test_a_zero_layer_solves_to_zero(kind: FisherKind, n: int, damping: float, absolute: bool) -> None:
    shapes, digest = {"a": (2,), "dead": (2, 2)}, {"a": "a", "dead": "d"}
    flat = torch.randn(n, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat[:, 2:] = 0
    query = Gradients(torch.ones(3, 6, dtype=torch.float64), shapes, digest)
    fisher = build_fisher(Gradients(flat, shapes, digest), kind, damping, absolute=absolute)
    solved = fisher.solve(query)
    assert (solved["dead"] == 0).all()
    assert torch.isfinite(solved.flat).all()
    assert (solved["a"] != 0).any()
    assert_near(fisher.quadratic(query), (solved.flat * query.flat).sum(1))


def test_zero_damping_solves_what_can_be_solved() -> None:
    train, query = make(60), make(5, seed=1)
    for kind in KINDS:
        solved = build_fisher(train, kind, 0.0).solve(query).flat
        assert_near(solved, query.flat @ oracle(train, kind, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [8, 60])
def test_singular_blocks_are_named(n: int, dtype: torch.dtype) -> None:
    flat = make(n, dtype=dtype).flat.clone()
    flat[:, 24] = flat[:, 23] - flat[:, 22]  # the last layer is short of a rank for every N
    train = Gradients(flat, SHAPES, DIGEST)
    name = "'fc'.* N=8 samples and K=12" if n == 8 else "'head'.* N=60 samples and K=10"
    with pytest.raises(ValueError, match=f"layer {name} columns is singular.* damping=0;.*damping=0.1"):
        build_fisher(train, damping=0.0).solve(train)
    with pytest.raises(ValueError, match=f"layer 'all layers'.* N={n} samples and K=25"):
        build_fisher(train, "joint", 0.0).quadratic(train)
    with pytest.raises(ValueError, match=r"e\.g\. damping=\S+ with absolute=True, or damping=0.1 with absolute=F"):
        build_fisher(train, damping=1e-18, absolute=True).solve(train)
    assert torch.isfinite(build_fisher(train).solve(train).flat).all()


@pytest.mark.parametrize("kind", ["diagonal", "kronecker"])
def test_a_dead_unit_is_singular_without_damping(kind: FisherKind) -> None:
    flat = make(60).flat.clone()
    flat[:, 0:4] = 0  # the first row of fc
    train = Gradients(flat, SHAPES, DIGEST)
    with pytest.raises(ValueError, match=r"layer 'fc'.* singular"):
        build_fisher(train, kind, 0.0).solve(train)
    assert torch.isfinite(build_fisher(train, kind).solve(train).flat).all()


def test_columns_of_very_different_size_are_not_singular() -> None:
    flat = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-6, 1, 1e3, 1e6])
    train = Gradients(flat, {"w": (4,)}, {"w": "a"})
    moment = flat.double().T @ flat.double() / 50
    expected = torch.linalg.solve(moment, flat.double().T).T
    assert_near(build_fisher(train, damping=0.0).solve(train).flat, expected, 1e-5)


@pytest.mark.parametrize("damping", [-0.1, math.nan, math.inf])
def test_bad_damping(damping: float) -> None:
    with pytest.raises(ValueError, match=f"damping is {damping}; it must be a finite number of at least 0"):
        build_fisher(make(3), damping=damping)


def test_bad_arguments() -> None:
    train = make(3)
    with pytest.raises(ValueError, match="kind is 'blok'; it must be one of 'block', 'joint', 'diagonal', 'kron"):
        build_fisher(train, "blok")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="train has 0 samples; a Fisher matrix needs at least 1"):
        build_fisher(train[:0])
    with pytest.raises(ValueError, match="fisher has no samples"):
        Fisher().solve(train)
    with pytest.raises(ValueError, match="kind is 'block'; only a Fisher of kind 'kronecker'"):
        build_fisher(train).correct(train)
    with pytest.raises(ValueError, match="other is a Fisher of kind 'joint'; it must be 'block'"):
        build_fisher(train).merge(build_fisher(train, "joint"))


def test_other_sketches_are_refused() -> None:
    train = make(3)
    other = Gradients(train.flat, SHAPES, {**DIGEST, "bias": "zz"})
    for kind in KINDS:
        fisher = build_fisher(train, kind)
        for use in (fisher.update, fisher.solve, fisher.quadratic):
            with pytest.raises(ValueError, match="fisher and gradients differ: layer 'bias' has the same shape"):
                use(other)
        with pytest.raises(ValueError, match="fisher and other differ: layer 'bias'"):
            fisher.merge(build_fisher(other, kind))
        assert fisher.count == 3


def test_repr() -> None:
    fisher = build_fisher(make(3), damping=0.5, absolute=True)
    assert repr(fisher) == "Fisher('block', damping=0.5, absolute=True, 3 samples, 3 blocks, cpu)"
