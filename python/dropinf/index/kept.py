"""The Fisher matrix that is kept with an index, in place of the one before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from ..files import checksum, file_checksum, write_whole
from ..fisher.fisher import Fisher
from ..gradients import GradientSource
from ..ranks import Ranks
from .folder import FISHER, locked
from .manifest import NEXT_FISHER, Manifest


class _Kept(GradientSource, Protocol):
    path: Path
    manifest: Manifest


def load_fisher(index: _Kept) -> Fisher:
    """Return the Fisher matrix in an index's folder; see `Index.fisher`."""
    if FISHER not in index.manifest.files:
        raise FileNotFoundError(f"{index.path}: no Fisher matrix in it; use build_fisher(index), or save_fisher")
    path = index.path / FISHER
    if not has_fisher(index.path, index.manifest):
        if Manifest.load(index.path) != index.manifest:
            raise ValueError(f"{path}: replaced since this index was opened; open it again")
        raise ValueError(f"{path}: damaged; build it again: index.save_fisher(dropinf.build_fisher(index))")
    fisher = Fisher.load(path)
    try:
        fisher.check(index, "fisher and index")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if fisher.count != len(index):
        raise ValueError(
            f"{path}: stale, of {fisher.count} samples where the index has {len(index)}; build it again: "
            "index.save_fisher(dropinf.build_fisher(index)), or append with fisher="
        )
    return fisher


def save_fisher(index: _Kept, fisher: Fisher) -> Manifest:
    """Write it into the folder, and return the manifest that names it; see `Index.save_fisher`."""
    fisher.check(index, "fisher and index")
    if fisher.count != len(index):
        raise ValueError(
            f"fisher: it is of {fisher.count} samples, and the index has {len(index)}; use build_fisher(index), or "
            "fisher.save(path) for one of a part"
        )
    with locked(index.path, Ranks(None)):
        now = Manifest.load(index.path)
        if replace(now, files={}) != replace(index.manifest, files={}):
            raise ValueError(
                f"{index.path}: it has changed since it was opened (from {len(index)} samples to "
                f"{sum(shard.rows for shard in now.shards)}, or a run was begun); open it again and build the "
                "Fisher matrix of what is there now"
            )
        return keep_fisher(index.path, now, now, fisher)


def keep_fisher(folder: Path, before: Manifest, after: Manifest, fisher: Fisher) -> Manifest:
    """Write the Fisher matrix and the manifest `after`, which then names it; the folder has `before`, and is locked.

    The manifest names the new file before it is there, beside the old one: at every instant the file is one of the two.
    """
    data = fisher.to_bytes()
    before.with_file(NEXT_FISHER, checksum(data)).save(folder)
    write_whole(folder / FISHER, data)
    files = {name: found for name, found in after.files.items() if name != NEXT_FISHER}
    after = replace(after, files={**files, FISHER: checksum(data)})
    after.save(folder)
    return after


def has_fisher(folder: Path, manifest: Manifest) -> bool:
    """Return whether the folder's Fisher matrix is one that the manifest names; raise FileNotFoundError without one."""
    return file_checksum(folder / FISHER) in (manifest.files.get(FISHER), manifest.files.get(NEXT_FISHER))
