"""The Fisher matrix that is kept with an index, in place of the one before.

A new file stands beside the one before, named by its checksum, until the manifest names it; then it takes its place. So
at every instant the matrix that the manifest names is there.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from ..files import SUFFIX, checksum, file_checksum, sync_folder
from ..fisher.compared import mean_squares
from ..fisher.fisher import Fisher
from ..gradients import GradientSource
from ..loss_name import is_same_loss
from ..origin import Origin, check_one_model
from ..ranks import Ranks
from .folder import FISHER, check_here, locked, names, remove, write_whole
from .manifest import Manifest

_SAME_SQUARES = 2e-2  # of a Fisher matrix beside rows that are stored in less than it was made of
_NOISE = 1e-9
NEW_FISHER = re.compile(r"fisher-([0-9a-f]{32})" + re.escape(SUFFIX))


class _Kept(GradientSource, Protocol):
    path: Path
    manifest: Manifest

    @property
    def origin(self) -> Origin | None: ...


def fisher_paths(folder: Path, expected: str) -> list[Path]:
    """Return where a matrix with this checksum may be: first beside the one before, and later in its place."""
    return [folder / f"fisher-{expected}{SUFFIX}", folder / FISHER]


def write_fisher(folder: Path, fisher: Fisher) -> str:
    """Write a Fisher matrix beside the one before, and return its checksum, for the manifest to name."""
    data = fisher.to_bytes()
    found = checksum(data)
    write_whole(fisher_paths(folder, found)[0], data)
    return found


def settle_fisher(folder: Path, manifest: Manifest) -> None:
    """Put the matrix that the manifest names in place of the one before; remove one that it came not to name."""
    for match in names(folder, NEW_FISHER):
        if match[1] == manifest.files.get(FISHER):
            check_here(folder)
            os.replace(folder / match[0], folder / FISHER)
        else:
            remove(folder / match[0])
        sync_folder(folder)


def load_fisher(index: _Kept) -> Fisher:
    """Return the Fisher matrix in an index's folder; see `Index.fisher`."""
    if FISHER not in index.manifest.files:
        raise FileNotFoundError(f"{index.path}: no Fisher matrix in it; use build_fisher(index), or save_fisher")
    path, fisher = index.path / FISHER, _load(index)
    if fisher is None and Manifest.load(index.path) == index.manifest:
        fisher = _load(index)  # where the same matrix was saved again meanwhile
    if fisher is None:
        if Manifest.load(index.path) != index.manifest:
            raise ValueError(f"{path}: replaced since this index was opened; open it again")
        if not path.exists():
            raise FileNotFoundError(f"{path}: missing; build it again: index.save_fisher(dropinf.build_fisher(index))")
        raise ValueError(f"{path}: damaged; build it again: index.save_fisher(dropinf.build_fisher(index))")
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


def _load(index: _Kept) -> Fisher | None:
    """Return the matrix that the manifest names; None where no file is that."""
    expected = index.manifest.files[FISHER]
    for path in fisher_paths(index.path, expected):
        with suppress(FileNotFoundError):
            before = _stamp(path)
            if file_checksum(path) == expected:
                try:
                    fisher = Fisher.load(path)
                except (OSError, RuntimeError, ValueError):  # the reader of its format says so in its own way
                    if _stamp(path) == before:
                        raise
                    continue
                if _stamp(path) == before:  # or else it was replaced
                    return fisher
    return None


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def check_its_fisher(index: _Kept, fisher: Fisher) -> None:
    """Raise ValueError where a matrix is known to be of other gradients than an index holds: it is read once."""
    way_out = "Use build_fisher(index), or fisher.save(path) beside it"
    check_one_model([fisher, index], ["fisher", str(index.path)], way_out)
    losses = {loss for _, loss in fisher.origins if loss}
    if index.origin is not None and not all(is_same_loss(index.origin.loss, loss) for loss in losses):
        raise ValueError(f"fisher: it is of gradients of another loss than {index.path}. {way_out}")
    found = list(mean_squares(fisher, index))
    noise = _NOISE * sum(its for _, _, its in found)  # what layers without a gradient hold
    for name, mine, its in found:
        if not abs(mine - its) <= _SAME_SQUARES * max(mine, its) + noise:
            raise ValueError(
                f"fisher: it is of other gradients than {index.path}: those of {name} have a mean square norm of "
                f"{mine:.6g} in it and of {its:.6g} in the index. {way_out}"
            )


def save_fisher(index: _Kept, fisher: Fisher) -> Manifest:
    """Write it into the folder, and return the manifest that names it; see `Index.save_fisher`."""
    if index.manifest.codec.bits is not None:
        raise ValueError(f"{index.path}: its rows are of few bits, and have their Fisher matrix in their code")
    fisher.check(index, "fisher and index")
    if fisher.count != len(index):
        raise ValueError(
            f"fisher: it is of {fisher.count} samples, and the index has {len(index)}; use build_fisher(index), or "
            "fisher.save(path) for one of a part"
        )
    with locked(index.path, Ranks(None), make=False):
        pass  # the folder is there
    check_its_fisher(index, fisher)
    with locked(index.path, Ranks(None), make=False):
        now = Manifest.load(index.path)
        if replace(now, files={}) != replace(index.manifest, files={}):
            raise ValueError(
                f"{index.path}: it has changed since it was opened (from {len(index)} samples to "
                f"{sum(shard.rows for shard in now.shards)}, or a run was begun); open it again and build the "
                "Fisher matrix of what is there now"
            )
        manifest = now.with_file(FISHER, write_fisher(index.path, fisher))
        manifest.save(index.path)
        settle_fisher(index.path, manifest)
    return manifest
