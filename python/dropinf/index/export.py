"""Rows of an index in the files of other search tools, written block by block."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..files import SUFFIX, array_file, new_array, plain_name, replacing
from ..fisher.fisher import Fisher
from ..gradients import Gradients, GradientSource, block_rows
from ..gradients import Rows as Selected
from ..origin import check_one_model
from .folder import CODE, FISHER, PARTS, PASSAGES, PROBE, SHARDS, SKETCH
from .kept import NEW_FISHER
from .manifest import NAME
from .order import ORDER_NAME

FAISS = ".faiss"
IDS = ".ids"
_ROWS_PER_CENTROID = 256  # more are not read when centroids are searched for
_CENTROIDS = 256  # of a product quantizer of 8 bits


class Rows(Protocol):
    """The rows to write: blocks in order, and any of them by position."""

    def blocks(self) -> Iterable[tuple[int, Tensor]]: ...
    def at(self, positions: Tensor) -> Tensor: ...


def check_beside(out: str | os.PathLike[str], folder: Path) -> None:
    """Raise ValueError for the name of a file of the index in ``folder``, or of one in its place, as a link may be."""
    given, final = Path(out).parent.resolve() / Path(out).name, Path(out).resolve()
    names = (NAME, SKETCH, CODE, FISHER, PASSAGES, PROBE, ".lock")
    kept = {(folder / name).resolve() for name in names}  # links of the index's own among them
    inside = {(folder / part).resolve() for part in (SHARDS, PARTS)}
    own = given.name in names or ORDER_NAME.fullmatch(given.name) or NEW_FISHER.fullmatch(given.name)
    if final in kept or {given.parent, final.parent} & inside or (given.parent == folder.resolve() and own):
        raise ValueError(f"out is {os.fspath(out)!r}, a file of the index itself; name a file beside it")


def check_outside(out: str | os.PathLike[str], *sources: object) -> None:
    """Raise ValueError for the name of a file of an index among ``sources``."""
    for source in sources:
        folder = getattr(source, "path", None)
        if folder is not None:
            check_beside(out, folder)


def check_out(out: str | os.PathLike[str], factory: str | None, folder: Path) -> None:
    """Raise ValueError for a name that says no known kind of file or one of an index's own files in its ``folder``, or
    for a factory that has no use for it."""
    suffix = Path(out).suffix
    if suffix not in (".npy", SUFFIX, FAISS):
        raise ValueError(f"out is {os.fspath(out)!r}; it must end in .npy, {SUFFIX} or {FAISS}")
    check_beside(out, folder)
    if factory is not None and suffix != FAISS:
        raise ValueError(f"factory is {factory!r}; it is of a {FAISS} file, and out is {os.fspath(out)!r}")
    if suffix == FAISS:
        _faiss()


@dataclass(frozen=True)
class Export:
    """A file of `count` rows of `width` numbers; `memory_bytes` is what may be held of them."""

    out: str | os.PathLike[str]
    count: int
    width: int
    dtype: torch.dtype
    memory_bytes: int
    factory: str | None = None
    bits: int | None = None  # of a coordinate; None: rows are no codes

    def write(self, rows: Rows, ids: Iterable[str]) -> None:
        """Write the file, and then the ids of its rows beside it: never those of another file."""
        beside = Path(f"{os.fspath(self.out)}{IDS}")
        with replacing(beside) as temporary:
            with open(temporary, "w", encoding="utf-8") as lines:
                lines.writelines(json.dumps(name) + "\n" for name in ids)
            self._write_rows(rows, beside)

    def _write_rows(self, rows: Rows, beside: Path) -> None:
        """Write the rows. What is ``beside`` goes just before they get their name: a kill there leaves no other ids."""
        if Path(self.out).suffix != FAISS:
            with new_array(self.out, (self.count, self.width), self.dtype) as file:
                for offset, part in rows.blocks():
                    file.write(offset, 0, part)
                beside.unlink(missing_ok=True)
        elif self.factory is None and self.bits is not None:
            self._write_bits(rows, beside)
        elif self.factory in (None, "Flat") and (header := self._flat_header()) is not None:
            with array_file(self.out, header, (self.count, self.width), torch.float32) as file:
                for offset, part in rows.blocks():
                    file.write(offset, 0, part.float())
                beside.unlink(missing_ok=True)
        else:
            self._write_coded(rows, beside)

    def _write_bits(self, rows: Rows, beside: Path) -> None:
        """Write FAISS's own index of rows of one bit, whose codes and scales are these rows'."""
        faiss = _faiss()
        if self.bits != 1 or not hasattr(faiss, "IndexRaBitQ"):
            raise ValueError(
                f"out is {os.fspath(self.out)!r}: FAISS {faiss.__version__} would choose other codes of "
                f"{self.bits} bits than these; pass a factory, or name an .npy file"
            )
        coded = faiss.IndexRaBitQ(self.width, faiss.METRIC_INNER_PRODUCT)
        coded.train(torch.zeros(1, self.width, device="cpu").numpy())  # codes are of the rows themselves, not of
        coded.qb = 0  # their distance to a center; and queries stay float
        self._check_size(coded)
        self._add(coded, rows, beside)

    def _flat_header(self) -> bytes | None:
        """Return what stands before the rows of a flat FAISS file; None where FAISS writes it in another way."""
        faiss = _faiss()

        def header(count: int) -> bytes:
            empty = bytearray(faiss.serialize_index(faiss.IndexFlatIP(self.width)).tobytes())
            empty[8:16] = count.to_bytes(8, "little")
            empty[-8:] = (count * self.width).to_bytes(8, "little")
            return bytes(empty)

        two = faiss.IndexFlatIP(self.width)
        two.add(torch.ones(2, self.width, device="cpu").numpy())
        expected = faiss.serialize_index(two).tobytes()
        return (
            header(self.count)
            if header(2) + torch.ones(2, self.width, device="cpu").numpy().tobytes() == expected
            else None
        )

    def _write_coded(self, rows: Rows, beside: Path) -> None:
        """Train an index on a random part of the rows, add all of them, and write it."""
        coded = self._made()
        self._check_size(coded)
        if not coded.is_trained:
            part = rows.at(self._chosen(coded)).float()
            try:
                coded.train(part.numpy())
            except RuntimeError as error:
                raise ValueError(
                    f"factory: FAISS cannot train {self.factory!r} on {len(part)} of {self.count} rows "
                    f"({_reason(error)}); name fewer lists or bits, or open the index with more memory_bytes"
                ) from None
            del part
        self._add(coded, rows, beside)

    def _add(self, coded: Any, rows: Rows, beside: Path) -> None:
        """Add all rows to an index of FAISS, and write it."""
        faiss = _faiss()
        for _, block in rows.blocks():
            coded.add(block.float().numpy())
        with replacing(self.out) as temporary:
            temporary.touch()
            with plain_name(temporary) as name:
                faiss.write_index(coded, name)
            beside.unlink(missing_ok=True)

    def _made(self) -> Any:
        faiss = _faiss()
        try:
            return faiss.index_factory(
                self.width, "Flat" if self.factory is None else self.factory, faiss.METRIC_INNER_PRODUCT
            )
        except RuntimeError as error:
            raise ValueError(
                f"factory: FAISS makes no {self.factory!r} of {self.width} columns ({_reason(error)})"
            ) from None

    def _check_size(self, coded: Any) -> None:
        """Raise ValueError where the codes, which stay in memory until they are written, take too much."""
        try:
            size = coded.sa_code_size()
        except RuntimeError:
            size = 4 * self.width
        need = 4 * self.count * (size + 8)  # with its number; lists grow by doubling
        if need > self.memory_bytes:
            raise ValueError(
                f"factory: {self.factory!r} holds {size} bytes a row in memory until it is written; open the index "
                f"with memory_bytes={need}, or name a smaller code (it has {self.memory_bytes})"
            )

    def _chosen(self, coded: Any) -> Tensor:
        """Return random positions to train on, in order: as many as are of use, and as memory has room for."""
        ivf = _faiss().try_extract_index_ivf(coded)
        useful = _ROWS_PER_CENTROID * max(_CENTROIDS, 0 if ivf is None else ivf.nlist)
        most = max(1, min(useful, self.memory_bytes // 8 // (4 * self.width)))
        if most >= self.count:
            return torch.arange(self.count, device="cpu")
        chosen = torch.randint(self.count, (most,), generator=torch.Generator().manual_seed(0), device="cpu")
        ordered: Tensor = torch.unique(chosen, sorted=True)
        return ordered


class Indexed(GradientSource, Protocol):
    """Samples that are also read by their positions."""

    def __getitem__(self, rows: Selected) -> Gradients: ...


@dataclass(frozen=True)
class White:
    """The rows of an index, whitened; without a Fisher matrix, as they are."""

    index: Indexed
    fisher: Fisher | None

    def __post_init__(self) -> None:
        if self.fisher is not None:
            check_one_model([self.fisher, self.index], ["fisher", "index"], "Use build_fisher(index)")

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        for offset, part in self.index.blocks(block_rows(self.index)):
            yield offset, self._whitened(part)

    def at(self, positions: Tensor) -> Tensor:
        """Return the rows at ordered positions."""
        parts = near(positions, block_rows(self.index))
        return torch.cat([self._whitened(self.index[part]).float() for part in parts])

    def _whitened(self, part: Gradients) -> Tensor:
        return part.flat if self.fisher is None else self.fisher.whiten(part).flat


def near(positions: Tensor, rows: int) -> Iterator[Tensor]:
    """Yield ordered positions in parts, each within `rows` neighbours."""
    _, sizes = torch.unique_consecutive(positions // rows, return_counts=True)
    yield from positions.split(sizes.tolist())


def _reason(error: RuntimeError) -> str:
    """Return what FAISS says, without the place in its source."""
    text = " ".join(str(error).split())
    return text.partition("failed: ")[2] or text.rpartition(".cpp:")[2].partition(": ")[2] or text


def _faiss() -> Any:
    try:
        import faiss
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "out: a .faiss file needs faiss; install it with: pip install 'dropinf[faiss]'", name="faiss"
        ) from None
    return faiss
