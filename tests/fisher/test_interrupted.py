"""What fails while samples are added to a Fisher leaves it bit for bit as it was, and does not double its memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dropinf.fisher import Fisher, FisherKind, blocks, dense, kronecker, ledger
from dropinf.gradients import Gradients, Shapes

SHAPES: Shapes = {"fc": (3, 4), "bias": (3,), "head": (2, 5)}
DIGEST = {"fc": "aa", "bias": "bb", "head": "cc"}
KINDS: list[FisherKind] = ["block", "joint", "diagonal", "kronecker"]
SIZES = [0, 8, 60]  # none before; between the widths, above all of them


class Planted(Exception):  # noqa: N818
    """What no code expects."""


def make(n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Gradients:
    generator = torch.Generator().manual_seed(seed)
    return Gradients(torch.randn(n, 25, generator=generator).to(dtype), SHAPES, DIGEST)


def built(kind: FisherKind, n: int) -> Fisher:
    fisher = Fisher(kind)
    if n:
        fisher.update(make(n))
        if kind == "kronecker":
            fisher.correct(make(n))
        fisher.solve(make(3, seed=5))  # caches are fields too
    return fisher


def state(value: Any) -> Any:
    """What a Fisher holds, down to the bits of its tensors and the objects that are its blocks."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().view(torch.uint8).numpy().tobytes()
    if isinstance(value, (list, tuple)):
        return [state(v) for v in value]
    if isinstance(value, dict):
        return {name: state(v) for name, v in value.items() if name != "_ledger"}
    if isinstance(value, (Fisher, blocks.Block, dense.Cholesky)):
        return id(value), state(vars(value))
    return repr(value)


