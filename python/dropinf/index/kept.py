"""The Fisher matrix that is kept with an index, in place of the one before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..files import checksum, file_checksum, write_whole
from ..fisher.fisher import Fisher
from .folder import FISHER
from .manifest import NEXT_FISHER, Manifest


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
