"""Compressing into an index: batch by batch, so that whatever ends it, the next run goes on with the next batch.

Batches are numbered; every `shard_batches` of them make a shard, and shard i belongs to rank i modulo the number of
ranks. A finished batch is a file of its own, under `parts`, until its shard is complete. Each file has its checksum in
its name and is complete once it has that name, so what is there says all that is done: by whatever ranks, in however
many runs, the bytes are the same.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import SUFFIX, checksum, serialize
from ..fisher.fisher import Fisher, FisherKind
from ..outflow import Outflow
from ..ranks import Ranks
from ..workload import (
    Ids,
    check_ids_stay,
    check_order,
    check_order_before,
    order_of,
)
from .agreement import agree, agree_on_rows, check_one_folder, compare_batches, facts_of
from .arguments import StoredDtype, check_options, coded, first_of
from .codec import Converted
from .compact import compact_gathered
from .discard import discard
from .fingerprint import fingerprint
from .finished import Finished
from .folder import FISHER, PARTS, know, locked, remove, remove_parts, shard_path, write_whole
from .kept import settle_fisher, write_fisher
from .manifest import Manifest, ShardEntry
from .order import check_kept, joined, read_order, remove_others, write_order
from .parts import Share
from .plan import Opening
from .reader import Index
from .runs import Plan, plans_of
from .shards import ShardHeader, join_rows, pack_texts
from .source import RowSource
from .work import Work


class Writer:
    """One run into a folder, as one rank sees it."""

    def __init__(
        self,
        source: RowSource,
        batches: Iterable[Any],
        first: str,
        plan: Plan,
        ranks: Ranks,
        ids: Ids | None,
        fisher: Fisher | None,
        places: Tensor | None = None,
        wrote: Callable[[int], None] | None = None,
    ) -> None:
        self.source, self.batches, self.plan, self.ranks, self.ids = source, batches, plan, ranks, ids
        self.fisher, self.folder, self.codec, self.wrote = fisher, plan.folder, plan.manifest.codec, wrote
        self.places = places  # of the run's samples
        self.made: list[Path] = []  # files of this call
        self.version = source.version()
        self.finished = Finished(plan)
        self.done, self.parts = self.finished.shards, self.finished.parts
        self.next = self._next(plan.base if fisher is None or plan.undecided else 0)  # else all are read, for it
        self.work = self._work(first)

    def write(self, progress: bool) -> None:
        """Compare what is finished, compress what is missing, and finish the run."""
        self._check_count()
        try:
            with Outflow() as self.outflow:
                self.source.stream(self.work, self._take, progress=progress, where=self._where)
        finally:
            if self.made:
                self._check_model()
        self._check_count()
        self._check_order(self.plan)
        self._advance()
        self._finish()

    def _work(self, first: str) -> Work:
        size, base = self.plan.run.shard_batches, self.plan.base
        if isinstance(self.batches, Share) and self.plan.run.shards is None and self.batches.each % size:
            raise ValueError(
                f"batches: {self.folder} was begun without dropinf.Parts, or by more or fewer ranks; go on as it was "
                "begun, or delete the folder"
            )

        def share(b: int) -> bool:
            return self.batches.is_mine(b) if isinstance(self.batches, Share) else self._is_mine(base + b // size)

        def beside(b: int) -> bool:  # whether it is the next rank's
            own = isinstance(self.batches, Share) or self.ranks.world == 1
            return not own and (base + b // size - self.ranks.rank) % self.ranks.world == 1

        work = Work(self.batches, first, self.finished, share, beside, self.ids)
        if self.ranks.world > 1 and self.source.is_sharded:
            if work.count is None:
                raise ValueError("batches: a sharded model needs a list or a DataLoader, whose length is known")
            work.rounds = max(self.ranks.everyone(len(work)))
        return work

    def _is_mine(self, shard: int) -> bool:
        """Return whether a shard is this rank's."""
        if isinstance(self.batches, Share):
            first = (shard - self.plan.base) * self.plan.run.shard_batches
            if 0 <= first < len(self.batches):
                return self.batches.is_mine(first)
        return shard % self.ranks.world == self.ranks.rank

    def _next(self, shard: int) -> int:
        """Return this rank's first shard from this one on."""
        while not self._is_mine(shard):
            shard += 1
        return shard

    def _check_count(self) -> None:
        """Raise ValueError where more batches are finished than there are."""
        last = max(self.finished, default=-1)
        if self.work.count is not None and last >= self.work.count:
            raise ValueError(
                f"batches: not as many as before: {self.folder} has batch {last}, and there are {self.work.count} now"
            )
        begun = self.plan.run.batches
        if self.plan.call is None and None not in (begun, self.work.count) and begun != self.work.count:
            raise ValueError(
                f"batches: {self.folder} was begun with {begun} of them, and there are {self.work.count} now; go on "
                "with those of then, or give them up (Index.discard(), or delete the folder)"
            )

    def _check_model(self) -> None:
        """Raise ValueError where the model is another than it was, and take back what was made of its batches."""
        if self.source.is_sharded or self.source.fingerprint() == self.plan.manifest.model:
            self.version = self.source.version()
            return
        for path in self.made:
            remove(path)
        raise ValueError(
            f"model: its weights changed while its batches were compressed into {self.folder}; rows of this call are "
            "taken back: compress with the weights of then, and train a copy (copy.deepcopy(model))"
        )

    def _where(self, row: int) -> str:
        return f"sample {row} of batch {self.work.at}"

    def _take(self, flat: Tensor) -> None:
        """Have the rows of the batch that was computed kept, behind those before."""
        self.ranks.check()
        if self.source.version() != self.version:
            self._check_model()
        b = self.work.at
        if b is None:
            return
        if b in self.work.again:
            self.outflow.put(flat, partial(self.finished.check_rows, b))
            return
        texts = {} if self.ids is None else self._ids_of(self.work.batch, len(flat))
        converted, keep = self.codec.convert(flat), partial(self._keep, b, self.work.print, texts)
        if flat.device.type == "cpu":
            keep(converted)
        else:
            data, unpacked = converted.packed()
            self.outflow.put(data, lambda host: keep(unpacked(host)))

    def _keep(self, b: int, found: str, texts: dict[str, Tensor], converted: Converted) -> None:
        """Keep the rows of a batch of this fingerprint."""
        self.codec.check(converted, lambda row: f"sample {row} of batch {b}")
        count, kept = len(converted.kept["gradients"]), converted.kept | texts
        if self.plan.going_on and not self.made:
            self.plan.manifest.save(self.folder)  # the same bytes by every rank
        data = serialize(kept, ShardHeader((count,), (found,), self.plan.run.key).plain())
        name = f"{self.plan.first_part + b:09d}-{checksum(data)}{SUFFIX}"
        write_whole(self.folder / PARTS / name, data)
        self.made.append(self.folder / PARTS / name)
        self.parts[b] = name
        if self.wrote is not None:
            self.wrote(count)
        self._advance()

    def _ids_of(self, batch: Any, count: int) -> dict[str, Tensor]:
        assert self.ids is not None
        given = self.ids(batch)
        found = [] if given is None or isinstance(given, str | Set | Mapping) else list(given)  # which have no order
        if len(found) != count or not all(isinstance(name, str) for name in found):
            raise ValueError(
                f"ids: it gave {found[:3] if found else given!r}... for a batch of {count} samples; it must give "
                f"{count} strings, in order"
            )
        texts, offsets = pack_texts(found)
        return {"ids": texts, "id_offsets": offsets}

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
            if not self.plan.undecided:
                self._add_to_fisher(self.plan.manifest, self.next, entry)
            self.next = self._next(self.next + 1)

    def _add_to_fisher(self, manifest: Manifest, number: int, shard: ShardEntry) -> None:
        if self.fisher is not None:
            self.fisher.update(Index.of_shards(self.folder, manifest, {number: shard}))

    def _seal(self, shard: int, batches: range) -> None:
        pieces: list[dict[str, Tensor]] = []
        headers: list[ShardHeader] = []
        for b in batches:
            piece, header = self.finished.part(b)
            pieces.append(piece)
            headers.append(header)
        kept = join_rows(pieces)
        counts = tuple(len(p["gradients"]) for p in pieces)
        header = ShardHeader(counts, tuple(header.prints[0] for header in headers), self.plan.run.key)
        data = serialize(kept, header.plain())
        number = self.plan.first_number + shard - self.plan.base
        entry = ShardEntry(checksum(data), sum(counts), number)
        write_whole(shard_path(self.folder, number, entry.checksum), data)
        self.made.append(shard_path(self.folder, number, entry.checksum))
        self.done[shard] = entry
        self.finished.move(shard, dict(zip(batches, counts, strict=True)))
        for b in batches:
            remove(self.folder / PARTS / self.parts[b])

    def _finish(self) -> None:
        if self.ranks.world > 1:
            compare_batches(self.ranks, self.work.prints)
        manifest = self._finished_manifest()
        every = dict(enumerate(manifest.shards))
        if self.plan.undecided:
            manifest = self.ranks.first(lambda: self._decide(manifest))
            every = dict(enumerate(manifest.shards))
            for i in range(self.ranks.rank, len(every), self.ranks.world):
                self._add_to_fisher(manifest, i, every[i])
        if self.fisher is not None:
            index = Index.of_shards(self.folder, manifest, every).share(self.ranks.rank, self.ranks.world)
            self.fisher.all_reduce(index, self.ranks)
            if self.fisher.kind == "kronecker":
                self.fisher.correct_together(index, self.ranks)
        self.ranks.first(lambda: self._conclude(manifest))

    def _finished_manifest(self) -> Manifest:
        """Return the manifest with all shards of the run."""
        if self.plan.call is not None:
            return self.plan.manifest
        mine = {i: s for i, s in self.done.items() if self._is_mine(i)}
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
        return replace(self.plan.manifest, runs=tuple(runs))

    def _decide(self, manifest: Manifest) -> Manifest:
        """Return the manifest with the run, or without it where an earlier one has the same batches, all of them."""
        plan = replace(self.plan, manifest=manifest)
        for other in plans_of(self.folder, manifest):
            alike = other.number < plan.number and other.began.first == plan.run.first
            mine, its = Finished(plan), Finished(other)
            if alike and mine.twin(its):
                rows = {b: mine.rows(b) for b in list(mine)[:1] + list(mine)[-1:]}
                without = discard(self.folder, self.plan.manifest)
                for b, found in rows.items():
                    its.check_rows(b, found)
                self._check_order(other)
                return without
        return manifest

    def _check_order(self, plan: Plan) -> None:
        """Raise ValueError where the samples of a finished call stand in another order than is asked for."""
        if plan.samples is not None and plan.began.printed:  # earlier versions had no order
            check_kept(self.folder, self.plan.manifest, plan.first_sample, plan.samples, self.places)

    def _conclude(self, manifest: Manifest) -> None:
        if self.plan.run.shards is None and len(manifest.runs) > self.plan.number:
            manifest = replace(manifest, order=self._order(manifest))
        if self.fisher is not None:
            manifest = manifest.with_file(FISHER, write_fisher(self.folder, self.fisher))
        manifest.save(self.folder)
        settle_fisher(self.folder, manifest)
        remove_others(self.folder, manifest.order)
        if not manifest.unfinished:
            remove_parts(self.folder)
            compact_gathered(self.folder, manifest)

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
    dtype: StoredDtype | None = None,
    fisher: FisherKind | Fisher | None = None,
    ids: Ids | None = None,
    order: Sequence[int] | Tensor | None = None,
    append: bool = False,
    group: torch.distributed.ProcessGroup | None = None,
    about: Mapping[str, str] | None = None,
    progress: bool = False,
    wrote: Callable[[int], None] | None = None,
) -> Index:
    """Compress into a folder; see `Compressor.compress`. `wrote` is told how many samples each batch added."""
    ranks = Ranks(group)
    with ranks.watched(), contextlib.ExitStack() as stack:  # the others wait for a rank whose arguments are refused
        fisher = check_options(batches, path, dtype, fisher, ids)
        folder, places = Path(path).absolute(), order_of(batches, order)
        check_order_before(places, batches, source.cu_seqlens)
        stack.enter_context(locked(folder, ranks))
        check_one_folder(ranks, folder)
        know(folder)
        source, stored = coded(source, dtype, folder, fisher)
        first, batches = first_of(batches, ranks, places)
        mine = found = fingerprint(first, named=ids is not None)
        if isinstance(batches, Share):
            first, found, places = *ranks.first(lambda: (first, found)), order_of(None, batches.order)
        if ranks.world > 1:
            if ids is not None:
                check_ids_stay(ids, first)
            names = None if ids is None else ids(first)
            agree(ranks, facts_of(source, batches, found, stored, fisher, names, append, places, folder))
            agree_on_rows(ranks, source, first)
        plan = Opening(source, batches, folder, ranks, ids, about).plan(first, found, stored, append)
        Writer(source, batches, mine, plan, ranks, ids, fisher, places, wrote).write(progress)
    return Index(folder)
