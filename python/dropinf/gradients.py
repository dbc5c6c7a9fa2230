"""Compressed per-sample gradients: one buffer `[N, K]` in which every layer owns a run of columns."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any, Literal, NamedTuple, Protocol, overload, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import plain_name, replacing
from .origin import Origin, check_one_model, joined
from .readonly import ReadOnly

FORMAT = "dropinf.gradients"
FORMAT_VERSION = 1
BLOCK_ROWS = 4096
BLOCK_BYTES = 1 << 28

Shapes = Mapping[str, tuple[int, ...]]
Rows = int | slice | Tensor | Sequence[int] | Sequence[bool]


class Sketched(Protocol):
    """Anything made by a sketch: its layers in column order, and which masks made them."""

    @property
    def shapes(self) -> Shapes: ...
    @property
    def digest(self) -> Mapping[str, str]: ...


class GradientSource(Sketched, Protocol):
    """What Fisher and score read: `Gradients`, or an index on disk that streams row blocks."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...

    def __len__(self) -> int: ...
    def blocks(self, rows: int) -> Iterator[tuple[int, Gradients]]: ...


@runtime_checkable
class Shareable(Protocol):
    """A source that ranks can share: each reads a part of it."""

    def share(self, rank: int, world: int) -> GradientSource: ...


RunKind = Literal["adamw", "tracin"]


class StepScores(NamedTuple):
    """What each sample did in each step; positive: its part of the step lowered the query's loss."""

    values: Tensor  # [Q, rows], or [rows]
    ids: list[str]  # of each row
    steps: Tensor  # [rows], int64

    def by_id(self) -> tuple[Tensor, list[str]]:
        """Return the sums over steps of each sample [Q, N], or [N], and the samples' ids, as they first came."""
        place: dict[str, int] = {}
        at = torch.tensor([place.setdefault(name, len(place)) for name in self.ids], dtype=torch.int64)
        found = self.values.new_zeros(*self.values.shape[:-1], len(place))
        return found.index_add_(-1, at, self.values), list(place)


@runtime_checkable
class Traced(Protocol):
    """A recorded training run, whose steps are scored."""

    def score(self, query: GradientSource, kind: RunKind, **options: Any) -> StepScores: ...


At = slice | Tensor  # positions of samples


@runtime_checkable
class Placed(Protocol):
    """A source that may keep its samples in another order than theirs."""

    def placed_blocks(self, rows: int) -> Iterator[tuple[At, Gradients]]: ...


def placed_blocks(source: GradientSource, rows: int) -> Iterator[tuple[At, Gradients]]:
    """Yield (positions, up to `rows` samples) of a source in the order in which it is read fastest."""
    if isinstance(source, Placed):
        yield from source.placed_blocks(rows)
    else:
        for offset, part in source.blocks(rows):
            yield slice(offset, offset + len(part)), part


def share_of(source: GradientSource, rank: int, world: int) -> GradientSource:
    """Return what one of `world` ranks reads of a source: its own shards of an index.

    Raises:
        ValueError: several ranks, and a source that cannot be shared.
    """
    if world == 1:
        return source
    if not isinstance(source, Shareable):
        raise ValueError(f"group: ranks share an Index, and this is {source!r}; compress into one with out=")
    return source.share(rank, world)


