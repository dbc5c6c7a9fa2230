"""Files of an index: whole or not there at all, checked by content, and read window by window."""

from __future__ import annotations

import errno
import io
import json
import math
import mmap
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import xxhash
from torch import Tensor

from dropinf_kernels import quantize_rows

SUFFIX = ".safetensors"
TEMPORARY = ".tmp"
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
_TAGS = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8"}
_SCALED = ("float16", "int8")
_KEY = "dropinf"
_HASH = re.compile(r"[0-9a-f]{32}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HEADER_BYTES = 1 << 26
_WINDOW = 1 << 23


def checksum(data: bytes | memoryview) -> str:
    """Return the 128-bit XXH3 of the bytes, as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data)


def is_checksum(text: object) -> bool:
    return isinstance(text, str) and _HASH.fullmatch(text) is not None


def file_checksum(path: Path) -> str:
    """Return the checksum of a file, read window by window."""
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        buffer = memoryview(bytearray(min(_WINDOW, max(1, os.fstat(file.fileno()).st_size))))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def write_whole(path: Path, data: bytes | memoryview) -> None:
    """Write a file that is complete and on disk once it has its name; until then it has a temporary one.

    Raises:
        OSError: the disk is full, or a limit on file sizes is reached; nothing is left under either name.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritten(error, path, ": it goes on from here") from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _unwritten(error: OSError, path: Path, then: str = "") -> OSError:
    way_out = f"; free space and run it again{then}" if error.errno in _FULL else ""
    return OSError(error.errno, os.strerror(error.errno or 0) + way_out, str(path))


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path`, which becomes `path` once the block is done, and is nothing where it fails.

    Raises:
        OSError: the disk is full, or a limit on file sizes is reached.
    """
    final = Path(path)
    temporary = final.with_name(f".{final.name}.{uuid.uuid4().hex}{TEMPORARY}")
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
    """A new .npy or .safetensors file (there named "rows"), which has its name in the end."""
    kind = torch.empty(0, dtype=dtype).numpy().dtype
    size = math.prod(shape) * kind.itemsize
    if Path(path).suffix == SUFFIX:
        entry = {"dtype": f"F{8 * kind.itemsize}", "shape": shape, "data_offsets": [0, size]}
        text = json.dumps({"rows": entry}).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
    else:
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(buffer, {"descr": kind.str, "fortran_order": False, "shape": shape})
        header = buffer.getvalue()
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(header)
        file.truncate(len(header) + size)
        file.flush()
        yield ArrayFile(file.fileno(), len(header), shape, kind.itemsize)


def open_array(path: str | os.PathLike[str]) -> Tensor:
    """Return a .npy file, mapped; writing to it changes a private copy."""
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, unless it is there.

    Raises:
        OSError: the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritten(error, folder, ": it goes on from here") from error


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def pack_texts(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return the texts as UTF-8 bytes uint8 [B], and where each starts and ends, int64 [n + 1]."""
    encoded = [text.encode() for text in texts]
    offsets = torch.tensor([0, *map(len, encoded)]).cumsum(0)
    joined = bytearray(b"".join(encoded))
    return (torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)), offsets


def unpack_texts(data: Tensor, offsets: Tensor) -> list[str]:
    raw, edges = bytes(data.numpy()), offsets.tolist()
    return [raw[a:b].decode() for a, b in pairwise(edges)]


@dataclass(frozen=True)
class Codec:
    """How rows are stored: their dtype and, for int8, the size of each layer that is divided out first.

    float16 rows are divided by a power of two each, so that small gradients do not underflow; int8 rows by the size of
    each layer, from the first batch, and then by a scale each (`quantize_rows`), so that no layer is lost beside a
    larger one.
    """

    dtype: str
    widths: tuple[int, ...]  # columns of each layer
    sizes: tuple[float, ...]  # of each layer; 1 where nothing is divided out

    @property
    def width(self) -> int:
        return sum(self.widths)

    @property
    def scaled(self) -> bool:
        return self.dtype in _SCALED

    @property
    def row_bytes(self) -> int:
        """What a stored row takes."""
        return self.width * DTYPES[self.dtype].itemsize + (4 if self.scaled else 0)

    @property
    def decoded(self) -> torch.dtype:
        """The dtype that rows are read in."""
        return torch.float32 if self.scaled else DTYPES[self.dtype]

    def factors(self) -> Tensor | None:
        """What each stored column is multiplied by, [K], or None for 1."""
        if self.dtype != "int8":
            return None
        return torch.repeat_interleave(torch.tensor(self.sizes), torch.tensor(self.widths))

    def encode(self, flat: Tensor) -> dict[str, Tensor]:
        """Return what is stored of the rows [n, K]: `gradients` [n, K] and, where rows are scaled, `scale` [n]."""
        factors = self.factors()
        if factors is not None:
            values, scale = quantize_rows(flat / factors.to(flat))
            return {"gradients": values.contiguous(), "scale": scale}
        if self.dtype == "float16":
            largest = flat.abs().amax(1).float()
            scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
            return {"gradients": (flat / scale.to(flat).unsqueeze(1)).half(), "scale": scale}
        return {"gradients": flat.to(DTYPES[self.dtype])}

    def decode(self, values: Tensor, scale: Tensor | None) -> Tensor:
        """Return rows [n, K] in `decoded`."""
        if scale is None:
            return values
        rows = values.float().mul_(scale.unsqueeze(1))
        factors = self.factors()
        return rows if factors is None else rows.mul_(factors)


@dataclass(frozen=True)
class ShardFile:
    """One file of stored rows: where its tensors lie, checked against what they must be.

    Raises ValueError where the file is not a whole safetensors file of `rows` rows of `codec`.
    """

    path: Path
    codec: Codec
    rows: int

    def check_size(self) -> None:
        """Raise ValueError where there is no file that has room for so many rows."""
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
        header, start, size = _read_header(self.path)
        need = {"gradients": (_TAGS[self.codec.dtype], [self.rows, self.codec.width])}
        if self.codec.scaled:
            need["scale"] = ("F32", [self.rows])
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
            item = 4 if name == "scale" else DTYPES[self.codec.dtype].itemsize
            if found[name][1] != math.prod(shape) * item:
                raise ValueError(f"{self.path}: its {name} take {found[name][1]} bytes, not {math.prod(shape) * item}")
        at = start
        for first, count in [*sorted(found.values()), (size, 0)]:
            if first != at:
                raise ValueError(f"{self.path}: its tensors overlap, or leave a gap")
            at += count
        return found

    def window(self, layout: Mapping[str, tuple[int, int]], first: int, count: int) -> tuple[Tensor, Tensor | None]:
        """Return the stored rows `first` to `first + count` as views of the mapped file, with their scales."""
        width, item = self.codec.width, DTYPES[self.codec.dtype].itemsize
        with open(self.path, "rb") as file:
            start = layout["gradients"][0] + first * width * item
            values = _mapped(file.fileno(), start, count * width, DTYPES[self.codec.dtype]).view(count, width)
            scale = None
            if self.codec.scaled:
                scale = _mapped(file.fileno(), layout["scale"][0] + 4 * first, count, torch.float32)
        return values, scale

    def texts(self, layout: Mapping[str, tuple[int, int]]) -> list[str]:
        """Return the ids of the rows."""
        with open(self.path, "rb") as file:
            parts = []
            for name, dtype in (("ids", torch.uint8), ("id_offsets", torch.int64)):
                if name not in layout:
                    raise ValueError(f"{self.path}: it has no {name}, as the manifest says")
                start, size = layout[name]
                parts.append(_mapped(file.fileno(), start, size // dtype.itemsize, dtype))
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
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_HEADER_BYTES, size - 8):
            raise ValueError(f"{path}: truncated or not a safetensors file")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: its safetensors header is damaged ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: its safetensors header is damaged (not an object)")
    return header, 8 + length, size


def read_shard_header(path: Path) -> list[int]:
    """Return the rows of each batch in a shard's file.

    Raises:
        ValueError: not a shard.
    """
    metadata = _read_header(path)[0].get("__metadata__")
    try:
        counts = json.loads(metadata[_KEY])["batches"]  # type: ignore[index]
        if counts and all(type(n) is int and n > 0 for n in counts):
            return list(counts)
    except (KeyError, TypeError, ValueError, RecursionError):
        pass
    raise ValueError(f"{path}: damaged, its header is not a shard's; delete it and run it again to make it again")


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


def _mapped(handle: int, start: int, count: int, dtype: torch.dtype) -> Tensor:
    """Return `count` values of an open file from byte `start` on, mapped; writing to them changes a private copy."""
    if count == 0:
        return torch.empty(0, dtype=dtype)
    skip = start % mmap.ALLOCATIONGRANULARITY
    length = skip + count * dtype.itemsize
    pages = mmap.mmap(
        handle, length, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=start - skip
    )
    pages.madvise(mmap.MADV_WILLNEED)  # starts to read it
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=skip)


def serialize(tensors: Mapping[str, Tensor], header: Mapping[str, object]) -> bytes:
    """Return a safetensors file, the same bytes for the same content.

    The header is JSON under one key, as safetensors keeps several in no particular order.
    """
    kept = {name: x.detach().contiguous().cpu() for name, x in tensors.items()}
    data: bytes = safetensors.torch.save(kept, {_KEY: json.dumps(header, sort_keys=True)})
    return data


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
