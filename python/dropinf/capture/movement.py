"""How a forward moves rows by its own numbers (slices, dimensions, the order of what is joined), as a fingerprint: a
batch that is moved by others may have other layouts, though the same functions run on the same shapes.

Only what can move a sample's rows is looked at, along the leading dimension or one as long as the batch, and on
activations alone. What the data moves is not in it: `dependence` says whether it can move rows between samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mover:
    """How a function moves rows: the places of its dimension (None: it has none) and of what says where they go."""

    dim: int | None
    names: Sequence[str]  # keywords of arguments 0, 1, ...
    default: int = 0
    unknowable: bool = False  # its results may be reordered where nothing sees it


def _mover(*names: str, dim: int | None = None, default: int = 0, unknowable: bool = False) -> Mover:
    return Mover(dim, names, default, unknowable)


_BY_NAME: dict[str, Mover] = {
    **dict.fromkeys(
        ("index_select", "gather", "index_fill", "index_reduce", "index_add", "index_copy", "scatter", "scatter_add",
         "scatter_reduce", "index_add_", "index_copy_", "index_fill_", "index_reduce_", "scatter_", "scatter_add_",
         "scatter_reduce_"),
        _mover("input", "dim", "index", dim=1),
    ),
    **dict.fromkeys(("flip", "roll", "repeat_interleave", "take", "masked_select", "masked_scatter", "masked_scatter_",
                     "index_put", "index_put_", "unique", "unique_consecutive", "segment_reduce", "fliplr", "flipud"),
                    _mover("input")),
    "take_along_dim": _mover("input", "indices", "dim", dim=2),
    "sort": _mover("input", "dim", dim=1, default=-1),
    "topk": _mover("input", "k", "dim", dim=2, default=-1),
    "narrow": _mover("input", "dim", "start", "length", dim=1),
    "select": _mover("input", "dim", "index", dim=1),
    "chunk": _mover("input", "chunks", "dim", dim=2),
    "split": _mover("tensor", "split_size_or_sections", "dim", dim=2),
    "tensor_split": _mover("input", "indices_or_sections", "dim", dim=2),
    "unfold": _mover("input", "dimension", "size", "step", dim=1),
    "as_strided": _mover("input"),
    "unbind": _mover("input", "dim", dim=1, unknowable=True),
}  # fmt: skip
_JOINS = ("cat", "stack", "concat", "concatenate", "hstack", "vstack", "dstack", "column_stack", "row_stack")
_TURNS = ("transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis")


def _named(*names: str) -> list[Any]:
    """Return torch's functions and tensors' methods of these names."""
    return [getattr(owner, name) for owner in (torch, Tensor) for name in names if hasattr(owner, name)]


def _functions() -> dict[Any, Mover | str]:
    found: dict[Any, Mover | str] = {f: mover for name, mover in _BY_NAME.items() for f in _named(name)}
    found |= dict.fromkeys(_named(*_TURNS), "turn") | dict.fromkeys(_named(*_JOINS), "join")
    found |= dict.fromkeys(_named("view", "reshape"), "shape")
    found |= {Tensor.__iter__: _mover("input", unknowable=True)}
    return found | {Tensor.__getitem__: "index", Tensor.__setitem__: "index"}


MOVERS = _functions()


class Movement:
    """The movements of one forward of ``n`` samples (None: unknown)."""

    def __init__(self, n: int | None) -> None:
        self.n, self.unknowable = n, False
        self._static: list[str] = []
        self._path = 0  # of all functions, which differ where the data decides what runs
        self._functions: set[int] = set()

    def fingerprint(self) -> tuple[Any, ...] | None:
        """Return what tells this forward's movements from others', or None where nothing can."""
        if self.unknowable:
            return None
        return (self._path, *self._static)

    @property
    def functions(self) -> frozenset[int]:
        """Return which functions ran, however often."""
        return frozenset(self._functions)

    def pass_by(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Add a function that runs, with its small numbers (dimensions, say), to the path."""
        key = hash(function)
        self._functions.add(key)
        small = tuple([tuple(v) if type(v) is list else v for v in args if _is_small(v)])
        named = tuple([(k, str(v)) for k, v in kwargs.items() if _is_small(v)]) if kwargs else ()
        self._path = hash((self._path, key, small, named))

    def note(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Take a call of one of `MOVERS`."""
        kind = MOVERS[function]
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        if kind != "join" and not any(t.requires_grad for t in tensors):
            return
        if kind == "index":
            self._indexed(args[0], args[1])
        elif kind == "join":
            self._joined(function, args, kwargs)
        elif kind == "turn":
            self._static.append(f"{getattr(function, '__name__', '')}{args[1:]}{dict(kwargs)}")
        elif kind == "shape":
            self._shaped(args[1:])
        elif isinstance(kind, Mover):
            self._along(function, kind, args, kwargs)

    def _shaped(self, sizes: Sequence[Any]) -> None:
        """Take in how a new leading dimension goes with the batch's size: rows of several samples may come into one."""
        first = sizes[0] if sizes else None
        first = first[0] if isinstance(first, tuple | list) and first else first
        if isinstance(first, int) and self.n:
            self._static.append(f"{first // self.n}n" if first % self.n == 0 else "-1" if first < 0 else "other")

    def _joined(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Take in which order pieces of one tensor are joined."""
        pieces = args[0] if args else kwargs.get("tensors", ())
        pieces = [p for p in pieces if isinstance(p, Tensor)] if isinstance(pieces, list | tuple) else []
        offsets = [p.storage_offset() for p in pieces if p._base is not None]
        if len(offsets) > 1 and any(p.requires_grad for p in pieces):
            order = sorted(range(len(offsets)), key=offsets.__getitem__)
            self._static.append(f"{getattr(function, '__name__', '')}{order}")

    def _along(self, function: Any, mover: Mover, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        named = dict(zip(mover.names, args, strict=False)) | dict(kwargs)
        x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        dim: Any = 0
        if mover.dim is not None:
            dim = named.get(mover.names[mover.dim], mover.default)
            if not isinstance(dim, int) or not self._holds_samples(x, dim):
                return
        if mover.unknowable:
            size = x.shape[dim] if x.ndim else 1
            self.unknowable |= self.n != 1 and (not self.n or size % self.n == 0)
            return
        rest = [v for v in (*args[1:], *kwargs.values()) if not (isinstance(v, Tensor) and v.is_floating_point())]
        self._static.append(f"{getattr(function, '__name__', '')}{self._plain(rest)}")

    def _indexed(self, x: Tensor, index: Any) -> None:
        items = index if isinstance(index, tuple) else (index,)
        dim = 0
        for item in items:
            if item is None:
                continue
            if item is Ellipsis:
                return
            if self._holds_samples(x, dim) and not (isinstance(item, slice) and item == slice(None)):
                self._static.append(self._plain([item]))
            dim += item.ndim if isinstance(item, Tensor) and item.dtype == torch.bool else 1
            if dim >= x.ndim:
                return

    def _holds_samples(self, x: Tensor, dim: int) -> bool:
        if not x.ndim:
            return False
        dim %= x.ndim
        return dim == 0 or x.shape[dim] == self.n

    def _plain(self, values: Sequence[Any]) -> str:
        """Return numbers as multiples of the batch's size where they are, so that another size looks the same."""

        def one(v: Any) -> Any:
            if isinstance(v, slice):
                return f"{one(v.start)}:{one(v.stop)}:{v.step}"
            if isinstance(v, list | tuple):
                return [one(i) for i in v]
            if isinstance(v, int) and not isinstance(v, bool) and self.n and v and v % self.n == 0:
                return f"{v // self.n}n"
            return "tensor" if isinstance(v, Tensor) else v

        return repr([one(v) for v in values])


def _is_small(value: Any) -> bool:
    """Return whether an argument is a word, a flag or a dimension rather than a size."""
    if type(value) is int:
        return -5 < value < 5
    if type(value) in (tuple, list):
        return len(value) < 6 and all(type(v) is int and -5 < v < 5 for v in value)
    return type(value) is str or type(value) is bool
