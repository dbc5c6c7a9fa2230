"""Compressed gradients on disk: a manifest and shards of rows, read in blocks, checked before use."""

from __future__ import annotations

import bisect
import copy
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..fisher.bits import BitCode
from ..fisher.fisher import Fisher
from ..gradients import At, Gradients, Rows, Shapes, check_rows, positions_of
from ..origin import Origin
from ..ranks import Ranks
from .ahead import read_ahead, smaller
from .coded import load_code
from .compact import compact
from .discard import discard
from .export import Export, White, check_out
from .folder import locked
from .kept import load_fisher, save_fisher
from .manifest import Manifest, ShardEntry
from .order import opened, runs_of, windows_of
from .products import Stored
from .requantize import requantize
from .shards import READ_BYTES, SMALL_BYTES, Room
from .sound import verify
from .stored import StoredRows

MEMORY_BYTES = 1 << 28
_LEAST_ROWS = 64  # of a block: fewer make a slow product
_GAP_BYTES = 1 << 16  # between rows that are read as one: no slower than to read twice
T = TypeVar("T")


class Index(StoredRows):
    """The compressed gradients of N samples in a folder, made by ``Compressor.compress(batches, out=path)``.

    Everything that takes `Gradients` takes an Index, and reads it in blocks of rows, the next while one is used. A
    shard is compared with its checksum before its first use.

    Args:
        path: the folder.
        memory_bytes: what blocks in flight may take together.

    Raises:
        FileNotFoundError: no index there.
        ValueError: damaged, of a newer format, or not finished: run the same compress again.
    """

    def __init__(self, path: str | os.PathLike[str], *, memory_bytes: int = MEMORY_BYTES) -> None:
        folder = Path(path).absolute()
        manifest, order = opened(folder)
        while True:
            self._hold(folder, manifest, dict(enumerate(manifest.shards)), memory_bytes, order)
            try:
                for file in self._files:
                    file.check_size()
                return
            except ValueError:
                before, (manifest, order) = manifest, opened(folder)
                if manifest == before:  # or else shards were merged meanwhile
                    raise

    @classmethod
    def of_shards(cls, folder: Path, manifest: Manifest, shards: Mapping[int, ShardEntry]) -> Index:
        """Return an Index of these shards alone, by number; the folder's index need not be finished."""
        index = cls.__new__(cls)
        index._hold(folder, manifest, shards, MEMORY_BYTES)
        return index

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, memory_bytes: int = MEMORY_BYTES) -> Index:
        """Open a finished index; see `Index`."""
        return cls(path, memory_bytes=memory_bytes)

    @property
    def shapes(self) -> Shapes:
        """Layer name -> per-sample shape, in column order."""
        return self.manifest.shapes

    @property
    def digest(self) -> Mapping[str, str]:
        """Layer name -> hex digest of the tables of the sketch that made it."""
        return {layer.name: layer.digest for layer in self.manifest.layers}

    @property
    def origin(self) -> Origin | None:
        """The model and the loss that made it; None for an index of the first format version."""
        return None if (made_by := self.manifest.made_by) is None else Origin(*made_by)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that rows are read in: float32 where they are stored with scales."""
        return self._codec.decoded

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def bytes_per_sample(self) -> int:
        """The bytes that a sample takes on disk."""
        return self._codec.row_bytes

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, rows: Rows) -> Gradients:
        """Read the samples that `rows` selects (an int, a slice, a list, an index or a mask) into memory.

        Raises:
            IndexError: a sample out of range, or a mask that is not [N].
        """
        if isinstance(rows, str):
            raise TypeError(f"an Index is read by samples, not by layer {rows!r}: index[0:100][{rows!r}]")
        chosen = self._stored_rows(positions_of(rows, len(self)))
        out = torch.empty(len(chosen), self._codec.width, dtype=self.dtype, device="cpu")
        room = Room(self._codec)
        shard = torch.bucketize(chosen, torch.tensor(self._starts[1:], device="cpu"), right=True)
        for i in shard.unique().tolist():
            at = (shard == i).nonzero().flatten()
            local = chosen[at] - self._starts[i]
            row = self._codec.row_bytes
            for part, windows, place in windows_of(local, _GAP_BYTES // row, max(1, READ_BYTES // row)):
                values, scale = self._read([(i, windows)], room)
                out[at[part]] = self._codec.decode(values[place], None if scale is None else scale[place])
        return Gradients(out, self.shapes, self.digest, self.origin)

    def blocks(self, rows: int) -> Iterator[tuple[int, Gradients]]:
        """Yield (offset of the first sample, up to `rows` samples), in order; the next block is read meanwhile."""
        if self._order is None:
            for at, part in self.placed_blocks(rows):
                assert isinstance(at, slice)
                yield at.start, part
        elif len(self._mine) < len(self._files):  # a share's samples are no neighbours
            for at, part in self.placed_blocks(rows):
                assert isinstance(at, Tensor)
                yield from ((offset, part[local]) for offset, local in runs_of(at))
        else:
            check_rows(rows)
            spans = (slice(start, start + rows) for start in range(0, len(self), rows))
            yield from read_ahead(lambda span: (span.start, self[span]), spans)

    def placed_blocks(self, rows: int, *, reuse: bool = False) -> Iterator[tuple[At, Gradients]]:
        """Yield (positions, up to `rows` samples) in the order in which rows are stored, which is the fastest.

        `reuse`: a block is overwritten once two more were asked for.
        """
        about = self.shapes, self.digest, self.origin
        reuse = reuse or self._codec.scaled  # what is decoded is a copy
        for first, values in self._ahead(rows, lambda stored: self._codec.decode(*stored), reuse=reuse):
            yield self._at(first, len(values)), Gradients(values, *about)

    def stored_blocks(self, rows: int | None = None, *, reuse: bool = False) -> Iterator[tuple[At, Stored]]:
        """Yield (positions, rows as they are stored), which `products.Products` multiplies without decoding them.

        Queries must be multiplied with `factors()` first.

        `reuse`: a block must not be used any more once the next was asked for, which is read over it.
        """
        most = 2 * self.block_bytes
        least = min(most, max(READ_BYTES, _LEAST_ROWS * self._codec.row_bytes))  # that one thread reads at a time
        many = reuse and torch.get_num_threads() > 1  # what one thread reads, the others wait for
        rows = max(1, most // self._codec.row_bytes) if rows is None else rows
        # Nothing to decode, so the kernel alone reads ahead: a thread would take a core from the products.
        room = Room(self._codec)
        for pieces in self._pieces(rows):
            (i, first, count), row = pieces[0], self._codec.row_bytes
            if many and count * row > SMALL_BYTES:
                stamp, layout = self._checked(i)
                file, at = self._files[i], self._at(self._starts[i] + first, count)
                with self._told(self._entries[i]), file.mapped(layout, first, count, stamp) as stored:
                    if stored is not None:
                        yield at, Stored(stored.values, self._codec.scales(*stored))
                        del stored
                        self._check_again(pieces)
                        continue
            for part in smaller(pieces, max(1, least // row)):
                offset, stored = self._stored(part, room if reuse else Room(self._codec))
                yield self._at(offset, len(stored.values)), Stored(stored.values, self._codec.scales(*stored))
                self._check_again(part)

    @cached_property
    def code(self) -> BitCode | None:
        """What makes its rows of few bits of gradients, and of queries what multiplies them; None for other rows.

        Raises:
            ValueError: its file is missing or damaged.
        """
        return load_code(self.path, self.manifest)

    def factors(self) -> Tensor | None:
        """Return what each stored column is multiplied by beside the scales of `stored_blocks`, [K], or None for 1."""
        return self._codec.factors()

    def ids(self, rows: Rows = slice(None)) -> list[str]:
        """Return the ids of the samples that `rows` selects; their positions where none were given."""
        chosen = positions_of(rows, len(self))
        if not self.manifest.ids:
            return [str(position) for position in chosen.tolist()]
        texts: dict[int, list[str]] = {}
        found = []
        for row in self._stored_rows(chosen).tolist():
            i = bisect.bisect_right(self._starts, row) - 1
            if i not in texts:
                texts[i] = self._texts(i)
            found.append(texts[i][row - self._starts[i]])
        return found

    def _every_id(self) -> Iterator[str]:
        if not self.manifest.ids:
            yield from map(str, range(len(self)))
            return
        if self._order is not None:
            yield from self.ids()
            return
        for i in range(len(self._files)):
            yield from self._texts(i)

    def fisher(self) -> Fisher:
        """Return the Fisher matrix that was built with the index, or saved by `save_fisher`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: its file is damaged, replaced since the index was opened, or stale: samples were appended.
        """
        return load_fisher(self)

    def save_fisher(self, fisher: Fisher) -> None:
        """Keep a Fisher matrix with the index, in place of the one before.

        Raises:
            ValueError: compressed differently, not of as many samples as the index, rows of few bits, or the index is
                not what it was when it was opened: others were appended, or are being appended now. Nothing is changed
                then.
        """
        self.manifest = save_fisher(self, fisher)

    def discard(self) -> None:
        """Remove the rows of an append that was not finished, so that others can be appended; all else stays.

        Raises ValueError where it is being written now.
        """
        self._rewrite(discard)

    def compact(self) -> None:
        """Merge small shards, as many appends leave them, into large ones; no row, id or order of them changes.

        Handles that were opened before are told to open the index again.

        Raises:
            ValueError: it is being written now, an append is not finished, or a shard is damaged.
        """
        self._rewrite(compact)

    def _rewrite(self, change: Callable[[Path, Manifest], Manifest]) -> None:
        with locked(self.path, Ranks(None), make=False):
            before = Manifest.load(self.path)
            if self.manifest.known_keys().isdisjoint(before.known_keys()):
                raise ValueError(f"{self.path}: another index than the one that was opened; open it again")
            manifest = change(self.path, before)
        if before.shards == self.manifest.shards:
            self._hold(self.path, manifest, dict(enumerate(manifest.shards)), self._memory_bytes, self._order)

    def whitened(
        self, out: str | os.PathLike[str], fisher: Fisher | None = None, *, factory: str | None = None
    ) -> None:
        """Write rows [N, K] whose inner products are influence scores: with those of queries, `fisher.whiten(query)`.

        Of rows of few bits, the values of their codes, for queries `index.code.queries(query)`; a .faiss file is then
        FAISS's own RaBitQ index, of 1 bit, with the same scores. The ids of the rows stand beside it, in `out` +
        ".ids": a JSON string a line.

        Args:
            out: a .npy or .safetensors file (there named "rows"), or a .faiss one: an index by inner product (needs
                `faiss`). Complete once it has its name.
            fisher: by default the one that is kept with the index; rows of few bits take none.
            factory: of a .faiss file: which index, such as "IVF4096,PQ64" (`faiss.index_factory`); flat, so exact, by
                default. It is trained on random rows, as many as `memory_bytes` has room for.

        Raises:
            ValueError: a file of the index itself, a factory that FAISS refuses, one whose codes take more memory
                than the index may, or rows of 2 or 4 bits as a .faiss file without a factory.
        """
        check_out(out, factory, self.path)
        bits = self._codec.bits
        if bits is not None and fisher is not None:
            raise ValueError("fisher: rows of few bits were whitened by that of their code; leave it out")
        if bits is None:
            fisher = self.fisher() if fisher is None else fisher
            fisher.check(self, "fisher and index")
        dtype = self.dtype if fisher is None else fisher.result_dtype(self.dtype, "whiten")
        export = Export(out, len(self), self._codec.width, dtype, 16 * self.block_bytes, factory, bits)
        export.write(White(self, fisher), self._every_id())

    def requantize(self, out: str | os.PathLike[str], code: BitCode) -> Index:
        """Write an index of few bits a row into another folder, without the model, and return it.

        It has the samples, ids and order of this one, and takes appends of the same model; this one stays.

        Args:
            out: a new folder; complete once it has its name.
            code: what :meth:`BitCode.fit` made of these rows, or of some thousand of them.

        Raises:
            ValueError: rows that are of few bits already, an unfinished index, a code of another sketch or model, a
                damaged shard, or a folder that is there.
        """
        requantize(self, Path(out).absolute(), code)
        return Index(out)

    def share(self, rank: int, world: int) -> Index:
        """Return the index as one of `world` ranks reads it: every `world`-th shard from `rank` on. Offsets stay."""
        mine = copy.copy(self)
        mine._mine = range(rank, len(self._files), world)
        return mine

    def info(self) -> dict[str, Any]:
        """Return what the index holds, in plain values."""
        return {
            "path": str(self.path),
            "samples": len(self),
            "bytes_per_sample": self.bytes_per_sample,
            "bytes": sum(map(self._bytes, range(len(self._files)))),
            "dtype": self.manifest.dtype,
            "shards": len(self._files),
            "layers": {layer.name: list(layer.shape) for layer in self.manifest.layers},
            "finished": not self.manifest.unfinished,
            "files": sorted(self.manifest.files),
            "about": self.manifest.code,
        }

    def verify(self) -> list[str]:
        """Return what is wrong with the folder, a line each; nothing where every byte is as it was written."""
        return verify(self.path)

    def __repr__(self) -> str:
        return f"Index({str(self.path)!r}, {len(self)} samples x {self._codec.width}, {self.manifest.dtype})"
