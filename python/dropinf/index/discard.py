"""Giving up an append that is not finished, or a run of which nothing was stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..files import checksum, checksum_of, sync_folder
from .folder import (
    CODE,
    PART_NAME,
    PARTS,
    PASSAGES,
    PROBE,
    SHARD_NAME,
    SHARDS,
    SKETCH,
    names,
    remove,
    shard_path,
    write_whole,
)
from .kept import settle_fisher
from .manifest import NAME, Manifest
from .order import remove_others


def discard(folder: Path, manifest: Manifest) -> Manifest:
    """Remove what a run has that is not finished, then the run itself, and return the manifest without it.

    Rows go first: killed in between, the run still stands in the manifest, to be finished or given up again. The folder
    must be locked.

    Raises:
        ValueError: no run is finished.
    """
    if not manifest.shards:
        raise ValueError(f"{folder}: no run in it is finished, so there is nothing to go back to; delete the folder")
    if manifest.unfinished:
        kept = {shard_path(folder, shard.number, shard.checksum).name for shard in manifest.shards}
        for place, pattern in ((folder / SHARDS, SHARD_NAME), (folder / PARTS, PART_NAME)):
            for match in names(place, pattern):
                if match[0] not in kept:
                    remove(place / match[0])
            if place.is_dir():
                sync_folder(place)
        manifest = replace(manifest, runs=manifest.runs[:-1])
    passages = _passages_left(folder, manifest)
    if passages is not None:
        manifest = manifest.with_file(PASSAGES, checksum(passages))
    manifest.save(folder)
    remove_others(folder, manifest.order)
    settle_fisher(folder, manifest)
    if passages is not None and passages != (folder / PASSAGES).read_bytes():
        write_whole(folder / PASSAGES, passages)
    return manifest


def drop_unbegun(folder: Path, manifest: Manifest) -> Manifest | None:
    """Give up a run of which no batch was stored, as a call may go on with another model or loss.

    Return the manifest that is left; None, and none in the folder, where there was no other run. The folder must be
    locked.
    """
    known = {shard_path(folder, shard.number, shard.checksum).name for shard in manifest.shards}
    shards = (match[0] for match in names(folder / SHARDS, SHARD_NAME))
    if not manifest.unfinished or any(names(folder / PARTS, PART_NAME)) or any(name not in known for name in shards):
        return manifest
    if manifest.shards:
        return discard(folder, manifest)
    own = [name for name in (SKETCH, CODE, PROBE, PASSAGES) if manifest.files.get(name) == checksum_of(folder / name)]
    for name in (NAME, *own):  # the manifest first: it names the others
        remove(folder / name)
    sync_folder(folder)
    return None


def settle_passages(folder: Path, manifest: Manifest) -> Manifest:
    """Take out the passages of an append that was ended before its run began; return the manifest that is then there.

    The folder must be locked.
    """
    if manifest.unfinished or not has_more_passages(folder, manifest):
        return manifest
    return discard(folder, manifest)


def has_more_passages(folder: Path, manifest: Manifest) -> bool:
    """Return whether passages of an append stand there that was ended before its run began."""
    left = _passages_left(folder, manifest)
    return left is not None and left != (folder / PASSAGES).read_bytes()


def _passages_left(folder: Path, manifest: Manifest) -> bytes | None:
    """Return the passages of the samples that stay, as an append begins with its own; None where there are none."""
    known, path = manifest.files.get(PASSAGES), folder / PASSAGES
    if known is None or not path.exists():
        return None
    lines = path.read_bytes().splitlines(keepends=True)
    left = b"".join(lines[: sum(shard.rows for shard in manifest.shards)])
    # Neither: it is damaged, and stays as it is.
    return left if known in (checksum(left), checksum(b"".join(lines))) else None
