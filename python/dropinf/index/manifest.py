"""The manifest of an index: what its rows are, which files hold them, and a checksum of each and of itself."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..files import checksum, is_checksum, whole_number, write_whole
from .codec import DTYPES, Codec

NAME = "manifest.json"
FORMAT = "dropinf.index"
VERSION = 2
FILES = ("sketch.safetensors", "fisher.safetensors", "passages.jsonl")
_MOST = 1 << 31  # bytes of a manifest that is still read


@dataclass(frozen=True)
class LayerEntry:
    name: str
    shape: tuple[int, ...]
    digest: str  # of its sketch's tables
    size: float | None = None  # divided out of the int8 rows of version 1


@dataclass(frozen=True)
class ShardEntry:
    checksum: str
    rows: int


@dataclass(frozen=True)
class Run:
    """One compression into the index; `shards` is None until it is finished."""

    first: str  # checksum of the first batch's tensors
    batches: int | None  # None: not known before
    shard_batches: int
    shards: tuple[ShardEntry, ...] | None = None


@dataclass(frozen=True)
class Manifest:
    layers: tuple[LayerEntry, ...]
    dtype: str
    model: str  # fingerprint
    ids: bool
    runs: tuple[Run, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)  # name -> checksum
    about: Mapping[str, str] = field(default_factory=dict)  # what the command line wants to know again
    origin: tuple[str, str] | None = None  # the model and the loss, as `Gradients.origin`
    order: str | None = None  # checksum of the file that says where each row's sample stands; None: as the rows do

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {layer.name: layer.shape for layer in self.layers}

    @property
    def codec(self) -> Codec:
        sizes = tuple(layer.size for layer in self.layers if layer.size is not None)
        widths = tuple(math.prod(layer.shape) for layer in self.layers)
        return Codec(self.dtype, tuple(self.shapes), widths, sizes or None)

    @property
    def shards(self) -> tuple[ShardEntry, ...]:
        """The shards of every finished run, in order."""
        return tuple(shard for run in self.runs for shard in run.shards or ())

    @property
    def unfinished(self) -> bool:
        return not self.runs or self.runs[-1].shards is None

    def with_file(self, name: str, found: str) -> Manifest:
        return replace(self, files={**self.files, name: found})

    def to_bytes(self) -> bytes:
        """Return the file: JSON in one fixed form, so that no byte can change unnoticed."""
        body = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return _canonical({**body, "checksum": checksum(_canonical(body))})

    def save(self, folder: Path) -> None:
        write_whole(folder / NAME, self.to_bytes())

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read a folder's manifest.

        Raises:
            FileNotFoundError: there is none.
            ValueError: damaged, of a newer format, or with values that no index has.
        """
        path = folder / NAME
        try:
            if path.stat().st_size > _MOST:
                raise ValueError(f"{path}: {path.stat().st_size} bytes, too large for a manifest")
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            for link in (folder, path):
                if link.is_symlink() and not link.exists():
                    raise FileNotFoundError(f"{link}: a link to {os.readlink(link)}, which is not there") from None
            raise FileNotFoundError(
                f"{folder}: no index (it has no {NAME}); make one with compressor.compress(batches, out=...)"
            ) from None
        return cls.from_bytes(data, path)

    @classmethod
    def from_bytes(cls, data: bytes, path: Path) -> Manifest:
        try:
            body = json.loads(data, parse_constant=_refuse)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: damaged, not JSON ({error})") from None
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise ValueError(f"{path}: not the manifest of an index")
        version = body.get("version")
        if type(version) is int and version > VERSION:
            raise ValueError(
                f"{path}: format version {version}, newer than this dropinf reads ({VERSION}); upgrade dropinf"
            )
        try:
            given = body.pop("checksum", None)
            sound = given == checksum(_canonical(body)) and _canonical({**body, "checksum": given}) == data
        except (ValueError, RecursionError):
            sound = False
        if not sound:
            raise ValueError(f"{path}: damaged, it does not match its own checksum; restore it from a copy")
        try:
            return _parse(body)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path}: not a valid manifest ({error})") from None


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, indent=1, sort_keys=True, ensure_ascii=True, allow_nan=False).encode() + b"\n"


