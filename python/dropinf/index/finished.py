"""The finished batches of a run, with which those of a later call are compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import safetensors.torch
from torch import Tensor

from ..files import checksum
from .codec import DTYPES
from .folder import PARTS, remove, shard_path
from .manifest import DECODED_FROM, ShardEntry
from .reader import Index
from .rows_alike import apart
from .runs import Plan
from .shards import ShardFile, ShardHeader, read_shard_header, unpack_texts


class _Place(NamedTuple):
    """Where the rows of a finished batch are: in a part, or in a shard from row `first` on."""

    shard: int | None
    first: int
    rows: int
    print: str | None


class Finished:
    """The batches of a run that are on disk: their fingerprints, ids and rows, to compare others with."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.folder = plan, plan.folder
        stop = plan.base + len(plan.run.shards or ())
        self.shards = dict(enumerate(plan.earlier)) | dict(enumerate(plan.later, stop))
        self.parts: dict[int, str] = {}
        self._places: dict[int, _Place] = {}
        self._texts: tuple[int, list[str]] | None = None  # ids of the shard that was read last
        for b, name, header in plan.part_files():
            self.parts[b] = name
            self._places[b] = _Place(None, 0, header.batches[0], header.prints[0])
        self._there: set[int] = set()  # shards of the run, numbered within it
        at = 0  # of the first batch of a merged shard, whose numbers of batches differ
        for n, found, header in plan.shard_files():
            self._there.add(n)
            self.shards[plan.base + n] = ShardEntry(found, sum(header.batches), plan.first_number + n)
            first, b = 0, n * plan.run.shard_batches
            if plan.call is not None:
                b, at = at - plan.first_batch, at + len(header.batches)
            for count, print_ in zip(header.batches, header.prints, strict=True):
                self._places[b] = _Place(plan.base + n, first, count, print_)
                first, b = first + count, b + 1
        if plan.call is not None:
            for entry in plan.run.shards or ():
                self._file_of(entry).check_size()  # one that is lost cannot be made again
            self._places = {b: place for b, place in self._places.items() if 0 <= b < plan.run.calls[plan.call].batches}

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._places))

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, b: object) -> bool:
        return b in self._places

    def missing(self, b: int) -> bool:
        """Return whether the run has room for a batch that is not finished: no shard ends before it."""
        own, shard = self.plan.run.shards, b // self.plan.run.shard_batches
        if self.plan.call is not None:
            return False
        return shard not in self._there and (own is None or shard < len(own))

    def check_missing(self, b: int) -> None:
        """Raise ValueError where a batch that is not finished comes after the last one of the run."""
        begun = self.plan.run.batches
        if self.plan.run.shards is None and begun is not None and b >= begun:
            raise ValueError(
                f"batches: {self.folder} was begun with {begun} of them, and there are more now; go on with those of "
                "then, or give them up (Index.discard(), or delete the folder)"
            )
        if not self.missing(b):
            raise ValueError(
                f"batches: not as many as before: {self.folder} has {b} of them, and there are more now; pass "
                "append=True and the new ones alone, to add them"
            )

    def tells(self, b: int) -> bool:
        """Return whether a batch has a fingerprint, or ids."""
        return self._places[b].print is not None or self.plan.manifest.ids

    def difference(self, b: int, found: str, ids: Sequence[str] | None) -> str | None:
        """Return how a batch with this fingerprint and these ids differs from the finished one; None where it does not.

        Raises:
            ValueError: the file of the finished one is damaged.
        """
        place = self._places[b]
        if place.print is not None and place.print != found:
            return f"batches: batch {b} is another than the one whose rows are in {self.folder}"
        if ids is not None:
            kept = self.ids(b)
            if list(ids) != kept:
                self._verify(place.shard)
                return f"ids: those of batch {b} are {_few(ids)}, and were {_few(kept)} when its rows were stored"
        return None

    def ids(self, b: int) -> list[str]:
        """Return the ids of a finished batch."""
        place = self._places[b]
        if place.shard is None:
            part, _ = self.part(b)
            return unpack_texts(part["ids"], part["id_offsets"])
        if self._texts is None or self._texts[0] != place.shard:
            file = self._file(place.shard)
            try:
                self._texts = place.shard, file.texts(file.layout())
            except ValueError:
                self._verify(place.shard)
                raise
        return self._texts[1][place.first : place.first + place.rows]

    def rows(self, b: int) -> Tensor:
        """Return the rows of a finished batch as they are read from the index."""
        place, codec = self._places[b], self.plan.manifest.codec
        if place.shard is None:
            part, _ = self.part(b)
            return codec.decode(part["gradients"], part.get("scale"))
        index = Index.of_shards(self.folder, self.plan.manifest, {place.shard: self.shards[place.shard]})
        return index[place.first : place.first + place.rows].flat

    def part(self, b: int) -> tuple[dict[str, Tensor], ShardHeader]:
        """Return what the file of a batch holds that is in no shard yet.

        Raises:
            ValueError: damaged; it is then deleted, to be made again.
        """
        path = self.folder / PARTS / self.parts[b]
        data = path.read_bytes()
        if checksum(data) not in self.parts[b]:
            remove(path)
            raise ValueError(f"{path}: damaged, and deleted; run it again to make it again")
        return safetensors.torch.load(data), read_shard_header(path)

    def check_rows(self, b: int, flat: Tensor, kept: Tensor | None = None) -> None:
        """Raise ValueError where a finished batch, computed again, has other rows than are stored.

        ``kept``: the stored rows, where they were read before; nothing is read then.
        """
        codec = self.plan.manifest.codec
        kept = self.rows(b) if kept is None else kept
        encoded = codec.encode(flat)
        now = codec.decode(encoded["gradients"], encoded.get("scale"))
        known = self.plan.manifest.about.get(DECODED_FROM)
        dtypes = [flat.dtype, encoded["gradients"].dtype, *([] if known is None else [DTYPES[known]])]
        what = apart(self.plan.manifest.shapes, now, kept, *dtypes, codes=codec.bits is not None)
        if what is None:
            return
        raise ValueError(
            f"batches: batch {b}, computed again, has other gradients than the rows in {self.folder} ({what}): "
            "loss_fn, the model's code, its mode or its precision has changed, or is random; do as when they were "
            "stored, or name another folder"
        )

    def check_bytes(self, b: int) -> None:
        """Raise ValueError where the file of a finished batch is damaged."""
        shard = self._places[b].shard
        if shard is not None:
            self._file(shard).verify(self.shards[shard].checksum)

    def move(self, shard: int, batches: Mapping[int, int]) -> None:
        """Remember that parts were made a shard, of these batches with so many rows each."""
        first = 0
        for b, rows in batches.items():
            if b in self._places:
                self._places[b] = self._places[b]._replace(shard=shard, first=first)
            first += rows

    def twin(self, other: Finished) -> bool:
        """Return whether all batches of two runs are the same, by fingerprints and ids."""
        if self._places.keys() != other._places.keys():
            return False
        ids = self.plan.manifest.ids
        return all(
            place.print is not None and other.difference(b, place.print, self.ids(b) if ids else None) is None
            for b, place in self._places.items()
        )

    def _file(self, shard: int) -> ShardFile:
        return self._file_of(self.shards[shard])

    def _file_of(self, entry: ShardEntry) -> ShardFile:
        return ShardFile(shard_path(self.folder, entry.number, entry.checksum), self.plan.manifest.codec, entry.rows)

    def _verify(self, shard: int | None) -> None:
        if shard is not None:
            self._file(shard).verify(self.shards[shard].checksum)


def _few(ids: Sequence[str]) -> str:
    return f"{list(ids[:3])}{'...' if len(ids) > 3 else ''}"
