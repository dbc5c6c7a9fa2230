"""How a run into an index begins: what stands in the folder, and what is left to do."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..files import SUFFIX, TEMPORARY, file_checksum, make_folder
from ..gradients import Origin
from ..ranks import Ranks
from ..workload import Ids, batch_checksum
from .codec import DTYPES
from .folder import _STRAY, PARTS, PASSAGES, SHARDS, SKETCH, check_free
from .manifest import LayerEntry, Manifest, Run, ShardEntry, find_run
from .shards import read_shard_header

_PART = re.compile(r"(\d{9,})-([0-9a-f]{32})" + re.escape(SUFFIX))
_SHARD = re.compile(r"(\d{6,})-([0-9a-f]{32})" + re.escape(SUFFIX))
_SHARD_BYTES = 1 << 26
_LEAST_SHARDS = 64  # if there are as many batches: what ranks share


class RowSource(Protocol):
    """What the rows of an index come from: a compressor."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def is_sharded(self) -> bool: ...

    def digest(self) -> Mapping[str, str]: ...
    def fingerprint(self) -> str: ...
    def origin(self) -> Origin: ...
    def save(self, path: str | os.PathLike[str]) -> None: ...
    def stream(
        self,
        batches: Iterable[Any],
        take: Callable[[Tensor], None],
        *,
        progress: bool = ...,
        where: Callable[[int], str] | None = ...,
    ) -> None: ...


@dataclass(frozen=True)
class Plan:
    """One run into a folder, as it stands before its first batch."""

    folder: Path
    manifest: Manifest
    number: int  # of the run

    @property
    def run(self) -> Run:
        return self.manifest.runs[self.number]

    @cached_property
    def earlier(self) -> list[ShardEntry]:
        """The shards of the runs before."""
        return [shard for run in self.manifest.runs[: self.number] for shard in run.shards or ()]

    @cached_property
    def later(self) -> list[ShardEntry]:
        """The shards of the runs after."""
        return [shard for run in self.manifest.runs[self.number + 1 :] for shard in run.shards or ()]

    @property
    def base(self) -> int:
        """The number of the run's first shard."""
        return len(self.earlier)

    @property
    def first_part(self) -> int:
        """The number of the run's first batch: all runs' batches are counted, so that none is taken for another's."""
        return self.base * self.run.shard_batches

    def shards(self) -> dict[int, ShardEntry]:
        """Return the shards that are there, by number; those of a run that is not finished, by their files."""
        own = self.run.shards
        stop = self.base + len(own or ())
        found = dict(enumerate(self.earlier)) | dict(enumerate(self.later, stop))
        for match in _names(self.folder / SHARDS, _SHARD):
            if self.base <= int(match[1]) and (own is None or int(match[1]) < stop):
                counts = read_shard_header(self.folder / SHARDS / match[0])
                found[int(match[1])] = ShardEntry(match[2], sum(counts))
        return found

    def parts(self) -> dict[int, str]:
        """Return the files of finished batches that no shard holds yet, by the batch's number within the run."""
        own = self.run.shards
        most = None if own is None else len(own) * self.run.shard_batches
        found = {int(match[1]) - self.first_part: match[0] for match in _names(self.folder / PARTS, _PART)}
        return {b: name for b, name in found.items() if b >= 0 and (most is None or b < most)}


def _names(folder: Path, pattern: re.Pattern[str]) -> Iterator[re.Match[str]]:
    if folder.is_dir():
        yield from (m for n in sorted(os.listdir(folder)) if (m := pattern.fullmatch(n)) and (folder / n).exists())