def _refuse(text: str) -> None:
    raise ValueError(f"{text} is not a number")


def _parse(body: Mapping[str, Any]) -> Manifest:
    if body["version"] not in (1, VERSION):
        raise ValueError(f"version is {body['version']!r}")
    expected = {"format", "version", "layers", "dtype", "model", "ids", "runs", "files", "about"}
    order = origin = None
    if body["version"] > 1:
        expected |= {"order", "origin"}
        order, origin = body["order"], body["origin"]
        if origin is not None:
            model, loss = map(_string, _list(origin, "origin"))
            origin = model, loss
        if order is not None and not is_checksum(order):
            raise ValueError(f"order is {order!r}")
    if body.keys() != expected:
        raise ValueError(f"its fields are {sorted(body)}")
    if body["dtype"] not in DTYPES:
        raise ValueError(f"dtype is {body['dtype']!r}")
    if type(body["ids"]) is not bool:
        raise ValueError(f"ids is {body['ids']!r}")
    layers = tuple(_layer(entry) for entry in _list(body["layers"], "layers"))
    if not layers or len({layer.name for layer in layers}) != len(layers):
        raise ValueError("layers are none, or named twice")
    if len({layer.size is None for layer in layers}) > 1 or (body["version"] == 1 and layers[0].size is None):
        raise ValueError("some layers have a size and others none")
    for name, found in _strings(body["files"], "files").items():
        if name not in FILES or not is_checksum(found):
            raise ValueError(f"files has {name!r}: {found!r}")
    runs = tuple(_parse_run(entry) for entry in _list(body["runs"], "runs"))
    if not runs or any(run.shards is None for run in runs[:-1]):
        raise ValueError("runs are none, or one that is not the last is not finished")
    about = _strings(body["about"], "about")
    return Manifest(
        layers, body["dtype"], _string(body["model"]), body["ids"], runs, body["files"], about, origin, order
    )


def _layer(entry: Mapping[str, Any]) -> LayerEntry:
    shape = tuple(whole_number(size, "a layer's shape", 1) for size in _list(entry["shape"], "shape"))
    if len(shape) not in (1, 2) or math.prod(shape) > 1 << 40:
        raise ValueError(f"a layer's shape is {shape}")
    size = entry["size"]
    if size is not None and (type(size) is not float or not (math.isfinite(size) and size > 0)):
        raise ValueError(f"a layer's size is {size!r}")
    return LayerEntry(_string(entry["name"]), shape, _string(entry["digest"]), size)


def _parse_run(entry: Mapping[str, Any]) -> Run:
    shards = entry["shards"]
    if shards is not None:
        shards = tuple(_shard(shard) for shard in _list(shards, "shards"))
    batches = entry["batches"]
    return Run(
        _string(entry["first"]),
        None if batches is None else whole_number(batches, "batches", 1),
        whole_number(entry["shard_batches"], "shard_batches", 1),
        shards,
    )


def _shard(entry: Mapping[str, Any]) -> ShardEntry:
    if not is_checksum(entry["checksum"]):
        raise ValueError(f"a shard's checksum is {entry['checksum']!r}")
    return ShardEntry(entry["checksum"], whole_number(entry["rows"], "rows", 1))


def _list(value: object, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{what} is {value!r}")
    return value


def _string(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    return value


def _strings(value: object, what: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {value!r}")
    return {key: _string(text) for key, text in value.items()}


def find_run(manifest: Manifest, first: str, count: int | None) -> int | None:
    """Return the number of the run whose first batch has this checksum, or None.

    Where both numbers of batches are known, they must be equal too.
    """
    for number, run in enumerate(manifest.runs):
        if run.first == first and (None in (count, run.batches) or count == run.batches):
            return number
    return None
