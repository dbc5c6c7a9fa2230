"""The folder of an index: what is in it, and one writer at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..files import SUFFIX, TEMPORARY, make_folder
from ..ranks import Ranks

SHARDS, PARTS = "shards", "parts"
SKETCH, FISHER, PASSAGES = "sketch.safetensors", "fisher.safetensors", "passages.jsonl"
PROBE = "first_batch.safetensors"


def shard_path(folder: Path, number: int, checksum: str) -> Path:
    return folder / SHARDS / f"{number:06d}-{checksum}{SUFFIX}"


# Files that are numbered: their numbers, and their checksums.
PART_NAME = re.compile(r"(\d{9,})-([0-9a-f]{32})" + re.escape(SUFFIX))
SHARD_NAME = re.compile(r"(\d{6,})-([0-9a-f]{32})" + re.escape(SUFFIX))
_STRAY = re.compile(r"\..+\.[0-9a-f]{32}" + re.escape(TEMPORARY))


_held: set[int] = set()  # locks of this process, as open files


@contextmanager
def locked(folder: Path, ranks: Ranks, *, make: bool = True) -> Iterator[None]:
    """Keep other runs out of the folder while inside; the lock is released however this run ends.

    ``make``: make the folder where there is none.
    """

    def acquire() -> int:
        if make:
            make_folder(folder)
        elif not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no longer there; open the index where it is now")
        try:
            handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise OSError(
                error.errno, f"{os.strerror(error.errno or 0)}; out must be a folder that you may write to", str(folder)
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise ValueError(
                f"out: another process is writing to {folder}; wait for it, or name another folder"
            ) from None
        return handle

    handle = ranks.first(acquire)
    if ranks.rank == 0:
        _held.add(handle)
    try:
        yield
    finally:
        if ranks.rank == 0:
            _held.discard(handle)
            os.close(handle)


def _let_go() -> None:
    """Let go of the locks of the process that this one was forked of: a worker of a loader would keep them."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


def names(folder: Path, pattern: re.Pattern[str]) -> Iterator[re.Match[str]]:
    """Yield the names in a folder that match, in order; none where there is no such folder."""
    if folder.is_dir():
        yield from (m for n in sorted(os.listdir(folder)) if (m := pattern.fullmatch(n)) and (folder / n).exists())


def remove_parts(folder: Path) -> None:
    """Remove the files of single batches, once shards hold them, and nothing else that is there."""
    place = folder / PARTS
    for match in names(place, PART_NAME):
        (place / match[0]).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not empty, or not there
        place.rmdir()


def check_free(folder: Path) -> None:
    """Raise ValueError where a folder without a manifest holds rows of an index, or files that are not one's."""
    made = [path for part in (folder / SHARDS, folder / PARTS, folder) for path in sorted(part.glob(f"*{SUFFIX}"))]
    made = [path for path in made if path.name not in (SKETCH, PROBE)]
    if made:
        raise ValueError(
            f"out: {folder} has files of an index ({made[0]}) but no manifest, which says of what model and data they "
            "are; restore the manifest, or delete the folder"
        )
    own = {folder / name for name in (SHARDS, PARTS, SKETCH, PROBE, PASSAGES, ".lock")}
    found = (path for place in (folder, folder / SHARDS, folder / PARTS) if place.is_dir() for path in place.iterdir())
    others = sorted(str(p.relative_to(folder)) for p in found if p not in own and not _STRAY.fullmatch(p.name))
    if others:
        raise ValueError(f"out: {folder} is no index and not empty (it has {others[0]!r}); name a new folder")