class Opening:
    """Finds the run that a call goes on with, or begins one."""

    def __init__(self, source: RowSource, batches: Iterable[Any], folder: Path, ranks: Ranks, ids: Ids | None) -> None:
        self.source, self.folder, self.ranks, self.ids = source, folder, ranks, ids
        self.count = len(batches) if isinstance(batches, Sized) else None

    def plan(self, first: Any, dtype: torch.dtype | None, append: bool, about: Mapping[str, str]) -> Plan:
        """Return what is to be done for batches that begin with `first`; the same on all ranks.

        Raises:
            ValueError: the folder holds another index, or something else.
        """
        begun = self.ranks.first(lambda: self._begin(first, dtype, append))
        manifest, number = begun or (self._create(first, dtype, about), 0)
        return Plan(self.folder, manifest, number)

    def _begin(self, first: Any, dtype: torch.dtype | None, append: bool) -> tuple[Manifest, int] | None:
        """Return the manifest to go on with and the number of its run, or None for a new index. Rank 0 alone."""
        try:
            manifest = Manifest.load(self.folder)
        except FileNotFoundError:
            check_free(self.folder)
            self._sweep()
            return None
        self._sweep()
        self._check_same(manifest, dtype)
        found = batch_checksum(first)
        number = find_run(manifest, found, self.count)
        if number is not None:
            make_folder(self.folder / PARTS)
            return manifest, number
        last = manifest.runs[-1]
        if last.shards is None:
            raise ValueError(
                f"batches: {self.folder} was begun with others ({last.batches} of them, and {self.count} now, or the "
                "first differs); finish it with the same ones, or delete the folder"
            )
        if not append:
            raise ValueError(
                f"batches: {self.folder} holds others' gradients; pass append=True to add these, or name another folder"
            )
        manifest = replace(manifest, runs=(*manifest.runs, Run(found, self.count, last.shard_batches)))
        manifest.save(self.folder)
        make_folder(self.folder / PARTS)
        return manifest, len(manifest.runs) - 1

    def _sweep(self) -> None:
        """Remove the files that a run was writing as it was killed."""
        for folder in (self.folder, self.folder / SHARDS, self.folder / PARTS):
            for stray in folder.glob(f".*{TEMPORARY}"):
                if _STRAY.fullmatch(stray.name):
                    stray.unlink(missing_ok=True)

    def _check_same(self, manifest: Manifest, dtype: torch.dtype | None) -> None:
        """Raise ValueError where the index is of another sketch, model or dtype."""
        way_out = "use the same model and sketch (compressor.load(folder / 'sketch.safetensors')), or another folder"
        digest, shapes = self.source.digest(), self.source.shapes
        for layer in manifest.layers:
            if digest.get(layer.name) != layer.digest or shapes[layer.name] != layer.shape:
                raise ValueError(f"out: {self.folder} was made with another sketch of layer {layer.name!r}; {way_out}")
        for name in digest.keys() - manifest.shapes.keys():
            raise ValueError(f"out: {self.folder} has no layer {name!r}; {way_out}")
        if list(shapes) != list(manifest.shapes):
            raise ValueError(f"out: {self.folder} has its layers in another order, {list(manifest.shapes)}; {way_out}")
        if manifest.model != self.source.fingerprint():
            raise ValueError(f"out: {self.folder} was made with other weights of the model; {way_out}")
        if dtype is not None and DTYPES[manifest.dtype] != dtype:
            raise ValueError(
                f"dtype is {dtype}; {self.folder} holds {manifest.dtype}: leave dtype out, or name a new folder"
            )
        if manifest.ids != (self.ids is not None):
            raise ValueError(
                f"ids: {self.folder} was begun {'with' if manifest.ids else 'without'} ids; do the same again"
            )

    def _create(self, first: Any, dtype: torch.dtype | None, about: Mapping[str, str]) -> Manifest:
        """Compress the first batch, for the sizes of layers and shards, and write the first manifest."""
        flat = self._rows(first) if self.source.is_sharded or self.ranks.rank == 0 else None
        return self.ranks.first(lambda: self._write_first(first, flat, dtype, about))

    def _rows(self, batch: Any) -> Tensor:
        found: list[Tensor] = []
        self.source.stream([batch], found.append)
        return found[0]

    def _write_first(
        self, first: Any, flat: Tensor | None, dtype: torch.dtype | None, about: Mapping[str, str]
    ) -> Manifest:
        assert flat is not None
        name = {v: k for k, v in DTYPES.items()}[dtype or flat.dtype]
        shapes = self.source.shapes
        digest = self.source.digest()
        layers = [LayerEntry(layer, shape, digest[layer]) for layer, shape in shapes.items()]
        manifest = Manifest(tuple(layers), name, self.source.fingerprint(), self.ids is not None, about=about)
        manifest = replace(manifest, origin=self.source.origin())
        a_shard = max(1, _SHARD_BYTES // max(1, len(flat) * manifest.codec.row_bytes))
        if self.count is not None:
            a_shard = min(a_shard, -(-self.count // _LEAST_SHARDS))
        self.source.save(self.folder / SKETCH)
        for kept in (SKETCH, PASSAGES):
            if (self.folder / kept).exists():
                manifest = manifest.with_file(kept, file_checksum(self.folder / kept))
        make_folder(self.folder / SHARDS)
        make_folder(self.folder / PARTS)
        manifest = replace(manifest, runs=(Run(batch_checksum(first), self.count, a_shard),))
        manifest.save(self.folder)
        return manifest
