"""Gradients of any size in float32 give what those of size 1 give, against explicit matrices in float64."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from dropinf.fisher import Fisher, FisherKind, build_fisher
from dropinf.gradients import Gradients
from dropinf.score import score, self_influence
from tests.fisher.test_fisher import DIGEST, KINDS, SHAPES, assert_near, make, oracle
from tests.fisher.test_interrupted import Stream, built, state

SIZES = [1e-38, 1e-30, 1e-21, 1e-12, 1e12, 1e19, 1e30]


def sized(n: int, size: float, seed: int = 0) -> Gradients:
    """Gradients in float32 whose largest is of about this size; denormal ones of 1e-38 keep few digits."""
    flat = make(n, seed).flat
    return Gradients((flat / flat.abs().max() * size).float(), SHAPES, DIGEST)


def exact(gradients: Gradients, size: float) -> Gradients:
    """The same, of size 1, in float64."""
    return Gradients(gradients.flat.double() / size, SHAPES, DIGEST)


def rows_near(found: Tensor, expected: Tensor, tolerance: float = 2e-4) -> None:
    """Each layer's, since one layer may be far below another."""
    for name in SHAPES:
        a, b = (Gradients(x.double(), SHAPES, DIGEST)[name] for x in (found, expected))
        assert_near(a, b, tolerance)


@pytest.mark.parametrize("n", [5, 60])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_product_is_that_of_size_one(kind: FisherKind, size: float, n: int) -> None:
    train, query = sized(n, size), sized(4, size, seed=1)
    one, asked = exact(train, size), exact(query, size).flat
    inverse = oracle(one, kind)
    fisher = build_fisher(train, kind)
    expected, own = asked @ inverse @ one.flat.T, (one.flat @ inverse * one.flat).sum(1)
    if 1e-38 < size < 1e38:  # their inverses are numbers of float32
        solved = fisher.solve(query).flat
        assert solved.dtype == torch.float32
        rows_near(solved.double() * size, asked @ inverse)
        assert_near(score(query, train, fisher), expected, 2e-4)
        assert_near(score(query, train, fisher, top=n).values, expected.sort(1, descending=True).values, 2e-4)
        assert_near(score(query, train, fisher, kind="relative"), expected / own.sqrt(), 2e-4)
    assert_near(self_influence(train, fisher), own, 2e-4)
    assert_near(fisher.whiten(query).flat @ fisher.whiten(train).flat.T, expected, 2e-4)


