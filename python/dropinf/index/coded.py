"""Rows of few bits in an index: what makes them of a compressor's rows, and the file that keeps it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import file_checksum, is_whole
from ..fisher.bits import BitCode
from ..gradients import Gradients, check_same_sketch
from ..origin import Origin, check_one_model
from ..workload import CuSeqlens
from .folder import CODE, write_whole
from .manifest import Manifest
from .source import RowSource


class Coded:
    """A source of rows that are whitened, cut and rotated by a `BitCode`, as few bits are kept of them.

    Raises ValueError where the code is of another sketch, or of another model.
    """

    def __init__(self, source: RowSource, bit_code: BitCode) -> None:
        rows = _Rows(source)
        check_same_sketch(bit_code.fisher, rows, "code and compressor")
        check_one_model([bit_code.fisher, rows], ["code", "compressor"], "Fit a code to rows of this model")
        self.source, self.bit_code = source, bit_code

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.bit_code.shapes

    @property
    def is_sharded(self) -> bool:
        return self.source.is_sharded

    @property
    def cu_seqlens(self) -> CuSeqlens | None:
        return self.source.cu_seqlens

    def digest(self) -> Mapping[str, str]:
        """Return the fingerprint of what makes the rows."""
        return self.bit_code.digest

    def fingerprint(self) -> str:
        """Return a checksum of the model's weights."""
        return self.source.fingerprint()

    def origin(self) -> Origin:
        """Return what makes the gradients."""
        return self.source.origin()

    def loss_name(self) -> str:
        """Return by what losses are told apart."""
        return self.source.loss_name()

    def version(self) -> int:
        """Return a number that changes where parameters are written to."""
        return self.source.version()

    def code(self) -> dict[str, str]:
        """Return checksums of what else the model computes with."""
        return self.source.code()

    def losses(self, batch: Any) -> list[float]:
        """Return a batch's losses, or none where they are random."""
        return self.source.losses(batch)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the masks."""
        self.source.save(path)

    def stream(
        self,
        batches: Iterable[Any],
        take: Callable[[Tensor], None],
        *,
        progress: bool = False,
        where: Callable[[int], str] | None = None,
    ) -> None:
        """Call ``take`` with each batch's rotated rows [n, K]."""
        shapes, digest = self.source.shapes, self.source.digest()

        def turned(flat: Tensor) -> None:
            take(self.bit_code.rows(Gradients(flat, shapes, digest)).flat)

        self.source.stream(batches, turned, progress=progress, where=where)


def check_few_bits(fisher: object, kind: str, by: object) -> None:
    """Raise ValueError for scores that rows of few bits do not have."""
    if fisher is not None:
        raise ValueError("fisher: train has rows of few bits, which were whitened by that of their code; leave it out")
    if kind != "influence":
        raise ValueError(f"kind is {kind!r}; rows of few bits have kind='influence' alone")
    if by not in (None, "source"):
        raise ValueError(f"by is {by!r}; rows of few bits are turned over all layers, and have by='source' alone")


def queries_of(code: BitCode, query: Gradients, *, other_model: bool = False) -> Gradients:
    """Return what queries multiply rows of few bits with, where the queries are: the products are influence scores.

    Raises:
        ValueError: queries of another sketch, or of another model unless ``other_model``.
    """
    check_same_sketch(query, code.fisher, "query and train")
    if not other_model:
        check_one_model([query, code.fisher], ["query", "train"], "Compress both with one model")
    return code.queries(query)


class _Rows:
    """The layers of a source and their origin, as gradients have them."""

    def __init__(self, source: RowSource) -> None:
        self.shapes, self.digest, self.origin = source.shapes, source.digest(), source.origin()


def write_code(source: RowSource, folder: Path) -> str | None:
    """Write what makes rows of few bits into an index's folder and return its checksum; None for other rows."""
    if not isinstance(source, Coded):
        return None
    write_whole(folder / CODE, source.bit_code.to_bytes())
    return file_checksum(folder / CODE)


def write_code_again(source: RowSource, folder: Path, manifest: Manifest) -> None:
    """Write it again where its file is damaged or lost."""
    known = manifest.files.get(CODE)
    if known is not None and isinstance(source, Coded) and not is_whole(folder / CODE, known):
        write_code(source, folder)


def load_code(folder: Path, manifest: Manifest) -> BitCode | None:
    """Return what made an index's rows of few bits; None for other rows.

    Raises:
        ValueError: its file is missing or damaged.
    """
    known = manifest.files.get(CODE)
    if known is None:
        return None
    if not is_whole(folder / CODE, known):
        raise ValueError(f"{folder / CODE}: missing, or damaged: its bytes do not match their checksum; restore it")
    return BitCode.load(folder / CODE)
