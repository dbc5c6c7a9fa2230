"""How a run into an index begins: which run it is, or what a new one is like."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import TEMPORARY, checksum, file_checksum, is_whole, replacing
from ..loss_name import is_same_loss
from ..origin import difference, is_same_code
from ..ranks import Ranks
from ..workload import Ids, check_ids_stay, count_of
from .choice import choose_run, runs_alike
from .codec import name_of, shown
from .coded import write_code, write_code_again
from .compact import sweep_merged
from .discard import drop_unbegun
from .folder import (
    _STRAY,
    CODE,
    PARTS,
    PASSAGES,
    PROBE,
    SHARDS,
    SKETCH,
    check_free,
    check_here,
    make_place,
    remove,
    write_whole,
)
from .manifest import FUNCTIONS, LayerEntry, Manifest, check_code
from .parts import Share
from .probe import check_first_batch, freeze, keep_again, rows_of
from .runs import Plan
from .shards import SHARD_BYTES
from .source import RowSource

_LEAST_SHARDS = 64  # if there are as many batches: what ranks share


def _number(batches: int | None) -> str:
    return "a stream" if batches is None else str(batches)


class Opening:
    """Finds the run that a call goes on with, or begins one."""

    def __init__(
        self,
        source: RowSource,
        batches: Iterable[Any],
        folder: Path,
        ranks: Ranks,
        ids: Ids | None,
        about: Mapping[str, str] | None,
    ) -> None:
        self.source, self.batches, self.folder, self.ranks, self.ids = source, batches, folder, ranks, ids
        self.about = about  # None: no command line, which keeps the passages
        self.count = count_of(batches)

    def plan(self, first: Any, found: str, dtype: str | None, append: bool) -> Plan:
        """Return what is to be done for batches that begin with `first`; the same on all ranks.

        `found` is its fingerprint.

        Raises:
            ValueError: the folder holds another index, or something else.
        """
        plan = self.ranks.first(lambda: self._begin(first, found, dtype, append))
        if plan is None:
            return Plan(self.folder, self._create(first, found, dtype), 0)
        if self.ranks.rank > 0 and plan.number > 0 and plan.run.shards is None:
            check_first_batch(self.source, self.folder, plan.manifest, first)  # as rank 0 has
        return plan

    def _begin(self, first: Any, found: str, dtype: str | None, append: bool) -> Plan | None:
        """Return the run to go on with, or None for a new index. Rank 0 alone."""
        check_here(self.folder)
        try:
            manifest = Manifest.load(self.folder)
        except FileNotFoundError:
            check_free(self.folder)
            self._sweep()
            return None
        self._sweep()
        sweep_merged(self.folder, manifest)
        left = drop_unbegun(self.folder, manifest)
        if left is None:
            return None
        manifest = left
        code = self.source.code()
        changed = self._check_same(manifest, dtype, code)
        self._save_sketch_again(manifest)
        write_code_again(self.source, self.folder, manifest)
        self._check_ids(first)
        manifest = self._with_origin(manifest, append)
        chosen = choose_run(self.folder, manifest, self.batches, first, lambda _: self.ids, append)
        if isinstance(chosen, Plan):
            return self._going_on(chosen, first, changed, code)
        last = manifest.runs[-1]
        if last.shards is None:
            give_up = "; to give up what was appended of them: Index.discard()" if manifest.shards else ""
            raise ValueError(
                f"batches: {self.folder} was begun with others ({_number(last.batches)} of them, and "
                f"{_number(self.count)} now, or {chosen or 'the first differs'}); finish it with the same ones, or "
                f"delete the folder{give_up}"
            )
        if not append:
            why = f" ({chosen or 'the first batch is another'})"
            raise ValueError(
                f"batches: {self.folder} holds others' gradients{why}; pass append=True to add these, or name another "
                "folder"
            )
        if self.about is None and PASSAGES in manifest.files:
            raise ValueError(
                f"append: {self.folder} keeps the passages of its samples ({PASSAGES}), and these have none; add to it "
                "with dropinf index --append, or name another folder"
            )
        self._check_adds(manifest, first, code)
        alike = isinstance(self.batches, Iterator) and runs_alike(self.folder, manifest, self.batches, first)
        manifest = manifest.begun(found, self.count, self._shard_batches(last.shard_batches))
        manifest.save(self.folder)
        make_place(self.folder / PARTS)
        return Plan(self.folder, manifest, len(manifest.runs) - 1, undecided=bool(alike))

    def _going_on(self, plan: Plan, first: Any, changed: bool, code: Mapping[str, str]) -> Plan:
        """Return what is to be done to go on with a run, or to find it finished.

        With another loss, or where the model may do something else, all of an unfinished run are compared first. What
        makes the others then makes all, and the manifest says so.
        """
        manifest, unfinished = plan.manifest, plan.run.shards is None
        if plan.number == 0 and not plan.call:
            keep_again(self.folder, manifest, first)
        other = self._other_loss(manifest)
        if unfinished and manifest.shards:
            self._check_adds(manifest, first, code)
        if other is not None:
            warnings.warn(f"{other}: unless both give the same, name another folder", stacklevel=3)
        self._check_something_left(plan, other, manifest, code)
        make_place(self.folder / PARTS)
        if not unfinished or (other is None and not changed):
            return plan
        return replace(plan, manifest=manifest.going_on(self.source.origin(), code), every=True, going_on=True)

    def _check_adds(self, manifest: Manifest, first: Any, code: Mapping[str, str]) -> None:
        """Raise ValueError where rows of another loss or code would stand behind those of finished runs."""
        if not is_same_code(manifest.code.get(FUNCTIONS), code.get(FUNCTIONS)):
            raise ValueError(
                f"model: what its modules' forward does is not what it did when {self.folder} was made, or a function "
                "or constant that it reads is another; append with the code of then, or name another folder"
            )
        other = self._other_loss(manifest)
        if other is not None:
            raise ValueError(
                f"{other}: append with the function of then (its code and the constants that it reads are compared), "
                "or name another folder"
            )
        found = difference((manifest.made_by or ("",))[0], self.source.origin().model)
        if found is not None:
            raise ValueError(
                f"model: it is not the one that {self.folder} was made with: {found}; append with the model of then, "
                "or name another folder"
            )
        check_first_batch(self.source, self.folder, manifest, first)

    def _save_sketch(self) -> None:
        """Write the masks; where some are there, as the command line draws them first, they must be the same."""
        path = self.folder / SKETCH
        if not path.exists():
            self.source.save(path)
            return
        with replacing(path) as temporary:
            self.source.save(temporary)
            if path.read_bytes() != temporary.read_bytes():
                raise ValueError(
                    f"out: {path} holds other masks than those of this compressor; take them with "
                    "Compressor.from_masks, or name another folder"
                )

    def _save_sketch_again(self, manifest: Manifest) -> None:
        """Write masks that are damaged or lost again, where this compressor's are those."""
        path, known = self.folder / SKETCH, manifest.files.get(SKETCH)
        if is_whole(path, known):
            return
        with suppress(ValueError), replacing(path) as temporary:
            self.source.save(temporary)
            if file_checksum(temporary) != known:
                raise ValueError("masks of a compressor that was calibrated further, say")

    def _check_something_left(
        self, plan: Plan, other_loss: str | None, manifest: Manifest, code: Mapping[str, str]
    ) -> None:
        """Raise ValueError where another loss or code is to make lost rows again, and none is left to compare with."""
        same = is_same_code(manifest.code.get(FUNCTIONS), code.get(FUNCTIONS))
        if (other_loss is None and same) or any(plan.shard_files()) or any(plan.part_files()):
            return
        raise ValueError(
            f"{other_loss or 'model: what its forward does is not what it did'}; no row of this run is left in "
            f"{self.folder} to compare with: do as when they were made, or name another folder"
        )

    def _shard_batches(self, most: int) -> int:
        return self.batches.shard_batches(most) if isinstance(self.batches, Share) else most

    def _sweep(self) -> None:
        """Remove the files that a run was writing as it was killed."""
        for folder in (self.folder, self.folder / SHARDS, self.folder / PARTS):
            for stray in folder.glob(f".*{TEMPORARY}"):
                if _STRAY.fullmatch(stray.name):
                    remove(stray)

    def _check_same(self, manifest: Manifest, dtype: str | None, code: Mapping[str, str]) -> bool:
        """Raise ValueError where the index is of another sketch, model or dtype. Return whether the model may compute
        something else, which is warned of."""
        if dtype is not None and manifest.dtype != dtype:
            raise ValueError(
                f"dtype is {shown(dtype)}; {self.folder} holds {manifest.dtype}: leave dtype out, or name a new folder"
            )
        way_out = "use the same model and sketch (compressor.load(folder / 'sketch.safetensors')), or another folder"
        digest, shapes = self.source.digest(), self.source.shapes
        for layer in manifest.layers:
            if manifest.codec.bits and digest.get(layer.name) != layer.digest:
                raise ValueError(
                    f"dtype: {self.folder} holds rows of another code; leave dtype out, which takes that of the index, "
                    "or name a new folder"
                )
            if digest.get(layer.name) != layer.digest or shapes[layer.name] != layer.shape:
                raise ValueError(f"out: {self.folder} was made with another sketch of layer {layer.name!r}; {way_out}")
        for name in digest.keys() - manifest.shapes.keys():
            raise ValueError(f"out: {self.folder} has no layer {name!r}; {way_out}")
        if list(shapes) != list(manifest.shapes):
            raise ValueError(f"out: {self.folder} has its layers in another order, {list(manifest.shapes)}; {way_out}")
        if manifest.model != self.source.fingerprint():
            raise ValueError(f"out: {self.folder} was made with other weights of the model; {way_out}")
        changed = check_code(code, manifest.code, self.folder)
        if manifest.ids != (self.ids is not None):
            raise ValueError(
                f"ids: {self.folder} was begun {'with' if manifest.ids else 'without'} ids; do the same again"
            )
        return changed

    def _with_origin(self, manifest: Manifest, append: bool) -> Manifest:
        """Return the manifest with the origin of its rows, which the first format version did not have.

        The model was compared, and so will be rows of the loss; but not where others are appended.
        """
        if manifest.origin is not None:
            return manifest
        origin = self.source.origin()
        return replace(manifest, origin=origin._replace(loss="") if append else origin)

    def _other_loss(self, manifest: Manifest) -> str | None:
        """Return what to say where the rows may be of another loss, or None."""
        assert manifest.made_by is not None
        before, now = manifest.made_by[1], self.source.loss_name()
        if is_same_loss(before, now):
            return None
        return (
            f"loss_fn: it is {now}, and {self.folder} was made with {before}; rows of two losses do not belong in one "
            "index"
        )

    def _create(self, first: Any, found: str, dtype: str | None) -> Manifest:
        """Compress the first batch, for the sizes of layers and shards, and write the first manifest."""
        self._check_ids(first)
        flat = rows_of(self.source, first) if self.source.is_sharded or self.ranks.rank == 0 else None
        return self.ranks.first(lambda: self._write_first(first, found, flat, dtype))

    def _check_ids(self, first: Any) -> None:
        if self.ids is not None:
            check_ids_stay(self.ids, first)

    def _write_first(self, first: Any, found: str, flat: Tensor | None, dtype: str | None) -> Manifest:
        assert flat is not None
        check_here(self.folder)  # to compute the rows may have taken a while
        name = dtype or name_of(flat.dtype)
        shapes = self.source.shapes
        digest = self.source.digest()
        layers = [LayerEntry(layer, shape, digest[layer]) for layer, shape in shapes.items()]
        about = {**(self.about or {}), **self.source.code()}
        manifest = Manifest(tuple(layers), name, self.source.fingerprint(), self.ids is not None, about=about)
        manifest = replace(manifest, origin=self.source.origin())
        a_shard = max(1, SHARD_BYTES // max(1, len(flat) * manifest.codec.row_bytes))
        if self.count is not None:
            a_shard = min(a_shard, -(-self.count // _LEAST_SHARDS))
        a_shard = self._shard_batches(a_shard)
        self._save_sketch()
        coded = write_code(self.source, self.folder)
        manifest = manifest if coded is None else manifest.with_file(CODE, coded)
        kept_batch = freeze(first)
        if kept_batch is not None:
            write_whole(self.folder / PROBE, kept_batch)
            manifest = manifest.with_file(PROBE, checksum(kept_batch))
        for kept in (SKETCH, PASSAGES):
            if (self.folder / kept).exists():
                manifest = manifest.with_file(kept, file_checksum(self.folder / kept))
        make_place(self.folder / SHARDS)
        make_place(self.folder / PARTS)
        manifest = manifest.begun(found, self.count, a_shard)
        manifest.save(self.folder)
        return manifest
