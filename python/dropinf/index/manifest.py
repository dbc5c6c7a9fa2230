"""The manifest of an index: what its rows are, which files hold them, and a checksum of each and of itself."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..files import checksum, is_checksum, whole_number
from ..origin import is_same_code
from .codec import BITS, DTYPES, Codec
from .folder import CODE, FISHER, PASSAGES, PROBE, SKETCH, write_whole

NAME = "manifest.json"
DECODED_FROM = "rows were"  # the dtype of the rows that those of few bits were made of, where they were stored before
FUNCTIONS = "functions"  # of a model's classes, in what is known of its code
FORMAT = "dropinf.index"
# Of 1: no fingerprints of batches, no run in shards, no order, int8 rows with one scale. Of 2: no first batch.
VERSION, NEWEST = 3, 4  # the newest has rows of few bits
FILES = (SKETCH, CODE, FISHER, PASSAGES, PROBE)
_NOW = "now: "  # of a run that went on with another loss or code, which gave all of its rows again
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
    number: int  # in its file's name


@dataclass(frozen=True)
class Call:
    """A call of compress whose rows were merged with those of others."""

    first: str
    batches: int
    rows: int
    printed: bool


@dataclass(frozen=True)
class Run:
    """One compression into the index, or several that were merged; `shards` is None until it is finished."""

    first: str  # fingerprint of the first batch; where not `printed`, the checksum of its tensors
    batches: int | None  # None: not known before
    shard_batches: int
    key: str  # what its files are known by
    shards: tuple[ShardEntry, ...] | None = None
    printed: bool = True  # whether every batch has its fingerprint; not in a run that an earlier version began
    calls: tuple[Call, ...] = ()  # that were merged
    replaces: tuple[str, ...] = ()  # keys of the runs that were merged last, whose files it replaces

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards or ())


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

    @property
    def next_number(self) -> int:
        """The number of the first shard of a run that begins now."""
        return 1 + max((shard.number for shard in self.shards), default=-1)

    @property
    def made_by(self) -> tuple[str, str] | None:
        """The model and the loss that give all rows of the index, as `Gradients.origin`."""
        if self.origin is None:
            return None
        model, loss = self.origin
        return self.about.get(f"{_NOW}model", model), self.about.get(f"{_NOW}loss", loss)

    @property
    def code(self) -> dict[str, str]:
        """What is known of the model's code, as `RowSource.code`, and of the command line."""
        return {name: self.about.get(_NOW + name, found) for name, found in self._begun_with.items()}

    @property
    def _begun_with(self) -> dict[str, str]:
        """What was known as the index was begun."""
        return {name: found for name, found in self.about.items() if not name.startswith(_NOW)}

    def going_on(self, origin: tuple[str, str], code: Mapping[str, str]) -> Manifest:
        """Return the manifest where a loss and code give all finished rows again, and will give the others."""
        now = {"model": origin[0], "loss": origin[1], **code}
        return replace(self, about={**self.about, **{_NOW + name: found for name, found in now.items()}})

    def begun(self, first: str, batches: int | None, shard_batches: int) -> Manifest:
        """Return the manifest with another run, which has no shards yet."""
        key = self.key(len(self.runs), self.next_number, first, batches, shard_batches)
        return replace(self, runs=(*self.runs, Run(first, batches, shard_batches, key)))

    def key(self, *run: object, whole: bool = True) -> str:
        """Return what the files of a run are known by: a checksum of all that is fixed before its first batch.

        ``whole``: with the loss and the model's code, which earlier versions left out.
        """
        made_with = {"origin": self.origin, "about": self._begun_with} if whole else {}
        body = {
            **made_with,
            "layers": [asdict(layer) for layer in self.layers],
            "dtype": self.dtype,
            "sketch": self.files.get(SKETCH),
            "model": self.model,
            "ids": self.ids,
            "run": run,
        }
        return checksum(_canonical(body))

    def has_key(self, number: int) -> bool:
        """Return whether a run's key is of what the manifest says; True where that cannot be told."""
        run, merged = self.runs[number], sum(len(before.calls) for before in self.runs[:number])
        if run.calls or not run.printed or not run.shards:  # merged, of an earlier version, or not finished
            return True
        about = run.shards[0].number, run.first, run.batches, run.shard_batches
        places = range(number, number + merged + 1)
        return any(run.key == self.key(place, *about, whole=whole) for place in places for whole in (True, False))

    def known_keys(self) -> set[str]:
        """Return the keys of its runs, and of those that were merged into them last."""
        return {key for run in self.runs for key in (run.key, *run.replaces)}

    def with_file(self, name: str, found: str) -> Manifest:
        return replace(self, files={**self.files, name: found})

    def to_bytes(self) -> bytes:
        """Return the file: JSON in one fixed form, so that no byte can change unnoticed."""
        body = {"format": FORMAT, "version": NEWEST if self.dtype in BITS else VERSION, **asdict(self)}
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
            if path.exists() and not path.is_file():  # a pipe, for which reading would wait
                raise ValueError(f"{path}: not a file")
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
        if type(version) is int and version > NEWEST:
            raise ValueError(
                f"{path}: format version {version}, newer than this dropinf reads ({NEWEST}); upgrade dropinf"
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
    version = body["version"]
    if type(version) is not int or not 1 <= version <= NEWEST:
        raise ValueError(f"version is {version!r}")
    expected = {"format", "version", "layers", "dtype", "model", "ids", "runs", "files", "about"}
    order, origin = body.get("order"), body.get("origin")
    if version > 1:
        expected |= {"order", "origin"}
        if origin is not None:
            model, loss = map(_string, _list(origin, "origin"))
            origin = model, loss
        if order is not None and not is_checksum(order):
            raise ValueError(f"order is {order!r}")
    if body.keys() != expected:
        raise ValueError(f"its fields are {sorted(body)}")
    few_bits = {body["dtype"] in BITS, CODE in body["files"], version == NEWEST}
    if body["dtype"] not in (*DTYPES, *BITS) or len(few_bits) > 1:
        raise ValueError(f"dtype is {body['dtype']!r}, files are {sorted(body['files'])}, version is {version}")
    if type(body["ids"]) is not bool:
        raise ValueError(f"ids is {body['ids']!r}")
    layers = tuple(_layer(entry) for entry in _list(body["layers"], "layers"))
    if not layers or len({layer.name for layer in layers}) != len(layers):
        raise ValueError("layers are none, or named twice")
    if body["dtype"] in BITS and (len(layers) > 1 or math.prod(layers[0].shape) * BITS[body["dtype"]] % 8):
        raise ValueError(f"rows of {body['dtype']} are of {layers}")
    if len({layer.size is None for layer in layers}) > 1 or (version == 1 and layers[0].size is None):
        raise ValueError("some layers have a size and others none")
    for name, found in _strings(body["files"], "files").items():
        if name not in FILES or not is_checksum(found):
            raise ValueError(f"files has {name!r}: {found!r}")
    entries = _list(body["runs"], "runs")
    if version == 1:
        _bring_forward(entries)
    runs = tuple(_parse_run(entry) for entry in entries)
    if not runs or any(run.shards is None for run in runs[:-1]):
        raise ValueError("runs are none, or one that is not the last is not finished")
    numbers = [shard.number for run in runs for shard in run.shards or ()]
    if len(set(numbers)) != len(numbers):
        raise ValueError("two shards have one number")
    about = _strings(body["about"], "about")
    made = Manifest(
        layers, body["dtype"], _string(body["model"]), body["ids"], runs, body["files"], about, origin, order
    )
    return _with_keys(made) if version == 1 else made


def _bring_forward(runs: list[Any]) -> None:
    """Say what version 1 did not: that batches have no fingerprints, and that shards are numbered one by one."""
    number = 0
    for run in runs:
        run |= {"printed": False, "key": 32 * "0", "calls": [], "replaces": []}
        for shard in run["shards"] or ():
            shard["number"] = number
            number += 1


def _with_keys(manifest: Manifest) -> Manifest:
    """Return the manifest with the keys that its runs would have begun with."""
    known = replace(manifest, runs=())
    for run in manifest.runs:
        key = known.begun(run.first, run.batches, run.shard_batches).runs[-1].key
        known = replace(known, runs=(*known.runs, replace(run, key=key)))
    return known


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
    calls = tuple(_call(call) for call in _list(entry["calls"], "calls"))
    if shards is not None and [s.number for s in shards] != [shards[0].number + i for i in range(len(shards))]:
        raise ValueError("shards of a run are not numbered one by one")
    run = Run(
        _string(entry["first"]),
        _count(entry["batches"]),
        whole_number(entry["shard_batches"], "shard_batches", 1),
        _key(entry["key"]),
        shards,
        _flag(entry["printed"]),
        calls,
        tuple(_key(key) for key in _list(entry["replaces"], "replaces")),
    )
    if calls and (shards is None or sum(call.rows for call in calls) != run.rows):
        raise ValueError("calls have not the rows of their run")
    return run


def _call(entry: Mapping[str, Any]) -> Call:
    batches, rows = (whole_number(entry[name], name, 1) for name in ("batches", "rows"))
    return Call(_string(entry["first"]), batches, rows, _flag(entry["printed"]))


def _count(value: object) -> int | None:
    return None if value is None else whole_number(value, "batches", 1)


def _key(value: object) -> str:
    if not is_checksum(value):
        raise ValueError(f"key is {value!r}")
    return str(value)


def _flag(value: object) -> bool:
    if type(value) is not bool:
        raise ValueError(f"printed is {value!r}")
    return value


def _shard(entry: Mapping[str, Any]) -> ShardEntry:
    if not is_checksum(entry["checksum"]):
        raise ValueError(f"a shard's checksum is {entry['checksum']!r}")
    number = whole_number(entry["number"], "a shard's number", 0)
    return ShardEntry(entry["checksum"], whole_number(entry["rows"], "rows", 1), number)


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


_CODE = {
    FUNCTIONS: "what its modules' forward does, or a function or constant that it reads",
    "attributes": "numbers and text in attributes of modules",
    "other attributes": "functions and containers in attributes, train mode and hooks of modules, autocast",
}


def check_code(code: Mapping[str, str], expected: Mapping[str, str], folder: object) -> bool:
    """Raise ValueError where a model computes something else than when an index was made; warn where it may.

    Return whether it may.
    """
    may = False
    for what, found in code.items():
        if expected.get(what, found) == found or (what == FUNCTIONS and is_same_code(expected[what], found)):
            continue
        message = f"model: its {what} are not those that {folder} was made with"
        if what == "classes and constants":
            raise ValueError(f"{message}: this is another model's code; pass the model of then, or name another folder")
        warnings.warn(f"{message} ({_CODE[what]}); if they change gradients, name another folder", stacklevel=2)
        may = True
    return may
