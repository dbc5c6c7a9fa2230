"""Files that are written atomically, and known by their checksums."""

from __future__ import annotations

import errno
import io
import json
import math
import mmap
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import xxhash
from torch import Tensor

SUFFIX = ".safetensors"
TEMPORARY = ".tmp"
_KEY = "dropinf"
_HASH = re.compile(r"[0-9a-f]{32}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WAYS = {
    errno.ENAMETOOLONG: "; choose a shorter name",
    errno.EACCES: "; choose a folder that you may write to",
    errno.EROFS: "; choose a folder that you may write to",
    errno.ENOTDIR: "; a part of this path is a file: name another folder",
}
_WINDOW = 1 << 23


def checksum(data: bytes | memoryview) -> str:
    """Return the 128-bit XXH3 of the bytes, as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data)


def is_checksum(text: object) -> bool:
    return isinstance(text, str) and _HASH.fullmatch(text) is not None


def _at_once(path: str, flags: int) -> int:
    """Open a file without waiting, as a pipe in its place would."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def file_checksum(path: Path) -> str:
    """Return the checksum of a file, read window by window."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0, opener=_at_once) as file:
        buffer = memoryview(bytearray(min(_WINDOW, max(1, os.fstat(file.fileno()).st_size))))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def checksum_of(path: Path) -> str | None:
    """Return the checksum of a file, None where there is none: it may be renamed as it is looked for."""
    with suppress(FileNotFoundError):
        return file_checksum(path) if path.is_file() else None
    return None


def is_whole(path: Path, expected: str | None) -> bool:
    """Return whether a file is there and has the checksum that is expected of it, if any is."""
    return expected is None or checksum_of(path) == expected


@contextmanager
def plain_name(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield a name by which libraries that take UTF-8 alone open a file that is there.

    Raises:
        FileNotFoundError: no such file.
        IsADirectoryError: it is a folder.
    """
    name = os.fsdecode(path)
    with open(name, "rb") as file:
        try:
            name.encode()
        except UnicodeEncodeError:
            name = f"/dev/fd/{file.fileno()}"
        yield name


def _temporary(path: Path) -> Path:
    """Return a name beside a file, no longer than one may be."""
    return path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex}{TEMPORARY}")


