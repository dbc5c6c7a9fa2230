"""Files of stored rows: where their tensors lie, and how a window of a file is read."""

from __future__ import annotations

import fcntl
import json
import math
import mmap
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ..files import _KEY, file_checksum, is_checksum
from .codec import Codec
from .products import Stored

_TAGS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_HEADER_BYTES = 1 << 26
SHARD_BYTES = 1 << 26  # of a large shard
SMALL_BYTES = 1 << 21  # of shards that are read as one block
READ_BYTES = 1 << 22  # read at a time: what the cache still holds as it is used
Stamp = tuple[int, int, int, int]


def pack_texts(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return the texts as UTF-8 bytes uint8 [B], and where each starts and ends, int64 [n + 1]."""
    try:
        encoded = [text.encode() for text in texts]
    except UnicodeEncodeError as error:
        raise ValueError(f"ids: {error.object!r} is no text: UTF-8 cannot hold it; give another id") from None
    offsets = torch.tensor([0, *map(len, encoded)], device="cpu").cumsum(0)
    joined = bytearray(b"".join(encoded))
    return (
        torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8, device="cpu")
    ), offsets


def unpack_texts(data: Tensor, offsets: Tensor) -> list[str]:
    raw, edges = bytes(data.numpy()), offsets.tolist()
    return [raw[a:b].decode() for a, b in pairwise(edges)]


@dataclass(frozen=True)
class ShardFile:
    """One file of stored rows: where its tensors lie, checked against what they must be.

    Raises ValueError where the file is not a whole safetensors file of `rows` rows of `codec`.
    """

    path: Path
    codec: Codec
    rows: int

    def check_size(self) -> None:
        """Raise ValueError unless the file is there and large enough for its rows."""
        try:
            found = self.path.stat().st_size
        except FileNotFoundError:
            raise self._missing() from None
        if found < self.rows * self.codec.row_bytes:
            raise ValueError(
                f"{self.path}: {found} bytes, too few for {self.rows} rows; restore it, or delete it and run the same "
                "compress again to make it"
            )

    def _missing(self) -> ValueError:
        return ValueError(f"{self.path}: missing; restore it, or run the same compress again to make it")

    def _open(self) -> FileIO:
        try:
            return open(self.path, "rb", buffering=0)
        except FileNotFoundError:
            raise self._missing() from None

    def verify(self, expected: str) -> None:
        """Raise ValueError unless the file's bytes have this checksum."""
        try:
            found = file_checksum(self.path)
        except FileNotFoundError:
            raise self._missing() from None
        if found != expected:
            raise ValueError(
                f"{self.path}: damaged, its bytes do not match their checksum; restore it, or delete it and run the "
                "same compress again to make it"
            )

    def layout(self) -> dict[str, tuple[int, int]]:
        """Return tensor name -> where its bytes start in the file, and how many there are."""
        try:
            header, start, size = _read_header(self.path)
        except FileNotFoundError:
            raise self._missing() from None
        need = {name: (_TAGS[dtype], [self.rows, *shape]) for name, (dtype, shape) in self.codec.tensors.items()}
        for name, (tag, shape) in need.items():
            entry = header.get(name)
            if not isinstance(entry, dict) or entry.get("dtype") != tag or entry.get("shape") != shape:
                raise ValueError(f"{self.path}: its {name} are not {tag} {shape}, as the manifest says")
        found = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = _offsets(self.path, name, entry, size - start)
            found[name] = (start + first, last - first)
        for name, (_, shape) in need.items():
            item = self.codec.tensors[name][0].itemsize
            if found[name][1] != math.prod(shape) * item:
                raise ValueError(f"{self.path}: its {name} take {found[name][1]} bytes, not {math.prod(shape) * item}")
        at = start
        for first, count in [*sorted(found.values()), (size, 0)]:
            if first != at:
                raise ValueError(f"{self.path}: its tensors overlap, or leave a gap")
            at += count
        return found

    def stamp(self) -> Stamp:
        """Return what changes with the file: its number, size and time.

        Raises:
            ValueError: it is missing.
        """
        try:
            return _stamp(self.path.stat())
        except FileNotFoundError:
            raise self._missing() from None

    def read(
        self,
        layout: Mapping[str, tuple[int, int]],
        windows: Sequence[tuple[int, int]],
        stamp: Stamp,
        into: Mapping[str, Tensor],
    ) -> None:
        """Read windows of stored rows, each (first row, rows), one after another into tensors [rows of all, ...].

        Read, not mapped: a process that uses pages of a file that another one cut is ended by a signal. The system is
        told to read as much again meanwhile, of a single window.

        Raises:
            ValueError: the file is no longer what it was at `stamp`, or is cut meanwhile.
        """
        with self._open() as file:
            if _stamp(os.fstat(file.fileno())) != stamp:
                raise ValueError(f"{self.path}: it changed while it was read; see index.verify()")
            for name, out in into.items():
                dtype, shape = self.codec.tensors[name]
                row, data, done = math.prod(shape) * dtype.itemsize, _bytes_of(out), 0
                for first, count in windows:
                    start, stop = layout[name][0] + first * row, done + count * row
                    _fill(file, start, data[done:stop])
                    done = stop
                if len(windows) == 1 and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), start + done, done, os.POSIX_FADV_WILLNEED)

    @contextmanager
    def mapped(
        self, layout: Mapping[str, tuple[int, int]], first: int, count: int, stamp: Stamp
    ) -> Iterator[Stored | None]:
        """Yield stored rows whose values are views of the mapped file, which nobody can cut meanwhile.

        None where the system does not see to that: then they must be read.

        Raises:
            ValueError: the file is no longer what it was at `stamp`.
        """
        with self._open() as file, leased(file) as held:
            if _stamp(os.fstat(file.fileno())) != stamp:
                raise ValueError(f"{self.path}: it changed while it was read; see index.verify()")
            if not held:
                yield None
                return
            parts = {}
            for name, (dtype, shape) in self.codec.tensors.items():
                width = math.prod(shape)
                start, size = layout[name][0] + first * width * dtype.itemsize, count * width * dtype.itemsize
                found = _mapped if name == "gradients" else _read
                parts[name] = found(file, start, count * width, dtype).view(count, *shape)
                os.posix_fadvise(file.fileno(), start + size, size, os.POSIX_FADV_WILLNEED)
            yield Stored(parts["gradients"], parts.get("scale"))

    def texts(self, layout: Mapping[str, tuple[int, int]]) -> list[str]:
        """Return the ids of the rows."""
        with self._open() as file:
            parts = []
            for name, dtype in (("ids", torch.uint8), ("id_offsets", torch.int64)):
                if name not in layout:
                    raise ValueError(f"{self.path}: it has no {name}, as the manifest says")
                start, size = layout[name]
                parts.append(_read(file, start, size // dtype.itemsize, dtype))
        data, offsets = parts
        edges = [0, *offsets.tolist(), len(data)]
        if len(offsets) != self.rows + 1 or edges[1] != 0 or edges != sorted(edges) or edges[-2] != len(data):
            raise ValueError(f"{self.path}: its id_offsets are not those of {self.rows} ids in {len(data)} bytes")
        try:
            return unpack_texts(data, offsets)
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: its ids are not UTF-8 ({error})") from None


def _read_header(path: Path) -> tuple[dict[str, object], int, int]:
    """Return the header of a safetensors file, where its data starts, and the file's size."""
    size = path.stat().st_size
    if size < 8:  # as a pipe's, for which opening would wait
        raise ValueError(f"{path}: truncated or not a safetensors file")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_HEADER_BYTES, size - 8):
            raise ValueError(f"{path}: truncated or not a safetensors file")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: its safetensors header is damaged ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: its safetensors header is damaged (not an object)")
    return header, 8 + length, size


def join_rows(pieces: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return what is stored of the rows of several files, in their order."""
    kept = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0] if name != "id_offsets"}
    if "id_offsets" in pieces[0]:
        sizes = torch.cat([piece["id_offsets"].diff() for piece in pieces])
        kept["id_offsets"] = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), sizes.cumsum(0)])
    return kept


@dataclass(frozen=True)
class ShardHeader:
    """What a shard, or a part of one, says of itself."""

    batches: tuple[int, ...]  # rows of each
    prints: tuple[str | None, ...]  # fingerprint of each; None where an earlier version computed it
    run: str | None  # key of the run that it is of

    def plain(self) -> dict[str, object]:
        """Return it as it is stored; the run of one that an earlier version wrote is not."""
        if self.run is None:
            return {"batches": self.batches}
        return {"batches": self.batches, "prints": self.prints, "run": self.run}


def read_shard_header(path: Path) -> ShardHeader:
    """Return what the file of a shard says of itself.

    Raises:
        ValueError: not a shard.
    """
    metadata = _read_header(path)[0].get("__metadata__")
    try:
        return parse_shard_header(metadata)
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ValueError(
            f"{path}: damaged, its header is not a shard's; delete it and run it again to make it again"
        ) from None


def parse_shard_header(metadata: object) -> ShardHeader:
    """Return what a shard says of itself; raises KeyError, TypeError or ValueError where it says nothing."""
    found = json.loads(metadata[_KEY])  # type: ignore[index]
    counts, run = found["batches"], found.get("run")
    if not (isinstance(counts, list) and counts and all(type(n) is int and n > 0 for n in counts)):
        raise ValueError(f"batches are {counts!r}")
    if run is None:
        return ShardHeader(tuple(counts), (None,) * len(counts), None)
    prints = found["prints"]
    if not (is_checksum(run) and isinstance(prints, list) and len(prints) == len(counts)):
        raise ValueError(f"prints are {prints!r}")
    if not all(p is None or is_checksum(p) for p in prints):
        raise ValueError(f"prints are {prints!r}")
    return ShardHeader(tuple(counts), tuple(prints), run)


def _offsets(path: Path, name: str, entry: object, size: int) -> tuple[int, int]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(o) is int for o in offsets)
        or not 0 <= offsets[0] <= offsets[1] <= size
    ):
        raise ValueError(f"{path}: its {name} lie outside of the file ({offsets} of {size} bytes)")
    return offsets[0], offsets[1]


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read(file: FileIO, start: int, count: int, dtype: torch.dtype) -> Tensor:
    """Return `count` values of an open file from byte `start` on."""
    out = torch.empty(count, dtype=dtype, device="cpu")
    _fill(file, start, _bytes_of(out))
    return out


def _mapped(file: FileIO, start: int, count: int, dtype: torch.dtype) -> Tensor:
    """Return `count` values of an open file from byte `start` on, mapped; writing to them changes a private copy."""
    skip = start % mmap.ALLOCATIONGRANULARITY
    length = skip + count * dtype.itemsize
    pages = mmap.mmap(
        file.fileno(), length, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=start - skip
    )
    pages.madvise(mmap.MADV_WILLNEED)  # starts to read it
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=skip)


@contextmanager
def leased(file: FileIO) -> Iterator[bool]:
    """Keep others from writing to an open file, or cutting it, during the block: they wait for its end.

    Yields whether the system does so: a lease of Linux, for the owner of a file on a local disk that nobody has open to
    write. It lasts for 45 s at most once someone waits (/proc/sys/fs/lease-break-time).
    """
    try:
        fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)  # where someone waits: a signal that is ignored, not SIGIO
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except (AttributeError, OSError):
        yield False
        return
    try:
        yield True
    finally:
        with suppress(OSError):  # the system took it back
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def _bytes_of(x: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor, to write to."""
    return x.view(-1).view(torch.uint8).numpy().data


def _fill(file: FileIO, at: int, left: memoryview) -> None:
    """Read bytes of an open file from byte `at` on."""
    while left:
        got = os.preadv(file.fileno(), [left], at)
        if not got:
            raise ValueError(f"{file.name}: it was cut while it was read; restore it from a copy")
        left, at = left[got:], at + got


class Room:
    """Memory for rows as they are stored, which each block takes again."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.rows = 0
        self.tensors: Mapping[str, Tensor] = {}

    def take(self, count: int) -> dict[str, Tensor]:
        """Return tensors for `count` rows, by the names of the codec's; what was taken before is overwritten."""
        if count > self.rows:
            self.rows = count
            self.tensors = {
                name: torch.empty(count, *shape, dtype=dtype, device="cpu")
                for name, (dtype, shape) in self.codec.tensors.items()
            }
        return {name: x[:count] for name, x in self.tensors.items()}
