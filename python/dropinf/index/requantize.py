"""Making an index of few bits a row of one of whole numbers: without the model."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import safetensors.torch

from ..files import TEMPORARY, checksum, serialize, sync_folder
from ..fisher.bits import BitCode
from ..gradients import Gradients, GradientSource
from ..origin import Origin
from .coded import check_its_origin
from .compact import compact
from .folder import CODE, FISHER, LOCK, SHARDS, make_place, shard_path, write_whole
from .manifest import DECODED_FROM, LayerEntry, Manifest, Run, ShardEntry
from .order import order_path
from .runs import Plan
from .shards import ShardFile, join_rows

_ROWS = 4096  # that are whitened at a time


class _Source(GradientSource, Protocol):
    path: Path
    manifest: Manifest

    @property
    def origin(self) -> Origin | None: ...


def requantize(index: _Source, out: Path, code: BitCode) -> None:
    """Write the rows of an index as few bits into another folder, which is complete once it has its name.

    Raises:
        ValueError: rows that are of few bits already, an index that is not finished, a code of another sketch or model,
            a damaged shard, or a folder that is there.
    """
    folder, manifest = index.path, index.manifest
    if not isinstance(code, BitCode):
        raise TypeError(f"code is {code!r}; it must be a dropinf.BitCode, as BitCode.fit returns it")
    if manifest.codec.bits is not None:
        raise ValueError(f"{folder}: its rows are of few bits already; requantize the index that they were made of")
    if manifest.unfinished:
        raise ValueError(f"{folder}: a run is not finished; finish it, or give it up with Index.discard()")
    if out.exists() or out.is_symlink():
        raise ValueError(f"out is {os.fspath(out)!r}, which is there; name a new folder")
    if out.is_relative_to(folder.resolve()) or out.is_relative_to(folder):
        raise ValueError(f"out is {os.fspath(out)!r}, in the folder of the index itself; name one beside it")
    code.check(index, "code and index")
    check_its_origin(code, index.origin, "index")
    _sweep(out)
    temporary = out.parent / f".{out.name}.{uuid.uuid4().hex}{TEMPORARY}"
    try:
        make_place(temporary / SHARDS)
        held = _hold(temporary)
        made = _written(folder, manifest, temporary, code)
        made.save(temporary)
        compact(temporary, made)
        sync_folder(temporary)
        os.rename(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(out.parent)
    if held is not None:
        os.close(held)


def _hold(folder: Path) -> int | None:
    """Return the lock of a folder that is being written, held until it is closed; None where another call has it."""
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def _sweep(out: Path) -> None:
    """Remove what calls that were killed have left of this folder."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.*{TEMPORARY}"):
        held = _hold(left) if left.is_dir() else None
        if held is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(held)


def _written(folder: Path, manifest: Manifest, into: Path, code: BitCode) -> Manifest:
    """Write all files of the new index but its manifest, and return that."""
    write_whole(into / CODE, code.to_bytes())
    files = {name: found for name, found in manifest.files.items() if name != FISHER}
    for name in files:
        shutil.copyfile(folder / name, into / name)
    if manifest.order is not None:
        shutil.copyfile(order_path(folder, manifest.order), order_path(into, manifest.order))
    layers = tuple(LayerEntry(name, shape, code.digest[name]) for name, shape in code.shapes.items())
    about = {**manifest.about, DECODED_FROM: manifest.dtype}
    new = replace(manifest, layers=layers, dtype=f"{code.bits}bit", about=about, runs=())
    new = replace(new, files={**files, CODE: checksum(code.to_bytes())})
    for number in range(len(manifest.runs)):
        new = replace(new, runs=(*new.runs, _run(Plan(folder, manifest, number), into, new, code)))
    return new


def _run(plan: Plan, into: Path, new: Manifest, code: BitCode) -> Run:
    """Write the shards of a run, and return it."""
    run, shards = plan.run, list[ShardEntry]()
    assert run.shards is not None
    about = plan.manifest.shapes, {layer.name: layer.digest for layer in plan.manifest.layers}
    key = new.key(plan.number, run.shards[0].number, run.first, run.batches, run.shard_batches)
    for shard in run.shards:
        file = ShardFile(shard_path(plan.folder, shard.number, shard.checksum), plan.manifest.codec, shard.rows)
        file.verify(shard.checksum)
        header, kept = plan.own_header(file.path), safetensors.torch.load(file.path.read_bytes())
        rows = plan.manifest.codec.decode(kept.pop("gradients"), kept.pop("scale", None))
        parts = (code.rows(Gradients(part, *about)).flat for part in rows.split(_ROWS))
        encoded = [new.codec.encode(part, lambda row: f"row {row} of shard {shard.number}") for part in parts]  # noqa: B023
        data = serialize(join_rows(encoded) | kept, replace(header, run=key).plain())
        shards.append(ShardEntry(checksum(data), shard.rows, shard.number))
        write_whole(shard_path(into, shard.number, shards[-1].checksum), data)
    return replace(run, key=key, shards=tuple(shards), replaces=())
