"""Compressed gradients on disk: a manifest and shards of rows, mapped and read in blocks, checked before use."""

from __future__ import annotations

import bisect
import copy
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..fisher.fisher import Fisher
from ..gradients import Gradients, Rows, Shapes, block_rows
from ..ranks import Ranks
from .ahead import one_ahead, read_ahead
from .compact import compact
from .discard import discard
from .export import Export, check_out, near
from .folder import FISHER, locked, shard_path
from .kept import has_fisher, keep_fisher
from .manifest import NEXT_FISHER, Manifest, ShardEntry
from .positions import positions_of
from .shards import SMALL_BYTES, ShardFile, Stamp
from .sound import verify

MEMORY_BYTES = 1 << 28
T = TypeVar("T")


class Stored(NamedTuple):
    """Rows as they are stored: their values [n, K], and what each is multiplied by [n] or None for 1."""

    values: Tensor
    scale: Tensor | None


class Index:
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
        folder = Path(path)
        manifest = Manifest.load(folder)
        while True:
            if not manifest.shards:
                raise ValueError(
                    f"{folder}: the index is not finished; run the same compress again, which goes on where it stopped"
                )
            self._hold(folder, manifest, dict(enumerate(manifest.shards)), memory_bytes)
            try:
                for file in self._files:
                    file.check_size()
                return
            except ValueError:
                before, manifest = manifest, Manifest.load(folder)
                if manifest == before:  # or else shards were merged meanwhile
                    raise

    @classmethod
    def of_shards(cls, folder: Path, manifest: Manifest, shards: Mapping[int, ShardEntry]) -> Index:
        """Return an Index of these shards alone, by number; the folder's index need not be finished."""
        index = cls.__new__(cls)
        index._hold(folder, manifest, shards, MEMORY_BYTES)
        return index

    def _hold(self, folder: Path, manifest: Manifest, shards: Mapping[int, ShardEntry], memory_bytes: int) -> None:
        self.path, self.manifest, self._codec = folder, manifest, manifest.codec
        least = 32 * self._codec.width * self._codec.decoded.itemsize
        if memory_bytes < least:
            raise ValueError(f"{folder}: memory_bytes is {memory_bytes}; 32 rows of this index alone take {least}")
        self._memory_bytes = memory_bytes
        self.block_bytes = memory_bytes // 16  # the next is read meanwhile, and solvers make copies
        self._entries = [shards[i] for i in sorted(shards)]
        self._files = [
            ShardFile(shard_path(folder, shard.number, shard.checksum), self._codec, shard.rows)
            for shard in self._entries
        ]
        self._starts = [0, *itertools.accumulate(shard.rows for shard in self._entries)]
        self._mine: Sequence[int] = range(len(self._files))
        self._layouts: dict[int, tuple[Stamp, Mapping[str, tuple[int, int]]]] = {}  # of the files that were checked

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
        chosen = positions_of(rows, len(self))
        out = torch.empty(len(chosen), self._codec.width, dtype=self.dtype)
        shard = torch.bucketize(chosen, torch.tensor(self._starts[1:]), right=True)
        for i in shard.unique().tolist():
            at = (shard == i).nonzero().flatten()
            local = chosen[at] - self._starts[i]
            first = int(local.min())
            values, scale = self._window(i, first, int(local.max()) + 1 - first)
            local = local - first
            out[at] = self._codec.decode(values[local], None if scale is None else scale[local])
        return Gradients(out, self.shapes, self.digest)

    def blocks(self, rows: int) -> Iterator[tuple[int, Gradients]]:
        """Yield (offset of the first sample, up to `rows` samples), in order; the next block is read meanwhile."""
        shapes, digest = self.shapes, self.digest
        for offset, values in self._ahead(rows, lambda stored: self._codec.decode(*stored)):
            yield offset, Gradients(values, shapes, digest)

    def stored_blocks(self, rows: int | None = None) -> Iterator[tuple[int, Stored]]:
        """Yield (offset, rows as they are stored). With `factors()` multiplied into queries, no row is decoded."""
        rows = max(1, 2 * self.block_bytes // self._codec.row_bytes) if rows is None else rows
        # Nothing to decode, so the kernel alone reads ahead: a thread would take a core from the products.
        for pieces, block in one_ahead((pieces, self._stored(pieces)) for pieces in self._pieces(rows)):
            yield block
            self._check_again(pieces)

    def factors(self) -> Tensor | None:
        """Return what each stored column is multiplied by, [K], or None for 1."""
        return self._codec.factors()

    def ids(self, rows: Rows = slice(None)) -> list[str]:
        """Return the ids of the samples that `rows` selects; their positions where none were given."""
        chosen = positions_of(rows, len(self)).tolist()
        if not self.manifest.ids:
            return [str(position) for position in chosen]
        texts: dict[int, list[str]] = {}
        found = []
        for position in chosen:
            i = bisect.bisect_right(self._starts, position) - 1
            if i not in texts:
                texts[i] = self._files[i].texts(self._checked(i)[1])
            found.append(texts[i][position - self._starts[i]])
        return found

    def _every_id(self) -> Iterator[str]:
        if not self.manifest.ids:
            yield from map(str, range(len(self)))
            return
        for i, file in enumerate(self._files):
            yield from file.texts(self._checked(i)[1])

    def fisher(self) -> Fisher:
        """Return the Fisher matrix that was built with the index, or saved by `save_fisher`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: its file is damaged, replaced since the index was opened, or stale: samples were appended.
        """
        if FISHER not in self.manifest.files:
            raise FileNotFoundError(f"{self.path}: no Fisher matrix in it; use build_fisher(index), or save_fisher")
        path = self.path / FISHER
        if not has_fisher(self.path, self.manifest):
            if Manifest.load(self.path) != self.manifest:
                raise ValueError(f"{path}: replaced since this index was opened; open it again")
            raise ValueError(f"{path}: damaged; build it again: index.save_fisher(dropinf.build_fisher(index))")
        fisher = Fisher.load(path)
        try:
            fisher.check(self, "fisher and index")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if fisher.count != len(self):
            raise ValueError(
                f"{path}: stale, of {fisher.count} samples where the index has {len(self)}; build it again: "
                "index.save_fisher(dropinf.build_fisher(index)), or append with fisher="
            )
        return fisher

    def save_fisher(self, fisher: Fisher) -> None:
        """Keep a Fisher matrix with the index, in place of the one before.

        Raises:
            ValueError: compressed differently, not of as many samples as the index, or the index is not what it was
                when it was opened: others were appended, or are being appended now. Nothing is changed then.
        """
        fisher.check(self, "fisher and index")
        if fisher.count != len(self):
            raise ValueError(
                f"fisher: it is of {fisher.count} samples, and the index has {len(self)}; use build_fisher(index), or "
                "fisher.save(path) for one of a part"
            )
        with locked(self.path, Ranks(None)):
            now = Manifest.load(self.path)
            if replace(now, files={}) != replace(self.manifest, files={}):
                raise ValueError(
                    f"{self.path}: it has changed since it was opened (from {len(self)} samples to "
                    f"{sum(shard.rows for shard in now.shards)}, or a run was begun); open it again and build the "
                    "Fisher matrix of what is there now"
                )
            self.manifest = keep_fisher(self.path, now, now, fisher)

    def discard(self) -> None:
        """Remove the rows of an append that was not finished, so that others can be appended; all else stays.

        Raises:
            ValueError: it is being written now.
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
        with locked(self.path, Ranks(None)):
            before = Manifest.load(self.path)
            manifest = change(self.path, before)
        if before.shards == self.manifest.shards:
            self._hold(self.path, manifest, dict(enumerate(manifest.shards)), self._memory_bytes)

    def whitened(
        self, out: str | os.PathLike[str], fisher: Fisher | None = None, *, factory: str | None = None
    ) -> None:
        """Write rows [N, K] whose inner products are influence scores: with those of queries, `fisher.whiten(query)`.

        The ids of the rows stand beside it, in `out` + ".ids": a JSON string a line.

        Args:
            out: a .npy or .safetensors file (there named "rows"), or a .faiss one: an index by inner product (needs
                `faiss`). Complete once it has its name.
            fisher: by default the one that is kept with the index.
            factory: of a .faiss file: which index, such as "IVF4096,PQ64" (`faiss.index_factory`); flat, so exact, by
                default. It is trained on random rows, as many as `memory_bytes` has room for.

        Raises:
            ValueError: a factory that FAISS refuses, or whose codes take more memory than the index may.
        """
        check_out(out, factory)
        fisher = self.fisher() if fisher is None else fisher
        fisher.check(self, "fisher and index")
        dtype = fisher.result_dtype(self.dtype, "whiten")
        export = Export(out, len(self), self._codec.width, dtype, 16 * self.block_bytes, factory)
        export.write(_White(self, fisher), self._every_id())

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
            "bytes": sum(file.path.stat().st_size for file in self._files if file.path.exists()),
            "dtype": self.manifest.dtype,
            "shards": len(self._files),
            "layers": {layer.name: list(layer.shape) for layer in self.manifest.layers},
            "finished": not self.manifest.unfinished,
            "files": sorted(self.manifest.files.keys() - {NEXT_FISHER}),
            "about": dict(self.manifest.about),
        }

    def verify(self) -> list[str]:
        """Return what is wrong with the folder, a line each; nothing where every byte is as it was written."""
        return verify(self.path)

    def __repr__(self) -> str:
        return f"Index({str(self.path)!r}, {len(self)} samples x {self._codec.width}, {self.manifest.dtype})"

    def _checked(self, i: int) -> tuple[Stamp, Mapping[str, tuple[int, int]]]:
        """Return what shard `i` is like; compare it with its checksum before its first use and where it was written."""
        try:
            stamp = self._files[i].stamp()
            if i not in self._layouts or self._layouts[i][0] != stamp:
                self._files[i].verify(self._entries[i].checksum)
                self._layouts[i] = stamp, self._files[i].layout()
        except (ValueError, FileNotFoundError):
            now = Manifest.load(self.path).shards
            if self._entries[i] in now or now == self.manifest.shards:
                raise
            raise ValueError(f"{self.path}: its shards were merged since it was opened; open it again") from None
        return self._layouts[i]

    def _check_again(self, pieces: list[tuple[int, int, int]]) -> None:
        """Raise ValueError where a shard was changed while its rows were used."""
        for i, _, _ in pieces:
            self._checked(i)

    def _window(self, i: int, first: int, count: int) -> Stored:
        stamp, layout = self._checked(i)
        try:
            return Stored(*self._files[i].window(layout, first, count, stamp))
        except FileNotFoundError:
            self._checked(i)  # which says why it is gone
            raise

    def _ahead(self, rows: int, decode: Callable[[Stored], T]) -> Iterator[tuple[int, T]]:
        def read(pieces: list[tuple[int, int, int]]) -> tuple[list[tuple[int, int, int]], tuple[int, T]]:
            offset, stored = self._stored(pieces)
            stored.values.view(torch.uint8).flatten()[::4096].sum()  # read from disk here, not where it is used
            return pieces, (offset, decode(stored))

        for pieces, block in read_ahead(read, self._pieces(rows)):
            yield block
            self._check_again(pieces)

    def _stored(self, pieces: list[tuple[int, int, int]]) -> tuple[int, Stored]:
        """Return the offset of the first of these (shard, first row, rows), and all of them."""
        i, first, _ = pieces[0]
        parts = [self._window(*piece) for piece in pieces]
        if len(parts) == 1:
            return self._starts[i] + first, parts[0]
        scales = [part.scale for part in parts if part.scale is not None]
        values = torch.cat([part.values for part in parts])
        return self._starts[i] + first, Stored(values, torch.cat(scales) if scales else None)

    def _pieces(self, rows: int) -> Iterator[list[tuple[int, int, int]]]:
        """Yield blocks of up to `rows` rows, each as (shard, first row, rows); small neighbours are read as one."""
        if rows < 1:
            raise ValueError(f"rows is {rows}; it must be at least 1")
        small = min(rows, SMALL_BYTES // self._codec.row_bytes)
        block: list[tuple[int, int, int]] = []
        for i in self._mine:
            count = self._files[i].rows
            if block and (block[-1][0] != i - 1 or sum(piece[2] for piece in block) + count > small):
                yield block
                block = []
            if count <= small:
                block.append((i, 0, count))
                continue
            for first in range(0, count, rows):
                yield [(i, first, min(rows, count - first))]
        if block:
            yield block


@dataclass(frozen=True)
class _White:
    """The rows of an index, whitened."""

    index: Index
    fisher: Fisher

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        for offset, part in self.index.blocks(block_rows(self.index)):
            yield offset, self.fisher.whiten(part).flat

    def at(self, positions: Tensor) -> Tensor:
        """Return the rows at ordered positions."""
        parts = near(positions, block_rows(self.index))
        return torch.cat([self.fisher.whiten(self.index[part]).flat.float() for part in parts])
