"""Rows of few bits in an index: what makes them of a compressor's rows, and the file that keeps it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..files import checksum, is_whole
from ..fisher.bits import BitCode
from ..gradients import Gradients
from ..loss_name import is_same_loss
from ..origin import Origin, check_one_model, difference
from ..ranks import Ranks
from ..workload import CuSeqlens
from .folder import CODE, write_whole
from .manifest import Manifest
from .source import RowSource


class Coded:
    """A source of rows that are whitened, cut and rotated by a `BitCode`, as few bits are kept of them.

    Raises ValueError where the code is of another sketch, or of another model.
    """

    def __init__(self, source: RowSource, bit_code: BitCode) -> None:
        bit_code.check(_Rows(source), "code and compressor")
        check_its_origin(bit_code, source.origin(), "compressor")
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


def check_one_code(ranks: Ranks, code: BitCode) -> None:
    """Raise ValueError where a rank would score rows of another code than rank 0."""
    every = ranks.everyone(dict(code.digest))
    odd = [rank for rank, found in enumerate(every) if found != every[0]]
    if odd:
        raise ValueError(
            f"group: rank {odd[0]} has an index of another code than rank 0; every rank must pass the same index"
        )


def queries_of(code: BitCode, query: Gradients, *, other_model: bool = False) -> Gradients:
    """Return what queries multiply rows of few bits with, where the queries are: the products are influence scores.

    Raises:
        ValueError: queries of another sketch, or of another model unless ``other_model``.
    """
    code.check(query, "train and query")
    if not other_model:
        check_one_model([query, _Fitted(code.origins)], ["query", "train"], "Compress both with one model")
    return code.queries(query)


class _Fitted(NamedTuple):
    """What a code was fitted to, as a Fisher matrix says it."""

    origins: tuple[tuple[str, str], ...]


class _Rows:
    """The layers of a source, as gradients have them."""

    def __init__(self, source: RowSource) -> None:
        self.shapes, self.digest = source.shapes, source.digest()


def check_its_origin(code: BitCode, origin: Origin | None, what: str) -> None:
    """Raise ValueError where a code is known to be fitted to gradients of another model or loss than ``what``'s."""
    way_out = "Use the model and the loss that the code was fitted with, or fit another, and name a new folder"
    if origin is None:
        return
    for model, loss in code.origins:
        found = difference(model, origin.model)
        if found is not None:
            raise ValueError(f"code and {what} are of different models: {found}. {way_out}")
        if loss and not is_same_loss(origin.loss, loss):
            raise ValueError(f"code and {what} are of different losses: {loss} and {origin.loss}. {way_out}")


def write_code(source: RowSource, folder: Path) -> str | None:
    """Write what makes rows of few bits into an index's folder and return its checksum; None for other rows."""
    if not isinstance(source, Coded):
        return None
    data = source.bit_code.to_bytes()
    write_whole(folder / CODE, data)
    return checksum(data)


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
