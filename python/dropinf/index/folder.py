"""The folder of an index: what is in it, and one writer at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from .. import files
from ..files import SUFFIX, TEMPORARY, make_folder
from ..ranks import Ranks

LOCK = ".lock"
SHARDS, PARTS = "shards", "parts"
SKETCH, FISHER, PASSAGES = "sketch.safetensors", "fisher.safetensors", "passages.jsonl"
PROBE = "first_batch.safetensors"
CODE = "code.safetensors"  # of rows of few bits


def shard_path(folder: Path, number: int, checksum: str) -> Path:
    return folder / SHARDS / f"{number:06d}-{checksum}{SUFFIX}"


# Files that are numbered: their numbers, and their checksums.
PART_NAME = re.compile(r"(\d{9,})-([0-9a-f]{32})" + re.escape(SUFFIX))
SHARD_NAME = re.compile(r"(\d{6,})-([0-9a-f]{32})" + re.escape(SUFFIX))
_STRAY = re.compile(r"\..+\.[0-9a-f]{32}" + re.escape(TEMPORARY))


_held: set[int] = set()  # locks of this process, as open files
_known: dict[Path, tuple[int, int]] = {}  # folders that this process has locked -> device and number of the lock


class MovedError(ValueError):
    """Another folder, or none, stands where one was that is being written to."""


@contextmanager
def locked(folder: Path, ranks: Ranks, *, make: bool = True) -> Iterator[None]:
    """Keep other runs out of the folder while inside; the lock is released however this run ends.

    ``make``: make the folder where there is none.

    Raises:
        ValueError: another run has it, or the folder was moved or removed meanwhile (`MovedError`).
    """

    def acquire() -> int:
        if make:
            make_folder(folder)
        elif not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no longer there; open the index where it is now")
        try:
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
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
        _know(folder, os.fstat(handle))
    try:
        check_here(folder)
        yield
        check_here(folder)
    except MovedError:
        raise
    except (OSError, ValueError):
        check_here(folder)  # what is missing then is only elsewhere
        raise
    finally:
        _known.pop(folder, None)
        if ranks.rank == 0:
            _held.discard(handle)
            os.close(handle)


def _know(folder: Path, lock: os.stat_result) -> None:
    _known[folder] = lock.st_dev, lock.st_ino


def know(folder: Path) -> None:
    """Note which folder was locked by another rank, to find out where it is moved."""
    if folder not in _known:
        _know(folder, os.stat(folder / LOCK))


def is_here(path: Path) -> bool:
    """Return whether a folder that is locked, by its path or that of a file in it, still is the one that stands there.

    The lock is on the folder, and files go to its path: of which another run may have made a new folder.
    """
    folder = next((place for place in (path, *path.parents[:2]) if place in _known), None)
    if folder is None:
        return True
    try:
        found = os.stat(folder / LOCK)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return (found.st_dev, found.st_ino) == _known[folder]


def check_here(path: Path) -> None:
    """Raise MovedError where another folder, or none, stands where one was locked; see `is_here`."""
    if not is_here(path):
        folder = next(place for place in (path, *path.parents[:2]) if place in _known)
        raise MovedError(
            f"{folder}: moved or removed while it was written to (or its {LOCK} was); what stands there now is left "
            "as it is. Move the folder back and run it again, which goes on from there, or name another folder"
        )


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file of an index atomically, unless its folder was moved since it was locked."""
    files.write_whole(path, data, partial(check_here, path))


def make_place(path: Path) -> None:
    """Make a folder in that of an index, unless that was moved since it was locked."""
    check_here(path)
    make_folder(path)


def remove(path: Path) -> None:
    """Remove a file of an index, if it is there, unless its folder was moved since it was locked."""
    check_here(path)
    path.unlink(missing_ok=True)


def _let_go() -> None:
    """Let go of the locks of the process that this one was forked of: a worker of a loader would keep them."""
    _known.clear()
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
        remove(place / match[0])
    check_here(place)
    with contextlib.suppress(OSError):  # not empty, or not there
        place.rmdir()


def check_free(folder: Path) -> None:
    """Raise ValueError where a folder without a manifest holds rows of an index, or files that are not one's."""
    made = [path for part in (folder / SHARDS, folder / PARTS, folder) for path in sorted(part.glob(f"*{SUFFIX}"))]
    made = [path for path in made if path.name not in (SKETCH, PROBE, CODE)]
    if made:
        raise ValueError(
            f"out: {folder} has files of an index ({made[0]}) but no manifest, which says of what model and data they "
            "are; restore the manifest, or delete the folder"
        )
    own = {folder / name for name in (SHARDS, PARTS, SKETCH, PROBE, CODE, PASSAGES, LOCK)}
    found = (path for place in (folder, folder / SHARDS, folder / PARTS) if place.is_dir() for path in place.iterdir())
    others = sorted(str(p.relative_to(folder)) for p in found if p not in own and not _STRAY.fullmatch(p.name))
    if others:
        raise ValueError(f"out: {folder} is no index and not empty (it has {others[0]!r}); name a new folder")
