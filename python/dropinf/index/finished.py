"""The finished batches of a run, with which those of a later call are compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from ..files import checksum
from .codec import NOISE
from .folder import PARTS, shard_path
from .manifest import ShardEntry
from .reader import Index
from .runs import Plan
from .shards import ShardFile, ShardHeader, read_shard_header, unpack_texts

# How far apart two computations of the same rows may be, relative to their size, by the dtype that is coarser.
_APART = {
    torch.float64: 1e-8,
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 6e-2,
    torch.int8: 1e-1,
}
# And how far the factor between them may be from one, in which rounding cancels.
_FACTOR = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 1e-2, torch.int8: 2e-2}
_MANY = 64  # numbers of a layer in which it does


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
            path.unlink()
            raise ValueError(f"{path}: damaged, and deleted; run it again to make it again")
        return safetensors.torch.load(data), read_shard_header(path)

    def check_rows(self, b: int, flat: Tensor) -> None:
        """Raise ValueError where a finished batch, computed again, has other rows than are stored."""
        kept, codec = self.rows(b), self.plan.manifest.codec
        encoded = codec.encode(flat)
        now = codec.decode(encoded["gradients"], encoded.get("scale"))
        stored, noise = encoded["gradients"].dtype, NOISE * torch.finfo(flat.dtype).eps
        apart = max(_APART.get(dtype, 0.0) for dtype in (flat.dtype, stored))
        if now.shape == kept.shape:
            layer, error = _worst(self.plan.manifest.shapes, codec.widths, now.double(), kept.double(), noise)
            if error <= apart:
                layer, error = _scaled(self.plan.manifest.shapes, codec.widths, now.double(), kept.double(), noise)
                apart = max(_FACTOR.get(dtype, 0.0) for dtype in (flat.dtype, stored))
            if error <= apart:
                return
            what = f"layer {layer!r} differs by {error:.1%}"
        else:
            what = f"it has {len(now)} samples, and had {len(kept)}"
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


def _worst(
    shapes: Mapping[str, object], widths: Sequence[int], now: Tensor, kept: Tensor, noise: float
) -> tuple[str, float]:
    """Return the layer whose rows [n, K] differ most, and by how much, relative to their size.

    A row's size is its own norm and the layer's root mean square over rows, so that rounding in a row that all but
    vanishes counts for nothing; nor does ``noise``, relative to a row of all layers, in a layer that has no gradient.
    """
    found = ("", 0.0)
    peak = torch.maximum(now.abs().max(), kept.abs().max()).clamp_min(torch.finfo(torch.float64).tiny)
    now, kept = now / peak, kept / peak  # whose squares neither overflow nor vanish
    least = noise * torch.maximum(now.norm(dim=1), kept.norm(dim=1))
    for name, a, b in zip(shapes, now.split(list(widths), 1), kept.split(list(widths), 1), strict=True):
        apart, size = ((a - b).norm(dim=1) - least).clamp_min(0), torch.maximum(a.norm(dim=1), b.norm(dim=1))
        error = float((apart / (size + size.square().mean().sqrt()).clamp_min(torch.finfo(torch.float64).tiny)).max())
        if error > found[1]:
            found = (name, error)
    return found


def _scaled(
    shapes: Mapping[str, object], widths: Sequence[int], now: Tensor, kept: Tensor, noise: float
) -> tuple[str, float]:
    """Return the layer whose rows [n, K] are most of all a multiple of the others, and by how much that is not one.

    ``noise``: what all rows of a layer may be, beside the largest number of others, and say nothing.
    """
    found, both = ("", 0.0), []
    least = noise * float(kept.abs().max()) if kept.numel() else 0.0
    for name, a, b in zip(shapes, now.split(list(widths), 1), kept.split(list(widths), 1), strict=True):
        peak = b.abs().max() if b.numel() else b.new_zeros(())
        if peak > least:
            a, b = (a / peak).flatten(), (b / peak).flatten()
            both.append((a @ b, b @ b))
            error = float((a @ b / (b @ b) - 1).abs())
            found = (name, error) if error > found[1] and len(b) >= _MANY else found
    if both:
        error = float((sum(ab for ab, _ in both) / sum(bb for _, bb in both) - 1).abs())
        found = (next(iter(shapes)), error) if error > found[1] else found
    return found