class Faulty:
    """Stands for an op: does it for some calls, then does half of it and raises."""

    def __init__(self, op: Callable[..., Any], calls: int, error: type[BaseException]) -> None:
        self.op, self.left, self.error = op, calls, error

    def __call__(self, *args: Any) -> Any:
        self.left -= 1
        if self.left == -1:
            if isinstance(args[0], Tensor):
                args[0][: len(args[0]) // 2] = 7  # torn
            raise self.error
        return self.op(*args)


def plant(patch: pytest.MonkeyPatch, kind: FisherKind, calls: int, error: type[BaseException]) -> None:
    if kind == "diagonal":
        add = Faulty(blocks.DiagonalBlock._add, calls, error)
        patch.setattr(blocks.DiagonalBlock, "_add", lambda self, squares: add(self, squares))
        return
    module = kronecker if kind == "kronecker" else dense
    patch.setattr(module, "gram_update", Faulty(module.gram_update, calls, error))


class Stream:
    """A source that is read in parts, and may fail between them."""

    def __init__(self, parts: list[Gradients], error: BaseException | None = None) -> None:
        self.parts, self.error = parts, error
        self.shapes, self.digest = parts[0].shapes, parts[0].digest
        self.dtype, self.device = parts[0].dtype, parts[0].device

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def blocks(self, rows: int) -> Iterator[tuple[int, Gradients]]:
        offset = 0
        for part in self.parts:
            yield offset, part
            offset += len(part)
        if self.error is not None:
            raise self.error


@pytest.fixture(params=[0, ledger.HELD_BYTES], ids=["triangles", "copies"])
def held(request, monkeypatch):
    """Both ways in which a sum is kept."""
    monkeypatch.setattr(ledger, "HELD_BYTES", request.param)
    monkeypatch.setattr(ledger, "_TILE", 4)  # several, for matrices as small as these


@pytest.mark.parametrize(("calls", "error"), [(0, MemoryError), (1, KeyboardInterrupt), (2, Planted)])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_op_that_raises(kind, n, calls, error, held, monkeypatch):
    fisher, same = built(kind, n), built(kind, n)
    parts = [make(40, seed=1), make(30, seed=2), make(3, seed=3)]
    before = state(fisher)
    with monkeypatch.context() as patch:
        plant(patch, kind, calls, error)
        with pytest.raises(error):
            fisher.update(Stream(parts))
    assert state(fisher) == before
    fisher.update(Stream(parts))
    for part in parts:
        same.update(part)
    query = make(5, seed=9)
    assert torch.equal(fisher.solve(query).flat, same.solve(query).flat)
    assert fisher.count == n + 73


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_source_that_fails_between_its_parts(kind, n, held):
    fisher, parts = built(kind, n), [make(40, seed=1), make(30, seed=2)]
    before = state(fisher)
    with pytest.raises(OSError, match="shard"):
        fisher.update(Stream(parts, OSError("a shard is gone")))
    assert state(fisher) == before
    wrong = Gradients(parts[1].flat, SHAPES, {**DIGEST, "head": "zz"})
    with pytest.raises(ValueError, match="fisher and gradients differ: layer 'head'"):
        fisher.update(Stream([parts[0], wrong]))
    narrow = Gradients(parts[1].flat[:, :15].contiguous(), {"fc": (3, 4), "bias": (3,)}, {"fc": "aa", "bias": "bb"})
    with pytest.raises(ValueError, match="layer 'head' is in fisher but missing from gradients"):
        fisher.update(Stream([parts[0], narrow]))
    assert state(fisher) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_other_dtypes(kind, dtype, held, monkeypatch):
    """Sums that an update widens are those of before where it fails."""
    fisher = built(kind, 60)
    before = state(fisher)
    with pytest.raises(OSError, match="shard"):
        fisher.update(Stream([make(40, seed=1, dtype=dtype), make(40, seed=2)], OSError("a shard is gone")))
    assert state(fisher) == before


@pytest.mark.parametrize("kind", KINDS)
def test_signed_zeros_infinities_and_nans_come_back(kind, held):
    """Sums are taken back by bits, not by arithmetic."""
    flat = make(60).flat.clone()
    flat[:, 1], flat[:, 2], flat[3, 5], flat[4, 6] = -0.0, 1e30, torch.inf, torch.nan
    fisher = Fisher(kind).update(Gradients(flat, SHAPES, DIGEST))
    for _, block in fisher._blocks:
        for total in vars(block).values():
            if isinstance(total, Tensor) and total.ndim == 2:
                total[0, 1] = total[1, 0] = -0.0
    before = state(fisher)
    with pytest.raises(OSError, match="shard"):
        fisher.update(Stream([make(40, seed=1)], OSError("a shard is gone")))
    assert state(fisher) == before


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", ["block", "joint", "kronecker"])
def test_a_merge_that_raises(kind, n, held, monkeypatch):
    fisher, other, same = built(kind, n), built(kind, 60), built(kind, n)
    before, theirs = state(fisher), state(other)
    calls, add = [0], ledger.Ledger.add

    def failing(*args):
        calls[0] += 1
        if calls[0] == 1 + (kind != "joint"):
            raise KeyboardInterrupt
        return add(*args)

    with monkeypatch.context() as patch:
        patch.setattr(ledger.Ledger, "add", failing)
        with pytest.raises(KeyboardInterrupt):
            fisher.merge(other)
    assert state(fisher) == before
    assert state(other) == theirs
    query = make(5, seed=9)
    assert torch.equal(fisher.merge(other).solve(query).flat, same.merge(other).solve(query).flat)


def test_a_correction_that_raises():
    fisher = built("kronecker", 60)
    before = state(fisher)
    with pytest.raises(OSError, match="shard"):
        fisher.correct(Stream([make(40, seed=1)], OSError("a shard is gone")))
    assert state(fisher) == before


def test_an_interrupt_while_sums_are_put_back_says_so(held, monkeypatch):
    fisher = built("block", 60)

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ledger.Ledger, "take_back", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fisher.update(Stream([make(40, seed=1)], OSError("a shard is gone")))
    query = make(5, seed=9)
    uses = [fisher.update, fisher.solve, fisher.quadratic, fisher.whiten, Fisher().merge, lambda _: fisher.save("no")]
    for use in uses:
        with pytest.raises(RuntimeError, match=r"interrupted while its sums were being put back.*build it again"):
            use(fisher if use == uses[4] else query)
    with pytest.raises(RuntimeError, match="build it again"):
        fisher.with_damping(0.3)


def test_an_interrupt_once_all_is_in_finds_it_added(held, monkeypatch):
    fisher, same, close = built("block", 60), built("block", 60), ledger.Ledger.close
    left = [1]

    def interrupted(self):
        if left[0]:
            left[0] = 0
            raise KeyboardInterrupt
        close(self)

    with monkeypatch.context() as patch:
        patch.setattr(ledger.Ledger, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fisher.update(make(40, seed=1))
    query = make(5, seed=9)
    assert fisher.count == 100
    assert torch.equal(fisher.solve(query).flat, same.update(make(40, seed=1)).solve(query).flat)


def test_memory(monkeypatch):
    """Beside the sums, an update holds a copy of one of them, not of all."""
    shapes: Shapes = {f"layer{i}": (100,) for i in range(8)}
    digest = dict.fromkeys(shapes, "a")
    train = Gradients(torch.randn(200, 800), shapes, digest)
    fisher = Fisher("block").update(train)
    monkeypatch.setattr(ledger, "HELD_BYTES", 0)
    seen, update = [], dense.gram_update

    def measured(*args):
        book = fisher._ledger
        assert book is not None
        copies = [b for _, b in book._copies.values()] + [b for _, b in book._halves.values()]
        seen.append(sum(t.nbytes for t in copies) + (0 if book._changing is None else book._changing[1].nbytes))
        update(*args)

    monkeypatch.setattr(dense, "gram_update", measured)
    fisher.update(train)
    assert len(seen) == 8
    assert max(seen) <= 4 * 100 * (100 + 8)
    assert fisher._ledger is not None
    assert [fisher._ledger._halves, fisher._ledger._copies, fisher._ledger._fresh] == [{}, {}, {}]


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_those_of_changes_in_place(kind, held):
    """Keeping what was before changes no bit of what becomes."""
    fisher, plain = built(kind, 60), built(kind, 60)
    parts = [make(40, seed=1), make(30, seed=2), make(3, seed=3)]
    fisher.update(Stream(copy.copy(parts)))
    for part in parts:
        for columns, block in plain._blocks:
            block.update(part.flat[:, columns], Unguarded())
    found, expected = ([state(vars(b)) for _, b in f._blocks] for f in (fisher, plain))
    assert found == expected


class Unguarded(ledger.Ledger):
    def change(self, total: Tensor, change: Callable[[], object]) -> None:
        change()


def test_a_change_may_read_either_triangle(held):
    total = torch.arange(100.0).view(10, 10)
    total += total.T.clone()
    expected, book = total.clone(), ledger.Ledger()
    for _ in range(3):
        book.change(total, lambda: total.copy_(total.T + 1))
    book.close()
    assert torch.equal(total, expected + 3)
