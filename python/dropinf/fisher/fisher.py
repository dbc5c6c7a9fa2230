"""The Fisher matrix of compressed gradients: built in any order, merged, and solved with damping."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import checksum, plain_name, read_header, serialize, whole_number, write_whole
from ..gradients import Gradients, GradientSource, Shapes, block_rows, check_same_sketch, placed_blocks, share_of
from ..ranks import Ranks
from .blocks import Block, DiagonalBlock, Product, origins_of
from .cholesky import solver_dtype
from .damping import Damping, damping_number
from .dense import DenseBlock, Form
from .kronecker import KroneckerBlock
from .ledger import Ledger, all_or_none

FORMAT = "dropinf.fisher-1"
CPU = torch.device("cpu")
FisherKind = Literal["block", "joint", "diagonal", "kronecker"]


class Fisher:
    """`F = (1/N) sum_n c_n c_n^T` of compressed gradients, added up block by block.

    Args:
        kind: "block" (one block per layer), "joint" (one over all layers), "diagonal" (of each layer's
            block), or "kronecker" (Kronecker factors of each layer's block, K-FAC: Martens and Grosse 2015,
            arXiv 1503.05671; EK-FAC after `correct`: George et al. 2018, arXiv 1806.03884; a layer with one
            axis keeps its full block).
        damping: `lambda = damping * mean(diag F)` of each block. The larger it is, the closer scores come to
            plain dot products; raise it where N is small beside K, since F is then known badly. "auto" chooses it
            for each block from how much F varies between samples (Ledoit & Wolf 2004; see `ledoit_wolf`),
            without retraining anything.
        absolute: `lambda = damping` in every block instead.

    A dense block of N < K samples holds references to the rows that it was given, so do not change those
    gradients in place. Sums, factorizations and results are in at least fp32, each block's sums over a power of two
    of its own size. A layer whose training gradients are all zero solves to 0: it adds nothing to any score.

    Raises:
        ValueError: unknown kind; a damping that is negative, infinite or NaN.
    """

    def __init__(
        self,
        kind: FisherKind = "block",
        damping: float | Literal["auto"] = 0.1,
        absolute: bool = False,
        *,
        _form: Form | None = None,
    ) -> None:
        if kind not in get_args(FisherKind):
            raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(map(repr, get_args(FisherKind)))}")
        if damping == "auto":
            if absolute:
                raise ValueError('damping is "auto" and absolute is True; "auto" chooses a share of mean(diag F)')
        else:
            damping = damping_number(damping)
        self.kind: FisherKind = kind
        self.damping = damping
        self.absolute = absolute
        self._form = _form
        self._count = 0
        self.origins: tuple[tuple[str, str], ...] = ()  # of the gradients added, as `Gradients.origin`
        self._shapes: Shapes = {}
        self._digest: Mapping[str, str] = {}
        self._blocks: list[tuple[slice, Block]] = []  # columns and their block
        self._device = CPU
        self._ledger: Ledger | None = None  # of the last change of sums

    @property
    def count(self) -> int:
        """Number of samples added so far, N."""
        return self._count

    @property
    def shapes(self) -> Shapes:
        """Layer name -> per-sample shape, in column order; empty before the first update."""
        return self._shapes

    @property
    def digest(self) -> Mapping[str, str]:
        """Layer name -> hex digest of the sketch's tables."""
        return self._digest

    @property
    def device(self) -> torch.device:
        """The device of the first gradients, where the sums are and results come out."""
        return self._device

    def update(self, gradients: GradientSource) -> Fisher:
        """Add samples. Return self. Drop the factorization, and the correction of a Kronecker Fisher.

        All of them or none: whatever is raised in between, KeyboardInterrupt and MemoryError too, leaves every sum,
        count and field bit for bit as it was, and the call can be repeated. An interrupt in the last moment, when all
        samples are in, finds them added: `count` tells. Only a second interrupt, while sums are being put back, makes
        the Fisher unusable, and each later call says so. Beside the sums this takes a copy of the largest of them, as
        solving does, and 64 MiB.

        Raises:
            ValueError: compressed differently from the samples before.
        """
        with self._changing() as ledger:
            self._adopt(gradients, "fisher and gradients")
            for part in _parts(gradients):
                check_same_sketch(self, part, "fisher and gradients")
                self._count += len(part)
                for columns, block in self._blocks:
                    block.update(part.flat[:, columns].to(self._device), ledger)
        return self

    def merge(self, other: Fisher) -> Fisher:
        """Add the sums of another Fisher, of other samples. Return self. Keep self's damping.

        A Kronecker Fisher loses its correction, since its eigenbasis changes: call `correct` again. A merge that
        fails leaves self as it was, as `update` does.

        Raises:
            ValueError: another kind, or compressed differently.
        """
        if self.kind != other.kind:
            raise ValueError(
                f"other is a Fisher of kind {other.kind!r}; it must be {self.kind!r}, the kind merged into"
            )
        other._check_whole()
        if other.count == 0:
            return self
        with self._changing() as ledger:
            self._adopt(other, "fisher and other")
            self._count += other.count
            for (_, block), (_, theirs) in zip(self._blocks, other._blocks, strict=True):
                block.merge(theirs, ledger)
        return self

    def correct(self, gradients: GradientSource) -> Fisher:
        """Add samples to the EK-FAC eigenvalues of a Kronecker Fisher. Return self.

        This is a second pass over what `update` has seen, in as many calls as wanted. Without it the eigenvalues are
        K-FAC's products. A call that fails leaves self as it was, as `update` does.

        Raises:
            ValueError: another kind of Fisher, one without samples, or gradients compressed differently.
        """
        if self.kind != "kronecker":
            raise ValueError(f"kind is {self.kind!r}; only a Fisher of kind 'kronecker' has eigenvalues to correct")
        self.check(gradients)
        with self._changing() as ledger:
            self._adopt(gradients, "fisher and gradients")
            for part in _parts(gradients):
                for columns, block in self._blocks:
                    if isinstance(block, KroneckerBlock):
                        block.correct(part.flat[:, columns], ledger)
        return self

    def all_reduce(self, like: GradientSource, ranks: Ranks) -> Fisher:
        """Add up the sums of all ranks in place, each of its own samples; all ranks then hold the same. Return self.

        `like` gives the layers to a rank that had no samples.
        """
        self._check_whole()
        if ranks.world == 1:
            return self
        self._adopt(like, "fisher and index")
        self._count = int(ranks.sum(torch.tensor(self._count, device="cpu")))
        for _, block in self._blocks:
            block.all_reduce(ranks, solver_dtype(like.dtype))
        return self

    def correct_together(self, mine: GradientSource, ranks: Ranks) -> Fisher:
        """Correct with every rank's own samples, in the eigenbasis of rank 0. Return self.

        All ranks then hold the same.
        """
        blocks = [block for _, block in self._blocks if isinstance(block, KroneckerBlock)]
        if ranks.world > 1:
            for block in blocks:
                block.share_basis(ranks)
        self.correct(mine)
        if ranks.world > 1:
            for block in blocks:
                block.all_reduce_correction(ranks)
        return self

    def with_damping(self, damping: float | Literal["auto"], *, absolute: bool = False) -> Fisher:
        """Return a Fisher of the same sums with another damping: a sweep reads the training gradients once.

        Raises:
            ValueError: a damping that `Fisher` refuses.
        """
        self._check_whole()
        other = Fisher(self.kind, damping, absolute, _form=self._form)
        other._count, other._device, other.origins = self._count, self._device, self.origins
        other._shapes, other._digest = self._shapes, self._digest
        other._blocks = [(c, block.with_damping(Damping(damping, absolute))) for c, block in self._blocks]
        return other

    def solve(self, gradients: Gradients) -> Gradients:
        """Return `(F + lambda I)^{-1} c` for every sample, in at least fp32, with the same layers.

        In fp64 where a block of N < K samples is damped so little that products with its rows would be lost in fp32.

        Raises:
            ValueError: no samples were added; compressed differently; or a block whose gradients are not finite, or
                that is singular with this damping, by layer, with a damping that was seen to do.
        """
        self.check(gradients)
        flat = gradients.flat.to(self._device)
        solved = torch.empty_like(flat, dtype=self.result_dtype(flat.dtype, "solve"))
        for columns, block in self._blocks:
            solved[:, columns] = block.solve(flat[:, columns])
        return Gradients(solved, gradients.shapes, gradients.digest, gradients.origin)

    def quadratic(self, gradients: GradientSource) -> Tensor:
        """Return `c^T (F + lambda I)^{-1} c` for every sample, `[n]` in at least fp32.

        Streams the samples by row blocks; raises as `solve` does.
        """
        self.check(gradients)
        out = torch.zeros(len(gradients), dtype=solver_dtype(gradients.dtype), device=self._device)
        for at, part in placed_blocks(gradients, block_rows(gradients)):
            for columns, block in self._blocks:
                out[at] += block.quadratic(part.flat[:, columns].to(self._device))
        return out

    def whiten(self, gradients: Gradients) -> Gradients:
        """Return rows w(c), with `w(a) . w(b) = a^T (F + lambda I)^{-1} b`; raises, and chooses fp64, as `solve` does.

        Any inner-product search takes these rows; `|w(c)|^2` is a sample's self-influence.
        """
        self.check(gradients)
        flat = gradients.flat.to(self._device)
        white = torch.empty_like(flat, dtype=self.result_dtype(flat.dtype, "whiten"))
        for columns, block in self._blocks:
            white[:, columns] = block.whiten(flat[:, columns])
        return Gradients(white, gradients.shapes, gradients.digest, gradients.origin)

    def result_dtype(self, dtype: torch.dtype, what: Product = "solve") -> torch.dtype:
        """Return the dtype that `solve` or `whiten` gives for gradients of a dtype."""
        return reduce(torch.promote_types, (b.result_dtype(dtype, what) for _, b in self._blocks), solver_dtype(dtype))

    def to_bytes(self) -> bytes:
        """Return the sums as a safetensors file; a dense block of N < K samples is written as its N rows."""
        self._check_whole()
        states = [block.state() for _, block in self._blocks]
        tensors = {f"{i}.{name}": tensor for i, (_, held) in enumerate(states) for name, tensor in held.items()}
        header = {
            "format": FORMAT,
            "kind": self.kind,
            "damping": self.damping,
            "absolute": self.absolute,
            "count": self.count,
            "origins": self.origins,
            "layers": [[name, shape, self.digest[name]] for name, shape in self.shapes.items()],
            "blocks": [plain for plain, _ in states],
        }
        return serialize(tensors, header)

    def save(self, path: str | os.PathLike[str]) -> str:
        """Write the sums to a safetensors file, complete once it has its name, and return its checksum."""
        data = self.to_bytes()
        write_whole(Path(path), data)
        return checksum(data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Fisher:
        """Read a file that `save` wrote; its sums can be added to.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another kind of file, or a damaged one.
        """
        path = Path(path)
        try:
            with plain_name(path) as name, safe_open(name, framework="pt") as file:
                header = read_header(file.metadata(), path, FORMAT)
                try:
                    return cls.read(header, file.get_tensor)
                except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
                    raise ValueError(f"{path}: its header is damaged ({error}); save it again") from error
        except SafetensorError as error:
            raise ValueError(f"{path}: truncated or damaged ({error}); save it again") from error

    @classmethod
    def read(cls, header: Mapping[str, Any], tensor: Callable[[str], Tensor], device: torch.device = CPU) -> Fisher:
        """Return what `to_bytes` wrote, its tensors on `device`; what it did not write raises errors of many kinds."""
        if isinstance(header["damping"], bool) or not isinstance(header["absolute"], bool):
            raise ValueError(f"damping is {header['damping']!r}, absolute {header['absolute']!r}")
        fisher = cls(header["kind"], header["damping"], header["absolute"])
        shapes, digest = {}, {}
        for name, shape, found in header["layers"]:
            if not (isinstance(name, str) and isinstance(found, str)) or name in shapes or len(shape) not in (1, 2):
                raise ValueError(f"a layer is {name!r}, {shape!r}, {found!r}")
            shapes[name], digest[name] = tuple(whole_number(size, "a size", 1) for size in shape), found
        fisher._lay_out(shapes, digest)
        fisher._count, fisher._device = whole_number(header["count"], "count", 0), device
        fisher.origins = tuple((str(model), str(loss)) for model, loss in header.get("origins", ()))
        for i, ((_, block), plain) in enumerate(zip(fisher._blocks, header["blocks"], strict=True)):
            block.load_state(plain, fisher.count, lambda name, i=i: tensor(f"{i}.{name}"))  # type: ignore[misc]
        return fisher

    def check(self, gradients: GradientSource, what: str = "fisher and gradients") -> None:
        """Raise ValueError if no samples were added, or if `gradients` were compressed differently.

        `what` names both in the message, as in `check_same_sketch`.
        """
        self._check_whole()
        if self._count == 0:
            raise ValueError("fisher has no samples; call fisher.update(train), or use build_fisher(train)")
        check_same_sketch(self, gradients, what)

    def __repr__(self) -> str:
        damping = f"damping={Damping(self.damping)}" + (", absolute=True" if self.absolute else "")
        return f"Fisher({self.kind!r}, {damping}, {self._count} samples, {len(self._blocks)} blocks, {self._device})"

    @contextmanager
    def _changing(self) -> Iterator[Ledger]:
        """Run what changes the sums inside: all of them, or none."""
        self._check_whole()
        with all_or_none(self, *(block for _, block in self._blocks)) as ledger:
            self._ledger = ledger
            yield ledger

    def _check_whole(self) -> None:
        if self._ledger is not None and self._ledger.open:
            raise RuntimeError(
                "fisher: it was interrupted while its sums were being put back (or another thread is adding to it), so "
                "they are not those of any samples; build it again, or load it from a file"
            )

    def _adopt(self, source: GradientSource | Fisher, what: str) -> None:
        """Take the layout of the first source; check every later one against it."""
        self.origins = tuple(sorted({*self.origins, *origins_of(source)}))
        if self._blocks:
            check_same_sketch(self, source, what)
            return
        self._device = source.device
        self._lay_out(source.shapes, source.digest)

    def _lay_out(self, shapes: Shapes, digest: Mapping[str, str]) -> None:
        self._shapes, self._digest = shapes, digest
        damping = Damping(self.damping, self.absolute)
        if self.kind == "joint":
            width = sum(map(math.prod, self._shapes.values()))
            self._blocks = [(slice(0, width), DenseBlock("all layers", width, damping, self._form))]
            return
        start = 0
        for name, shape in self._shapes.items():
            width = math.prod(shape)
            self._blocks.append((slice(start, start + width), self._block(name, shape, damping)))
            start += width

    def _block(self, name: str, shape: tuple[int, ...], damping: Damping) -> Block:
        if self.kind == "diagonal":
            return DiagonalBlock(name, math.prod(shape), damping)
        if self.kind == "kronecker" and len(shape) == 2:
            return KroneckerBlock(name, (shape[0], shape[1]), damping)
        return DenseBlock(name, math.prod(shape), damping, self._form)


def build_fisher(
    train: GradientSource,
    kind: FisherKind = "block",
    damping: float | Literal["auto"] = 0.1,
    *,
    absolute: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Fisher:
    """Return the Fisher matrix of the training gradients; see `Fisher` for the arguments.

    "kronecker" takes two passes over `train`: the factors, then the corrected eigenvalues (EK-FAC). `group`: ranks of
    `torch.distributed` that share the work, each with the same index; every rank gets the whole matrix.

    Raises:
        ValueError: `train` is empty, or an argument that `Fisher` refuses.
    """
    fisher = Fisher(kind, damping, absolute)
    if len(train) == 0:
        raise ValueError("train has 0 samples; a Fisher matrix needs at least 1")
    ranks = Ranks(group)
    mine = share_of(train, ranks.rank, ranks.world)
    fisher.update(mine).all_reduce(train, ranks)
    return fisher.correct_together(mine, ranks) if kind == "kronecker" else fisher


def _parts(source: GradientSource) -> Iterator[Gradients]:
    """Yield the samples in memory-sized parts; in-memory gradients whole, so that dual rows stay views."""
    yield from (source,) if isinstance(source, Gradients) else (p for _, p in placed_blocks(source, block_rows(source)))