def write_whole(path: Path, data: bytes | memoryview, check: Callable[[], None] | None = None) -> None:
    """Write a file atomically: under a temporary name, renamed once its bytes are on disk.

    ``check``: raises an error where it must not be written. It is asked before anything is, and before the file gets
    its name.

    Raises:
        OSError: the disk is full, or a limit on file sizes is reached; nothing is left under either name.
    """
    temporary = _temporary(path)
    if check is not None:
        check()
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check()
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritten(error, path, ": it goes on from here") from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _unwritten(error: OSError, path: Path, then: str = "") -> OSError:
    way_out = f"; free space and run it again{then}" if error.errno in _FULL else _WAYS.get(error.errno or 0, "")
    return OSError(error.errno, os.strerror(error.errno or 0) + way_out, str(path))


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename the file to `path` after the block, or remove it where that fails.

    Raises:
        OSError: the disk is full, or a limit on file sizes is reached.
    """
    final = Path(path)
    temporary = _temporary(final)
    try:
        yield temporary
        os.replace(temporary, final)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):  # of a file that the block reads
            raise
        raise _unwritten(error, final) from error
    finally:
        temporary.unlink(missing_ok=True)


class ArrayFile:
    """A matrix in a file that is written block by block: nothing of it stays in memory."""

    def __init__(self, handle: int, start: int, shape: tuple[int, int], itemsize: int) -> None:
        self._handle, self._start, self._shape, self._itemsize = handle, start, shape, itemsize

    def write_columns(self, at: slice | Tensor, block: Tensor) -> None:
        """Write a block [all rows, m] to these columns."""
        if isinstance(at, slice):
            self.write(0, at.start, block)
            return
        array = block.cpu().contiguous().numpy()
        # With its blocks allocated, a full disk is an error here and no signal below.
        os.posix_fallocate(self._handle, 0, self._start + math.prod(self._shape) * self._itemsize)
        with mmap.mmap(self._handle, 0) as pages:
            whole = np.ndarray(self._shape, array.dtype, pages, self._start)
            whole[:, at.numpy()] = array
            del whole

    def write(self, row: int, column: int, block: Tensor) -> None:
        """Write a block [n, m] whose first value stands at `row`, `column`."""
        array = block.cpu().contiguous().numpy()
        pieces = [array] if block.shape[1] == self._shape[1] else list(array)
        for i, piece in enumerate(pieces):
            data, at = piece.data.cast("B"), self._start + ((row + i) * self._shape[1] + column) * self._itemsize
            while data:
                count = os.pwrite(self._handle, data, at)
                data, at = data[count:], at + count


@contextmanager
def new_array(path: str | os.PathLike[str], shape: tuple[int, int], dtype: torch.dtype) -> Iterator[ArrayFile]:
    """Open a new .npy or .safetensors file (its tensor is "rows") to write; it gets its name after the block."""
    kind = torch.empty(0, dtype=dtype, device="cpu").numpy().dtype
    if Path(path).suffix == SUFFIX:
        entry = {
            "dtype": f"F{8 * kind.itemsize}",
            "shape": shape,
            "data_offsets": [0, math.prod(shape) * kind.itemsize],
        }
        text = json.dumps({"rows": entry}).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
    else:
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(buffer, {"descr": kind.str, "fortran_order": False, "shape": shape})
        header = buffer.getvalue()
    with array_file(path, header, shape, dtype) as file:
        yield file


@contextmanager
def array_file(
    path: str | os.PathLike[str], header: bytes, shape: tuple[int, int], dtype: torch.dtype
) -> Iterator[ArrayFile]:
    """Open a new file to write a matrix behind a header; it gets its name after the block."""
    with replacing(path) as temporary, open(temporary, "w+b") as file:
        file.write(header)
        file.truncate(len(header) + math.prod(shape) * dtype.itemsize)
        file.flush()
        yield ArrayFile(file.fileno(), len(header), shape, dtype.itemsize)


def open_array(path: str | os.PathLike[str]) -> Tensor:
    """Return a .npy file, mapped; writing to it changes a private copy."""
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, unless it is there.

    Raises:
        OSError: the disk is full, or no folder can be there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        what = f"a link to {os.readlink(folder)}, which is not there" if folder.is_symlink() else "a file, not a folder"
        raise FileExistsError(error.errno, f"it is {what}; name another folder", str(folder)) from error
    except OSError as error:
        raise _unwritten(error, folder, ": it goes on from here") from error


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def serialize(tensors: Mapping[str, Tensor], header: Mapping[str, object]) -> bytes:
    """Return a safetensors file, the same bytes for the same content.

    The header is JSON under one key, as safetensors keeps several in no particular order.
    """
    kept = {name: x.detach().contiguous().cpu() for name, x in tensors.items()}
    data: bytes = safetensors.torch.save(kept, {_KEY: json.dumps(header, sort_keys=True)})
    return data


def sealed(tensors: Mapping[str, Tensor], header: Mapping[str, object]) -> bytes:
    """Return a safetensors file whose header has the checksum of the file without it."""
    return serialize(tensors, {**header, "checksum": checksum(serialize(tensors, header))})


def is_sealed(data: bytes, tensors: Mapping[str, Tensor], header: Mapping[str, object]) -> bool:
    """Return whether a file is what `sealed` made of the tensors and header that were read from it."""
    return sealed(tensors, {name: x for name, x in header.items() if name != "checksum"}) == data


def metadata_of(data: bytes) -> dict[str, str]:
    """Return the metadata of the bytes of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    found: dict[str, str] = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    return found


def whole_number(value: object, what: str, least: int) -> int:
    """Return a whole number that was read from a file.

    Raises:
        ValueError: it is none, or lies below `least` or at 2^48 or above; `what` names it.
    """
    if type(value) is not int or not least <= value < 1 << 48:
        raise ValueError(f"{what} is {value!r}")
    return value


def read_header(metadata: Mapping[str, str] | None, path: Path, expected: str) -> dict[str, Any]:
    """Return the header that `serialize` wrote, of the format `expected`.

    Raises:
        ValueError: another kind of file, or a damaged one.
    """
    try:
        header = json.loads((metadata or {})[_KEY])
        found = header["format"]
    except (KeyError, TypeError, ValueError, RecursionError):
        found = None
    if found != expected:
        raise ValueError(f"{path}: not a file of the kind {expected!r}")
    kept: dict[str, Any] = header
    return kept
