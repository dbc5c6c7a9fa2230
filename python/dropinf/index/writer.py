"""Compressing into an index: batch by batch, so that whatever ends it, the next run goes on with the next batch.

Batches are numbered; every `shard_batches` of them make a shard, and shard i belongs to rank i modulo the number of
ranks. A finished batch is a file of its own, under `parts`, until its shard is complete. Each file has its checksum in
its name and is complete once it has that name, so what is there says all that is done: by whatever ranks, in however
many runs, the bytes are the same.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from ..files import SUFFIX, TEMPORARY, checksum, file_checksum, make_folder, serialize, write_whole
from ..fisher.fisher import Fisher
from ..ranks import Ranks
from ..workload import Ids, batch_checksum, first_batch
from .folder import _STRAY, FISHER, PARTS, PASSAGES, SHARDS, SKETCH, check_free, locked, shard_path
from .manifest import LayerEntry, Manifest, Run, ShardEntry, find_run
from .reader import Index
from .shards import DTYPES, pack_texts, read_shard_header

_PART = re.compile(r"(\d{9,})-([0-9a-f]{32})" + re.escape(SUFFIX))
_SHARD = re.compile(r"(\d{6,})-([0-9a-f]{32})" + re.escape(SUFFIX))
_SHARD_BYTES = 1 << 26
_LEAST_SHARDS = 64  # if there are as many batches: what ranks share


class RowSource(Protocol):
    """What the rows of an index come from: a compressor."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def is_sharded(self) -> bool: ...

    def digest(self) -> Mapping[str, str]: ...
    def fingerprint(self) -> str: ...
    def save(self, path: str | os.PathLike[str]) -> None: ...
    def stream(
        self,
        batches: Iterable[Any],
        take: Callable[[Tensor], None],
        *,
        progress: bool = ...,
        where: Callable[[int], str] | None = ...,
    ) -> None: ...


class Work:
    """The batches that a rank computes, in order; `at` is the number of the one that is being computed."""

    def __init__(self, batches: Iterable[Any], wanted: Callable[[int], bool], rounds: int | None = None) -> None:
        self.batches, self.wanted, self.rounds = batches, wanted, rounds
        self.at: int | None = None  # None: computed only so that other ranks need not wait
        self.batch: Any = None
        self.count: int | None = len(batches) if isinstance(batches, Sized) else None

    def __iter__(self) -> Iterator[Any]:
        done = 0
        for at, batch in self._all():
            self.at, self.batch = at, batch
            done += 1
            yield batch
        self.at = None
        for _ in range((self.rounds or 0) - done):
            yield first_batch(self.batches)[0]

    def __len__(self) -> int:
        if self.count is None:
            raise TypeError("the number of batches is not known")
        return max(self.rounds or 0, sum(map(self.wanted, range(self.count))))

    def _all(self) -> Iterator[tuple[int, Any]]:
        if isinstance(self.batches, Sequence):
            yield from ((b, self.batches[b]) for b in range(len(self.batches)) if self.wanted(b))
            return
        b = -1
        for b, batch in enumerate(self.batches):
            if self.wanted(b):
                yield b, batch
        self.count = b + 1


