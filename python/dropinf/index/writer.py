"""Compressing into an index: batch by batch, so that whatever ends it, the next run goes on with the next batch.

Batches are numbered; every `shard_batches` of them make a shard, and shard i belongs to rank i modulo the number of
ranks. A finished batch is a file of its own, under `parts`, until its shard is complete. Each file has its checksum in
its name and is complete once it has that name, so what is there says all that is done: by whatever ranks, in however
many runs, the bytes are the same.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..files import SUFFIX, checksum, serialize, write_whole
from ..fisher.fisher import Fisher
from ..ranks import Ranks
from ..workload import Ids, check_order, first_batch, order_of, shuffles
from .codec import DTYPES
from .folder import FISHER, PARTS, locked, shard_path
from .manifest import Manifest, ShardEntry
from .order import joined, read_order, remove_others, write_order
from .plan import Opening, Plan, RowSource
from .reader import Index
from .shards import pack_texts


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
    """One run into a folder, as one rank sees it."""

    def __init__(
        self,
        source: RowSource,
        batches: Iterable[Any],
        plan: Plan,
        ranks: Ranks,
        ids: Ids | None,
        fisher: Fisher | None,
        places: Tensor | None,
    ) -> None:
        self.source, self.batches, self.plan, self.ranks, self.ids = source, batches, plan, ranks, ids
        self.fisher, self.folder, self.codec = fisher, plan.folder, plan.manifest.codec
        self.places = places  # of the run's samples
        self.done, self.parts = plan.shards(), plan.parts()
        # The next shard of this rank. Those of other runs are read for the Fisher matrix alone.
        self.next = ranks.rank
        if fisher is None:
            self.next += max(0, -(-(plan.base - ranks.rank) // ranks.world)) * ranks.world
        self.work = self._work()

    def write(self, progress: bool) -> None:
        """Compress what is missing, and finish the run."""
        self._advance()
        self.source.stream(self.work, self._take, progress=progress, where=self._where)
        self._advance()
        self._finish()

    def _work(self) -> Work:
        world, size, base = self.ranks.world, self.plan.run.shard_batches, self.plan.base

        def wanted(b: int) -> bool:
            shard = base + b // size
            return shard % world == self.ranks.rank and shard not in self.done and b not in self.parts

        rounds = None
        if world > 1 and self.source.is_sharded:
            if not isinstance(self.batches, Sized):
                raise ValueError("batches: a sharded model needs a list or a DataLoader, whose length is known")
            mine = sum(map(wanted, range(len(self.batches))))
            rounds = max(self.ranks.everyone(mine))
        return Work(self.batches, wanted, rounds)

    def _where(self, row: int) -> str:
        return f"sample {row} of batch {self.work.at}"

    def _take(self, flat: Tensor) -> None:
        """Keep the rows of the batch that was computed."""
        self.ranks.check()
        b = self.work.at
        if b is None:
            return
        kept = self.codec.encode(flat, self._where)
        if self.ids is not None:
            kept["ids"], kept["id_offsets"] = pack_texts(self._ids_of(self.work.batch, len(flat)))
        data = serialize(kept, {"batches": [len(flat)]})
        name = f"{self.plan.first_part + b:09d}-{checksum(data)}{SUFFIX}"
        write_whole(self.folder / PARTS / name, data)
        self.parts[b] = name
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
                start = (self.next - self.plan.base) * self.plan.run.shard_batches
                stop = start + self.plan.run.shard_batches
                if self.work.count is not None:
                    stop = min(stop, self.work.count)
                if start >= stop or any(b not in self.parts for b in range(start, stop)):
                    return
                self._seal(self.next, range(start, stop))
            entry = self.done[self.next]
            if self.fisher is not None:
                self.fisher.update(Index.of_shards(self.folder, self.plan.manifest, {self.next: entry}))
            self.next += self.ranks.world

    def _seal(self, shard: int, batches: range) -> None:
        pieces: list[dict[str, Tensor]] = []
        for b in batches:
            path = self.folder / PARTS / self.parts[b]
            data = path.read_bytes()
            if checksum(data) not in self.parts[b]:
                path.unlink()
                raise ValueError(f"{path}: damaged, and deleted; run it again to make it again")
            pieces.append(safetensors.torch.load(data))
        kept = {name: torch.cat([p[name] for p in pieces]) for name in pieces[0] if name != "id_offsets"}
        if self.ids is not None:
            sizes = torch.cat([p["id_offsets"].diff() for p in pieces])
            kept["id_offsets"] = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), sizes.cumsum(0)])
        counts = [len(p["gradients"]) for p in pieces]
        data = serialize(kept, {"batches": counts})
        entry = ShardEntry(checksum(data), sum(counts))
        write_whole(shard_path(self.folder, shard, entry.checksum), data)
        for b in batches:
            (self.folder / PARTS / self.parts[b]).unlink()
        self.done[shard] = entry

    def _finish(self) -> None:
        mine = {i: s for i, s in self.done.items() if i % self.ranks.world == self.ranks.rank}
        every = {i: s for part in self.ranks.everyone(mine) for i, s in part.items()}
        assert self.work.count is not None
        stop = self.plan.base + -(-self.work.count // self.plan.run.shard_batches)
        count = stop + len(self.plan.later)
        if sorted(every) != list(range(count)):
            raise ValueError(
                f"batches: not as many as before: {self.folder} has {len(every)} shards, and these make {count}"
            )
        finished = replace(self.plan.run, shards=tuple(every[i] for i in range(self.plan.base, stop)))
        runs = list(self.plan.manifest.runs)
        runs[self.plan.number] = finished
        manifest = replace(self.plan.manifest, runs=tuple(runs))
        if self.fisher is not None:
            index = Index.of_shards(self.folder, manifest, every).share(self.ranks.rank, self.ranks.world)
            self.fisher.all_reduce(index, self.ranks)
            if self.fisher.kind == "kronecker":
                self.fisher.correct_together(index, self.ranks)
        self.ranks.first(lambda: self._conclude(manifest))

    def _conclude(self, manifest: Manifest) -> None:
        if self.fisher is not None:
            manifest = manifest.with_file(FISHER, self.fisher.save(self.folder / FISHER))
        if self.plan.run.shards is None:
            manifest = replace(manifest, order=self._order(manifest))
        manifest.save(self.folder)
        remove_others(self.folder, manifest.order)
        if not manifest.unfinished:
            shutil.rmtree(self.folder / PARTS, ignore_errors=True)

    def _order(self, manifest: Manifest) -> str | None:
        """Write the order of all samples, those of this run the last ones; return its checksum, or None for none."""
        rows = sum(shard.rows for shard in self.plan.earlier)
        count = sum(shard.rows for shard in manifest.shards) - rows
        if self.places is not None:
            check_order(self.places, count)
        before = None if manifest.order is None else read_order(self.folder, manifest.order, rows)
        order = joined(before, rows, self.places, count)
        return None if order is None else write_order(self.folder, order)


def write_index(
    source: RowSource,
    batches: Iterable[Any],
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    fisher: Fisher | None = None,
    ids: Ids | None = None,
    order: Sequence[int] | Tensor | None = None,
    append: bool = False,
    group: torch.distributed.ProcessGroup | None = None,
    about: Mapping[str, str] | None = None,
    progress: bool = False,
) -> Index:
    """Compress into a folder; see `Compressor.compress`."""
    if dtype is not None and dtype not in DTYPES.values():
        raise ValueError(f"dtype is {dtype}; it must be one of {', '.join(f'torch.{name}' for name in DTYPES)}")
    if shuffles(batches):
        raise ValueError(
            "batches: a shuffling DataLoader gives another order each time; make it with shuffle=False, or with a "
            "sampler of a fixed order. Ranks share the work by group=, each with all batches"
        )
    if fisher is not None and fisher.count:
        raise ValueError(f"fisher has {fisher.count} samples; pass an empty one, such as dropinf.Fisher('block')")
    ranks, folder, places = Ranks(group), Path(path), order_of(batches, order)
    with ranks.watched(), locked(folder, ranks):
        first, batches = first_batch(batches)
        plan = Opening(source, batches, folder, ranks, ids).plan(first, dtype, append, about or {})
        Writer(source, batches, plan, ranks, ids, fisher, places).write(progress)
    return Index(folder)