def block_rows(source: GradientSource) -> int:
    """Return how many samples to read at a time: a bounded number of rows and of bytes."""
    sample = sum(map(math.prod, source.shapes.values())) * source.dtype.itemsize
    return max(1, min(BLOCK_ROWS, getattr(source, "block_bytes", BLOCK_BYTES) // sample))


def check_rows(rows: int) -> None:
    """Raise ValueError where a block would have no rows."""
    if rows < 1:
        raise ValueError(f"rows is {rows}; it must be at least 1")


def positions_of(rows: Rows, count: int) -> Tensor:
    """Return the positions, int64 [n], that `rows` selects of `count` samples."""
    if isinstance(rows, slice):
        return torch.tensor(range(*rows.indices(count)), dtype=torch.int64, device="cpu")
    try:
        index = torch.as_tensor(rows, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"samples are selected by ints, a slice or a mask, not by {rows!r}") from error
    if index.dtype == torch.bool:
        if index.shape != (count,):
            raise IndexError(f"a mask of shape {tuple(index.shape)} selects from {count} samples; it must be [{count}]")
        return index.nonzero().flatten()
    if index.numel() == 0:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    if index.ndim > 1 or index.is_floating_point():
        raise IndexError(f"samples are selected by whole numbers, not by {index.dtype} {tuple(index.shape)}")
    index = index.reshape(-1).long()
    wrong = ((index < -count) | (index >= count)).nonzero()
    if len(wrong):
        raise IndexError(f"sample {int(index[wrong[0]])} is out of range for {count} samples")
    return torch.where(index < 0, index + count, index)


def check_same_sketch(first: Sketched, second: Sketched, what: str = "query and train") -> None:
    """Raise ValueError naming the first layer in which `first` and `second` were compressed differently.

    `what` names both, joined by " and ", as the message shows them.
    """
    one, _, two = what.partition(" and ")
    way_out = "Compress both with the same Compressor (same model, sketch, seed and calibration)."
    for name in first.shapes:
        if name not in second.shapes:
            raise ValueError(f"{what} differ: layer {name!r} is in {one} but missing from {two}. {way_out}")
    for name in second.shapes:
        if name not in first.shapes:
            raise ValueError(f"{what} differ: layer {name!r} is in {two} but missing from {one}. {way_out}")
    for name, other in zip_longest(first.shapes, second.shapes):
        if name != other:
            raise ValueError(f"{what} differ: {one} has layer {name!r} where {two} has {other!r}. {way_out}")
        if first.shapes[name] != second.shapes[name]:
            raise ValueError(
                f"{what} differ: layer {name!r} is {first.shapes[name]} per sample in {one} "
                f"but {second.shapes[name]} in {two}. {way_out}"
            )
        if first.digest[name] != second.digest[name]:
            raise ValueError(
                f"{what} differ: layer {name!r} has the same shape but different masks "
                f"(another sketch, seed, calibration or model). {way_out}"
            )


class Gradients:
    """Compressed per-sample gradients of N samples.

    Args:
        flat: `[N, K]`, contiguous, floating point. Held, not copied.
        shapes: layer name -> per-sample shape, `(k_out, k_in)` or `(k,)`, in column order; their sizes
            sum to K.
        digest: layer name -> hex digest of the sketch's tables that made it, so that gradients of different
            sketches are never compared with each other.
        origin: the model and the loss that made it, so that gradients of different models are not scored together;
            None where that is not known.

    Raises:
        ValueError: if the three do not describe one buffer.
    """

    def __init__(
        self, flat: Tensor, shapes: Shapes, digest: Mapping[str, str], origin: tuple[str, str] | None = None
    ) -> None:
        self._shapes, self._digest, self._columns = check_layout(shapes, digest)
        width = sum(map(math.prod, self._shapes.values()))
        if flat.ndim != 2 or flat.shape[1] != width:
            raise ValueError(f"flat is {tuple(flat.shape)}; it must be [N, {width}]: the shapes' total size")
        if not flat.is_floating_point():
            raise ValueError(f"flat is {flat.dtype}; it must be floating point: dequantize it first")
        if not flat.is_contiguous():
            raise ValueError(f"flat has strides {flat.stride()}; it must be contiguous: call flat.contiguous()")
        self._flat = flat.detach()
        self._origin = None if origin is None else Origin(*origin)

    @property
    def flat(self) -> Tensor:
        """`[N, K]`, contiguous: every layer's gradient, flattened row-major, side by side."""
        return self._flat

    @property
    def shapes(self) -> Shapes:
        """Layer name -> per-sample shape, in column order."""
        return self._shapes

    @property
    def digest(self) -> Mapping[str, str]:
        """Layer name -> hex digest of the tables of the sketch that made it."""
        return self._digest

    @property
    def origin(self) -> Origin | None:
        """The model and the loss that made it; None where that is not known."""
        return self._origin

    @property
    def layers(self) -> Mapping[str, Tensor]:
        """Layer name -> view `[N, *shape]` of `flat`, in column order."""
        return ReadOnly({name: self[name] for name in self._shapes})

    @property
    def dtype(self) -> torch.dtype:
        return self._flat.dtype

    @property
    def device(self) -> torch.device:
        return self._flat.device

    @property
    def bytes_per_sample(self) -> int:
        return self._flat.shape[1] * self._flat.element_size()

    def __len__(self) -> int:
        return self._flat.shape[0]

    @overload
    def __getitem__(self, key: str) -> Tensor: ...
    @overload
    def __getitem__(self, key: Rows) -> Gradients: ...
    def __getitem__(self, key: str | Rows) -> Tensor | Gradients:
        """Return a layer by name (a view `[N, *shape]`), or the samples `key` selects as Gradients.

        A contiguous range of samples is a view; a list, an index tensor or a boolean mask copies. One index
        gives Gradients of one sample.

        Raises:
            KeyError: no such layer.
            IndexError: a sample out of range, or a mask that is not `[N]`.
            TypeError: what selects no samples.
        """
        if isinstance(key, str):
            if key not in self._columns:
                raise KeyError(f"no layer {key!r}; the layers are {', '.join(self._shapes)}")
            return self._flat[:, self._columns[key]].view(len(self), *self._shapes[key])
        if isinstance(key, int):
            if not -len(self) <= key < len(self):
                raise IndexError(f"sample {key} is out of range for {len(self)} samples")
            key = slice(key % len(self), key % len(self) + 1)
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1:
                return self._with(self._flat[start:stop])
        return self._with(self._flat[positions_of(key, len(self)).to(self.device)])

    def to(self, *targets: torch.dtype | torch.device | str) -> Gradients:
        """Return the gradients in another dtype, on another device, or both; self if nothing changes."""
        flat = self._flat
        for target in targets:
            flat = flat.to(target)
        return self if flat is self._flat else self._with(flat)

    def blocks(self, rows: int) -> Iterator[tuple[int, Gradients]]:
        """Yield (offset of the first sample, view of up to `rows` samples), in order."""
        check_rows(rows)
        for start in range(0, len(self), rows):
            yield start, self[start : start + rows]

    @classmethod
    def cat(cls, parts: Sequence[Gradients]) -> Gradients:
        """Return the samples of all parts, one part after another.

        Raises:
            ValueError: if there are no parts, they were compressed differently, or they are known to be of different
                models: what would be scored with them could not be compared any more.
        """
        if not parts:
            raise ValueError("parts is empty; Gradients.cat needs at least one")
        for i, part in enumerate(parts[1:], start=1):
            check_same_sketch(parts[0], part, f"parts[0] and parts[{i}]")
        names = [f"parts[{i}]" for i in range(len(parts))]
        check_one_model(parts, names, "Score each on its own, with the gradients of its model")
        flat = torch.cat([part.flat for part in parts])
        return Gradients(flat, parts[0].shapes, parts[0].digest, joined([part.origin for part in parts]))

    def check_same_sketch(self, other: Sketched, what: str = "query and train") -> None:
        """Raise ValueError naming the first layer in which `other` was compressed differently from self."""
        check_same_sketch(self, other, what)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file that `Gradients.load` reads back bit for bit.

        The file appears under `path` only once it is complete.
        """
        layers = [[name, shape, self._digest[name]] for name, shape in self._shapes.items()]
        header = {"format": FORMAT, "version": str(FORMAT_VERSION), "layers": json.dumps(layers)}
        if self._origin is not None:
            header["origin"] = json.dumps(self._origin)
        with replacing(path) as temporary:
            save_file({"gradients": self._flat}, temporary, metadata=header)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Gradients:
        """Read a file that `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: another kind of file, one of a newer format, or one that is truncated or damaged.
        """
        try:
            with plain_name(path) as name, safe_open(name, framework="pt", device=str(device)) as file:
                header = file.metadata() or {}
                _check_header(path, header)
                flat = file.get_tensor("gradients")
        except SafetensorError as error:
            raise ValueError(_unreadable(path, error)) from error
        try:
            layers = json.loads(header["layers"])
            shapes = {name: tuple(shape) for name, shape, _ in layers}
            origin = json.loads(header.get("origin", "null"))
            return cls(flat, shapes, {name: digest for name, _, digest in layers}, origin)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path}: the list of layers is damaged ({error}); write the file again") from error

    def __reduce__(self) -> tuple[type[Gradients], tuple[Any, ...]]:
        whole = self._flat.untyped_storage().nbytes() == self._flat.nbytes
        flat = self._flat if whole else self._flat.clone()
        origin = None if self._origin is None else tuple(self._origin)
        return type(self), (flat, dict(self._shapes), dict(self._digest), origin)

    def __repr__(self) -> str:
        names = list(self._shapes)
        shown = names if len(names) <= 4 else [*names[:3], "...", names[-1]]
        layers = ", ".join(f"{n}: {self._shapes[n]}" if n in self._shapes else n for n in shown)
        size = f"{len(self)} samples x {self._flat.shape[1]}"
        return f"Gradients({size}, {self.dtype}, {self.device}, {len(names)} layers: {layers})"

    def _with(self, flat: Tensor) -> Gradients:
        return Gradients(flat, self._shapes, self._digest, self._origin)


def check_layout(shapes: Shapes, digest: Mapping[str, str]) -> tuple[Shapes, Mapping[str, str], dict[str, slice]]:
    """Return read-only copies of both, and the columns of each layer."""
    if not shapes:
        raise ValueError("shapes is empty; gradients need at least one layer")
    if shapes.keys() != digest.keys():
        odd = sorted(shapes.keys() ^ digest.keys())
        raise ValueError(f"shapes and digest must name the same layers; these are in only one of them: {odd}")
    columns: dict[str, slice] = {}
    start = 0
    for name, shape in shapes.items():
        if len(shape) not in (1, 2) or any(size < 1 for size in shape):
            raise ValueError(f"shapes[{name!r}] is {shape}; it must be (k_out, k_in) or (k,) with sizes of at least 1")
        columns[name] = slice(start, start + math.prod(shape))
        start = columns[name].stop
    frozen = ReadOnly({name: tuple(map(int, shape)) for name, shape in shapes.items()})
    return frozen, ReadOnly({name: digest[name] for name in shapes}), columns


def _check_header(path: str | os.PathLike[str], header: Mapping[str, str]) -> None:
    if header.get("format") != FORMAT or not header.get("version", "").isdecimal():
        raise ValueError(f"{path}: a safetensors file, but not one that Gradients.save wrote")
    if int(header["version"]) > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {header['version']}, newer than this dropinf reads ({FORMAT_VERSION}); "
            "upgrade dropinf"
        )


def _unreadable(path: str | os.PathLike[str], error: Exception) -> str:
    with open(path, "rb") as file:
        started = file.read(9)[8:] == b"{"
    if started:
        return f"{path}: truncated or damaged ({error}); write the file again"
    return f"{path}: not a file that Gradients.save wrote ({error})"