class Writer:
    """One compression into a folder, as one rank sees it."""

    def __init__(self, source: RowSource, batches: Iterable[Any], folder: Path, ranks: Ranks, ids: Ids | None) -> None:
        self.source, self.batches, self.folder, self.ranks, self.ids = source, batches, folder, ranks, ids

    def run(
        self, dtype: torch.dtype | None, fisher: Fisher | None, append: bool, about: Mapping[str, str], progress: bool
    ) -> None:
        first, self.batches = first_batch(self.batches)
        begun = self.ranks.first(lambda: self._begin(first, dtype, append))
        self.manifest, self.number = begun or (self._create(first, dtype, about), 0)
        self.codec = self.manifest.codec
        runs = self.manifest.runs
        self.current = replace(runs[self.number], shards=None)
        earlier, later = (
            [s for run in part for s in run.shards or ()] for part in (runs[: self.number], runs[self.number + 1 :])
        )
        own = runs[self.number].shards  # None: not finished, and so the last run
        self.base, stop = len(earlier), len(earlier) + len(own or ())
        self.done: dict[int, ShardEntry] = dict(enumerate(earlier)) | dict(enumerate(later, stop))
        self.done |= self._present(None if own is None else stop)
        # Shards of other runs are read for the Fisher matrix alone.
        self.fisher, self.next = fisher, self.ranks.rank
        if fisher is None:
            self.next += max(0, -(-(self.base - self.ranks.rank) // self.ranks.world)) * self.ranks.world
        # Parts are numbered through all runs, so that none of another run is taken for one of this.
        size = self.current.shard_batches
        self._first = self.base * size
        parts = {int(m[1]) - self._first: m[0] for m in self._names(PARTS, _PART)}
        self._parts = {b: name for b, name in parts.items() if b >= 0 and (own is None or b < len(own) * size)}
        self._compute(progress)
        self._finish()

    # How it begins.

    def _begin(self, first: Any, dtype: torch.dtype | None, append: bool) -> tuple[Manifest, int] | None:
        """Return the manifest to go on with and the number of its run, or None for a new index. Rank 0 alone."""
        try:
            manifest = Manifest.load(self.folder)
        except FileNotFoundError:
            check_free(self.folder)
            self._sweep()
            return None
        self._sweep()
        self._check_same(manifest, dtype)
        found, count = batch_checksum(first), len(self.batches) if isinstance(self.batches, Sized) else None
        number = find_run(manifest, found, count)
        if number is not None:
            make_folder(self.folder / PARTS)
            return manifest, number
        last = manifest.runs[-1]
        if last.shards is None:
            raise ValueError(
                f"batches: {self.folder} was begun with others ({last.batches} of them, and {count} now, or the first "
                "differs); finish it with the same ones, or delete the folder"
            )
        if not append:
            raise ValueError(
                f"batches: {self.folder} holds others' gradients; pass append=True to add these, or name another folder"
            )
        manifest = replace(manifest, runs=(*manifest.runs, Run(found, count, last.shard_batches)))
        manifest.save(self.folder)
        make_folder(self.folder / PARTS)
        return manifest, len(manifest.runs) - 1

    def _sweep(self) -> None:
        """Remove the files that a run was writing as it was killed."""
        for folder in (self.folder, self.folder / SHARDS, self.folder / PARTS):
            for stray in folder.glob(f".*{TEMPORARY}"):
                if _STRAY.fullmatch(stray.name):
                    stray.unlink(missing_ok=True)

    def _check_same(self, manifest: Manifest, dtype: torch.dtype | None) -> None:
        """Raise ValueError where the index is of another sketch, model or dtype."""
        way_out = "use the same model and sketch (compressor.load(folder / 'sketch.safetensors')), or another folder"
        digest, shapes = self.source.digest(), self.source.shapes
        for layer in manifest.layers:
            if digest.get(layer.name) != layer.digest or shapes[layer.name] != layer.shape:
                raise ValueError(f"out: {self.folder} was made with another sketch of layer {layer.name!r}; {way_out}")
        for name in digest.keys() - manifest.shapes.keys():
            raise ValueError(f"out: {self.folder} has no layer {name!r}; {way_out}")
        if list(shapes) != list(manifest.shapes):
            raise ValueError(f"out: {self.folder} has its layers in another order, {list(manifest.shapes)}; {way_out}")
        if manifest.model != self.source.fingerprint():
            raise ValueError(f"out: {self.folder} was made with other weights of the model; {way_out}")
        if dtype is not None and DTYPES[manifest.dtype] != dtype:
            raise ValueError(
                f"dtype is {dtype}; {self.folder} holds {manifest.dtype}: leave dtype out, or name a new folder"
            )
        if manifest.ids != (self.ids is not None):
            raise ValueError(
                f"ids: {self.folder} was begun {'with' if manifest.ids else 'without'} ids; do the same again"
            )

    def _create(self, first: Any, dtype: torch.dtype | None, about: Mapping[str, str]) -> Manifest:
        """Compress the first batch, for the sizes of layers and shards, and write the first manifest."""
        flat = self._rows(first) if self.source.is_sharded or self.ranks.rank == 0 else None
        return self.ranks.first(lambda: self._write_first(first, flat, dtype, about))

    def _rows(self, batch: Any) -> Tensor:
        found: list[Tensor] = []
        self.source.stream([batch], found.append)
        return found[0]

    def _write_first(
        self, first: Any, flat: Tensor | None, dtype: torch.dtype | None, about: Mapping[str, str]
    ) -> Manifest:
        assert flat is not None
        name = {v: k for k, v in DTYPES.items()}[dtype or flat.dtype]
        shapes = self.source.shapes
        sizes = [1.0] * len(shapes)
        if name == "int8":
            parts = flat.split([math.prod(s) for s in shapes.values()], 1)
            sizes = [float(part.square().mean().sqrt()) or 1.0 for part in parts]
        digest = self.source.digest()
        layers = [LayerEntry(n, s, digest[n], size) for (n, s), size in zip(shapes.items(), sizes, strict=True)]
        count = len(self.batches) if isinstance(self.batches, Sized) else None
        manifest = Manifest(tuple(layers), name, self.source.fingerprint(), self.ids is not None, about=about)
        a_shard = max(1, _SHARD_BYTES // max(1, len(flat) * manifest.codec.row_bytes))
        if count is not None:
            a_shard = min(a_shard, -(-count // _LEAST_SHARDS))
        self.source.save(self.folder / SKETCH)
        for kept in (SKETCH, PASSAGES):
            if (self.folder / kept).exists():
                manifest = manifest.with_file(kept, file_checksum(self.folder / kept))
        make_folder(self.folder / SHARDS)
        make_folder(self.folder / PARTS)
        manifest = replace(manifest, runs=(Run(batch_checksum(first), count, a_shard),))
        manifest.save(self.folder)
        return manifest

    def _names(self, folder: str, pattern: re.Pattern[str]) -> Iterator[re.Match[str]]:
        if (self.folder / folder).is_dir():
            yield from (m for n in sorted(os.listdir(self.folder / folder)) if (m := pattern.fullmatch(n)))

    def _present(self, stop: int | None) -> dict[int, ShardEntry]:
        """The shards of this run that are there, by number."""
        found = {}
        for match in self._names(SHARDS, _SHARD):
            if self.base <= int(match[1]) and (stop is None or int(match[1]) < stop):
                counts = read_shard_header(self.folder / SHARDS / match[0])
                found[int(match[1])] = ShardEntry(match[2], sum(counts))
        return found

    # What it computes.

    def _compute(self, progress: bool) -> None:
        world, size = self.ranks.world, self.current.shard_batches

        def wanted(b: int) -> bool:
            shard = self.base + b // size
            return shard % world == self.ranks.rank and shard not in self.done and b not in self._parts

        rounds = None
        if world > 1 and self.source.is_sharded:
            if not isinstance(self.batches, Sized):
                raise ValueError("batches: a sharded model needs a list or a DataLoader, whose length is known")
            mine = sum(map(wanted, range(len(self.batches))))
            rounds = max(self.ranks.everyone(mine))
        self.work = Work(self.batches, wanted, rounds)
        self._advance()
        self.source.stream(self.work, self._take, progress=progress, where=self._where)
        self._advance()

    def _where(self, row: int) -> str:
        return f"sample {row} of batch {self.work.at}"

    def _take(self, flat: Tensor) -> None:
        """Keep the rows of the batch that was computed."""
        self.ranks.check()
        b = self.work.at
        if b is None:
            return
        kept = self.codec.encode(flat)
        if self.ids is not None:
            kept["ids"], kept["id_offsets"] = pack_texts(self._ids_of(self.work.batch, len(flat)))
        data = serialize(kept, {"batches": [len(flat)]})
        name = f"{self._first + b:09d}-{checksum(data)}{SUFFIX}"
        write_whole(self.folder / PARTS / name, data)
        self._parts[b] = name
        self._advance()

    def _ids_of(self, batch: Any, count: int) -> list[str]:
        assert self.ids is not None
        found = list(self.ids(batch))
        if len(found) != count or not all(isinstance(name, str) for name in found):
            raise ValueError(
                f"ids: it gave {found[:3]}... for a batch of {count} samples; it must give {count} strings"
            )
        return found

    def _advance(self) -> None:
        """Make every shard whose batches are all there, in order, and add it to the Fisher matrix."""
        while True:
            if self.next not in self.done:
                start = (self.next - self.base) * self.current.shard_batches
                stop = start + self.current.shard_batches
                if self.work.count is not None:
                    stop = min(stop, self.work.count)
                if start >= stop or any(b not in self._parts for b in range(start, stop)):
                    return
                self._seal(self.next, range(start, stop))
            entry = self.done[self.next]
            if self.fisher is not None:
                self.fisher.update(Index.of_shards(self.folder, self.manifest, {self.next: entry}))
            self.next += self.ranks.world

    def _seal(self, shard: int, batches: range) -> None:
        pieces: list[dict[str, Tensor]] = []
        for b in batches:
            path = self.folder / PARTS / self._parts[b]
            data = path.read_bytes()
            if checksum(data) not in self._parts[b]:
                path.unlink()
                raise ValueError(f"{path}: damaged, and deleted; run it again to make it again")
            pieces.append(safetensors.torch.load(data))
        kept = {name: torch.cat([p[name] for p in pieces]) for name in pieces[0] if name != "id_offsets"}
        if self.ids is not None:
            sizes = torch.cat([p["id_offsets"].diff() for p in pieces])
            kept["id_offsets"] = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        counts = [len(p["gradients"]) for p in pieces]
        data = serialize(kept, {"batches": counts})
        entry = ShardEntry(checksum(data), sum(counts))
        write_whole(shard_path(self.folder, shard, entry.checksum), data)
        for b in batches:
            (self.folder / PARTS / self._parts[b]).unlink()
        self.done[shard] = entry

    # How it ends.

    def _finish(self) -> None:
        mine = {i: s for i, s in self.done.items() if i % self.ranks.world == self.ranks.rank}
        every = {i: s for part in self.ranks.everyone(mine) for i, s in part.items()}
        assert self.work.count is not None
        stop = self.base + -(-self.work.count // self.current.shard_batches)
        later = sum(len(run.shards or ()) for run in self.manifest.runs[self.number + 1 :])
        if sorted(every) != list(range(stop + later)):
            raise ValueError(
                f"batches: not as many as before: {self.folder} has {len(every)} shards, and these make {stop + later}"
            )
        finished = replace(self.current, shards=tuple(every[i] for i in range(self.base, stop)))
        runs = list(self.manifest.runs)
        runs[self.number] = finished
        manifest = replace(self.manifest, runs=tuple(runs))
        if self.fisher is not None:
            index = Index.of_shards(self.folder, manifest, every).share(self.ranks.rank, self.ranks.world)
            self.fisher.all_reduce(index, self.ranks)
            if self.fisher.kind == "kronecker":
                self.fisher.correct_together(index, self.ranks)
        self.ranks.first(lambda: self._conclude(manifest))

    def _conclude(self, manifest: Manifest) -> None:
        if self.fisher is not None:
            manifest = manifest.with_file(FISHER, self.fisher.save(self.folder / FISHER))
        manifest.save(self.folder)
        if not manifest.unfinished:
            shutil.rmtree(self.folder / PARTS, ignore_errors=True)


def write_index(
    source: RowSource,
    batches: Iterable[Any],
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    fisher: Fisher | None = None,
    ids: Ids | None = None,
    append: bool = False,
    group: torch.distributed.ProcessGroup | None = None,
    about: Mapping[str, str] | None = None,
    progress: bool = False,
) -> Index:
    """Compress into a folder; see `Compressor.compress`."""
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype is {dtype}; it must be one of {', '.join(f'torch.{name}' for name in DTYPES)}")
    if isinstance(batches, DataLoader) and isinstance(batches.sampler, RandomSampler):
        raise ValueError("batches: a shuffling DataLoader gives another order each time; make it with shuffle=False")
    if fisher is not None and fisher.count:
        raise ValueError(f"fisher has {fisher.count} samples; pass an empty one, such as dropinf.Fisher('block')")
    ranks, folder = Ranks(group), Path(path)
    with ranks.watched(), locked(folder, ranks):
        Writer(source, batches, folder, ranks, ids).run(dtype, fisher, append, about or {}, progress)
    return Index(folder)