@pytest.mark.parametrize("n", [5, 60])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_auto_chooses_what_it_chooses_for_size_one(kind: FisherKind, size: float, n: int) -> None:
    train = sized(n, size)
    expected = build_fisher(exact(train, size), kind, "auto").quadratic(exact(train, size))
    assert_near(build_fisher(train, kind, "auto").quadratic(train), expected, 2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_absolute_damping_is_of_the_size_of_the_gradients(kind: FisherKind) -> None:
    train = sized(60, 1e-30)
    inverse = oracle(exact(train, 1e-30), kind, 0.1, absolute=True)
    fisher = build_fisher(train, kind, 0.1 * 1e-60, absolute=True)
    rows_near(fisher.solve(train).flat.double() * 1e-30, exact(train, 1e-30).flat @ inverse)
    plain = build_fisher(train, kind, 1.0, absolute=True)  # beside which the matrix is nothing
    assert_near(plain.solve(train).flat.double() * 1e30, exact(train, 1e-30).flat, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_very_different_size_in_one_call(kind: FisherKind) -> None:
    train = sized(60, 1.0)
    fisher, query = build_fisher(train, kind), make(7, seed=1).flat.float()
    factors = torch.tensor([0, 1e-42, 1e-35, 1e-20, 1, 1e10, 1e25])[:, None]
    found = fisher.solve(Gradients(query * factors, SHAPES, DIGEST)).flat[2:].double() / factors[2:].double()
    rows_near(found, query.double()[2:] @ oracle(exact(train, 1.0), kind))
    assert fisher.solve(Gradients(query * 0, SHAPES, DIGEST)).flat.eq(0).all()


PARTS = list(permutations([(4, 1e-30), (40, 1e-14), (30, 1e11), (20, 1e25)], 3))
PARTS += [((40, 1e-14), (30, 1e-7), (20, 1e-12)), ((30, 1e11), (40, 1e9), (20, 1e10))]  # of usual size, but not first


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_very_different_size(kind: FisherKind, parts: tuple[tuple[int, float], ...], tmp_path: Path) -> None:
    """Updates, a stream, merges both ways and files between them, in any order."""
    held = [sized(n, size, seed=i) for i, (n, size) in enumerate(parts)]
    top = max(size for _, size in parts)
    whole = Gradients.cat(held)
    inverse, asked = oracle(exact(whole, top), "kfac" if kind == "kronecker" else kind), sized(4, top, seed=9)
    expected = (exact(asked, top).flat @ inverse * exact(asked, top).flat).sum(1)
    updated, streamed, merged, back, read = (Fisher(kind) for _ in range(5))
    for part in held:
        updated.update(part)
        merged.merge(Fisher(kind).update(part))
        back = Fisher(kind).update(part).merge(back)
        read.update(part).save(tmp_path / "fisher")
        read = Fisher.load(tmp_path / "fisher")
    streamed.update(Stream(held))
    for fisher in (updated, streamed, merged, back, read):
        assert fisher.count == len(whole)
        assert_near(fisher.quadratic(asked), expected, 2e-4)
    chosen = [fisher.with_damping("auto").quadratic(asked) for fisher in (streamed, merged, back, read)]
    for found in chosen:
        assert_near(found, updated.with_damping("auto").quadratic(asked).double(), 1e-3)
    if kind == "kronecker":
        inverse = oracle(exact(whole, top), kind)
        expected = (exact(asked, top).flat @ inverse * exact(asked, top).flat).sum(1)
        assert_near(merged.correct(Stream(held)).quadratic(asked), expected, 2e-4)
        merged.save(tmp_path / "fisher")
        assert_near(Fisher.load(tmp_path / "fisher").quadratic(asked), expected, 2e-4)


def test_a_correction_larger_than_the_sums() -> None:
    """It rescales them; their basis stays."""
    shapes, digest = {"fc": (3, 4)}, {"fc": "aa"}
    one = Gradients(make(60).flat[:, :12] / 1e3, shapes, digest)
    small, large = (Gradients((one.flat * size).float(), shapes, digest) for size in (1e-20, 1e12))
    expected = build_fisher(one, "kronecker").quadratic(one)
    assert_near(Fisher("kronecker").update(small).correct(large).quadratic(large), expected, 2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_before_and_beside(kind: FisherKind, tmp_path: Path) -> None:
    """Samples of zeros choose no scale; a layer of zeros solves to zero."""
    flat = sized(60, 1e-30).flat
    flat[:, 12:15] = 0  # "bias"
    train, zeros = Gradients(flat, SHAPES, DIGEST), Gradients(torch.zeros(40, 25), SHAPES, DIGEST)
    Fisher(kind).update(zeros).save(tmp_path / "zeros")
    fisher, other = Fisher.load(tmp_path / "zeros").update(train), Fisher(kind).update(train).update(zeros)
    assert_near(fisher.quadratic(train), other.quadratic(train).double(), 1e-5)
    if kind != "joint":
        assert fisher.solve(sized(3, 1.0))["bias"].eq(0).all()
    direct = exact(Gradients.cat([train, zeros]), 1e-30)
    assert_near(fisher.quadratic(train), Fisher(kind).update(direct).quadratic(exact(train, 1e-30)), 2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_usual_sizes_are_those_of_before(kind: FisherKind, tmp_path: Path) -> None:
    for size, written in ((1.0, False), (1e-30, True)):
        build_fisher(sized(60, size), kind).save(tmp_path / "fisher")
        with safe_open(tmp_path / "fisher", framework="pt") as file:
            header = json.dumps(file.metadata())
        assert ("exponent" in header) == written


@pytest.mark.parametrize("size", [1e-20, 1e20])
@pytest.mark.parametrize("n", [0, 8, 60])
@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_is_taken_back(kind: FisherKind, n: int, size: float) -> None:
    fisher = built(kind, n)
    before = state(fisher)
    with pytest.raises(OSError, match="shard"):
        fisher.update(Stream([sized(60, size), sized(60, size * 1e12)], OSError("a shard is gone")))
    assert state(fisher) == before


class Meeting:
    """Ranks of one process: a thread each, that hand their values to all."""

    def __init__(self, world: int) -> None:
        self.world, self.values, self.barrier = world, [None] * world, threading.Barrier(world, timeout=60)


class Rank:
    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.world, self.meeting = rank, meeting.world, meeting

    def everyone(self, value: Any) -> list[Any]:
        self.meeting.values[self.rank] = value
        self.meeting.barrier.wait()
        found = list(self.meeting.values)
        self.meeting.barrier.wait()
        return found

    def gather(self, x: Tensor) -> list[Tensor]:
        return self.everyone(x)

    def sum(self, x: Tensor) -> Tensor:
        return torch.stack(self.everyone(x)).sum(0)


def together(world: int, job: Callable[[Any], Fisher]) -> list[Fisher]:
    meeting, found = Meeting(world), dict[int, Fisher]()
    threads = [
        threading.Thread(target=lambda r=r: found.update({r: job(Rank(r, meeting))}), daemon=True) for r in range(world)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[r] for r in range(world)]


@pytest.mark.parametrize("sizes", [(1e-30, 1e-30), (1e-30, 1e12), (1e25, 1.0)])
@pytest.mark.parametrize("n", [2, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_of_very_different_size(kind: FisherKind, n: int, sizes: tuple[float, float]) -> None:
    """And a rank without samples."""
    parts = [sized(n, size, seed=i) for i, size in enumerate(sizes)]
    parts.append(parts[0][:0])

    def job(ranks: Any) -> Fisher:
        fisher = Fisher(kind).update(parts[ranks.rank]).all_reduce(parts[0], ranks)
        return fisher.correct_together(parts[ranks.rank], ranks) if kind == "kronecker" else fisher

    top, whole = max(sizes), Gradients.cat(parts)
    one = exact(whole, top)
    expected = (one.flat @ oracle(one, kind) * one.flat).sum(1)
    chosen = build_fisher(one, kind, "auto").quadratic(one)
    for fisher in together(3, job):
        assert fisher.count == 2 * n
        assert_near(fisher.quadratic(whole), expected, 2e-4)
        assert_near(fisher.with_damping("auto").quadratic(whole), chosen, 2e-4)
