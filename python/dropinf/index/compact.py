"""Merging the small shards of many appends into large ones: rows, their order, ids and fingerprints stay."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import safetensors.torch
from torch import Tensor

from ..files import checksum, serialize, sync_folder
from .folder import SHARD_NAME, SHARDS, is_here, names, remove, shard_path, write_whole
from .manifest import Call, Manifest, Run, ShardEntry
from .runs import Plan
from .shards import SHARD_BYTES, ShardFile, ShardHeader, join_rows, read_shard_header

GATHERED = 128  # small runs beside each other that an append merges


def compact(folder: Path, manifest: Manifest) -> Manifest:
    """Merge neighbouring runs of small shards, and return the manifest with what they became.

    New files are whole before the manifest names them, and the old ones go after: killed at any instant, the index is
    as before or as it will be. The folder must be locked.

    Raises:
        ValueError: a run is not finished, or a shard is damaged; nothing is changed then.
    """
    if manifest.unfinished:
        raise ValueError(
            f"{folder}: a run is not finished; finish it with the same batches, or give it up with "
            "Index.discard(), before shards are merged"
        )
    sweep_merged(folder, manifest)
    groups = _groups(manifest)
    if not groups:
        return manifest
    made: list[Path] = []
    runs: list[Run | None] = list(manifest.runs)
    number = manifest.next_number
    try:
        for group in groups:
            run = _merge(folder, manifest, group, number, made)
            runs[group.start : group.stop] = [run, *[None] * (len(group) - 1)]
            number += len(run.shards or ())
    except BaseException:
        for path in made if is_here(folder) else ():
            path.unlink(missing_ok=True)
        raise
    manifest = replace(manifest, runs=tuple(run for run in runs if run is not None))
    manifest.save(folder)
    sweep_merged(folder, manifest)
    return manifest


def compact_gathered(folder: Path, manifest: Manifest) -> None:
    """Merge shards where many small runs have gathered; what hinders that is no error of the append before."""
    if any(len(group) >= GATHERED for group in _groups(manifest)):
        with suppress(OSError, ValueError):
            compact(folder, manifest)


def sweep_merged(folder: Path, manifest: Manifest) -> None:
    """Remove the files that merging has left: those before, and those that a merge was ended with before it counted."""
    known = {shard_path(folder, shard.number, shard.checksum).name for shard in manifest.shards}
    there = {match[0]: match for match in names(folder / SHARDS, SHARD_NAME)}
    others = [match for name, match in there.items() if name not in known]
    if not others or not known <= there.keys():  # others may hold the rows of those that are missing
        return
    gone = {key for run in manifest.runs for key in run.replaces}
    if not manifest.unfinished:
        gone |= {_key(manifest, group, whole=whole) for group in _groups(manifest) for whole in (True, False)}
    for match in others:
        with suppress(ValueError):  # of something else
            if read_shard_header(folder / SHARDS / match[0]).run in gone:
                remove(folder / SHARDS / match[0])
    sync_folder(folder / SHARDS)


@contextmanager
def merges_told(folder: Path, manifest: Manifest, shard: ShardEntry) -> Iterator[None]:
    """Raise ValueError that says so where a shard cannot be read inside because it was merged since it was known."""
    try:
        yield
    except (ValueError, FileNotFoundError):
        now = Manifest.load(folder).shards
        if shard in now or now == manifest.shards:
            raise
        raise ValueError(f"{folder}: its shards were merged since it was opened; open it again") from None


def _groups(manifest: Manifest) -> list[range]:
    """Return the runs that are merged: neighbours of small shards, of which there are fewer afterwards."""
    small = [_is_small(manifest, run) for run in manifest.runs]
    found, start = [], 0
    for n in range(len(small) + 1):
        if n == len(small) or not small[n]:
            found.append(range(start, n))
            start = n + 1
    return [group for group in found if len(_piles(manifest, group)) < len(_shards(manifest, group))]


def _is_small(manifest: Manifest, run: Run) -> bool:
    shards = run.shards or ()
    return 2 * run.rows * manifest.codec.row_bytes < len(shards) * SHARD_BYTES


def _shards(manifest: Manifest, group: range) -> list[tuple[Run, ShardEntry]]:
    return [(manifest.runs[n], shard) for n in group for shard in manifest.runs[n].shards or ()]


def _piles(manifest: Manifest, group: range) -> list[list[tuple[Run, ShardEntry]]]:
    """Return the shards of each new one."""
    piles: list[list[tuple[Run, ShardEntry]]] = []
    most, rows = SHARD_BYTES // manifest.codec.row_bytes, 0
    for run, shard in _shards(manifest, group):
        if not piles or rows + shard.rows > most:
            piles.append([])
            rows = 0
        piles[-1].append((run, shard))
        rows += shard.rows
    return piles


def _key(manifest: Manifest, group: range, *, whole: bool = True) -> str:
    """Return what the files of a merged run are known by; not ``whole``: as earlier versions did."""
    return manifest.key("merged", [manifest.runs[n].key for n in group], whole=whole)


def _merge(folder: Path, manifest: Manifest, group: range, number: int, made: list[Path]) -> Run:
    """Write the shards of a group as fewer, from `number` on, and return the run that they are; note them in `made`."""
    key = _key(manifest, group)
    shards: list[ShardEntry] = []
    batches = dict.fromkeys((manifest.runs[n].key for n in group), 0)
    for pile in _piles(manifest, group):
        pieces, headers = [], []
        for run, shard in pile:
            piece, header = _read(folder, manifest, run, shard)
            pieces.append(piece)
            headers.append(header)
            batches[run.key] += len(header.batches)
        header = ShardHeader(
            tuple(count for header in headers for count in header.batches),
            tuple(found for header in headers for found in header.prints),
            key,
        )
        data = serialize(join_rows(pieces), header.plain())
        shard = ShardEntry(checksum(data), sum(header.batches), number + len(shards))
        made.append(shard_path(folder, shard.number, shard.checksum))
        write_whole(made[-1], data)
        shards.append(shard)
    runs = [manifest.runs[n] for n in group]
    calls = [call for run in runs for call in run.calls or (Call(run.first, batches[run.key], run.rows, run.printed),)]
    return Run(
        runs[0].first,
        sum(batches.values()),
        runs[-1].shard_batches,
        key,
        tuple(shards),
        all(run.printed for run in runs),
        tuple(calls),
        tuple(run.key for run in runs),
    )


def _read(folder: Path, manifest: Manifest, run: Run, shard: ShardEntry) -> tuple[dict[str, Tensor], ShardHeader]:
    """Return what a shard holds.

    Raises:
        ValueError: it is missing, damaged, or of another run.
    """
    file = ShardFile(shard_path(folder, shard.number, shard.checksum), manifest.codec, shard.rows)
    file.verify(shard.checksum)
    header = Plan(folder, manifest, manifest.runs.index(run)).own_header(file.path)
    return safetensors.torch.load(file.path.read_bytes()), header
