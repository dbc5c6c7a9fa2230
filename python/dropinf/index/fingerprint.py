"""The fingerprint of a batch: of every value in it, so that a batch is told from any other."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import decimal
import enum
import fractions
import inspect
import pathlib
import types
import uuid
from collections import UserDict, UserList
from collections.abc import Mapping, Sequence, Set
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

_TEXT = (
    str, int, float, complex, decimal.Decimal, fractions.Fraction, uuid.UUID, pathlib.PurePath, datetime.date,
    datetime.time, datetime.timedelta, range, slice, torch.dtype, torch.device, np.dtype,
)  # fmt: skip
_COMMON = {torch.float32, torch.float64, torch.int64, torch.int32, torch.bool}
_PLAIN = {str, int, float, bool, type(None)}


def fingerprint(batch: Any, *, named: bool = False) -> str:
    """Return the fingerprint of a batch, 32 hex digits: the same in every process, wherever its tensors are.

    It is of all leaves: tensors and NumPy arrays (values, dtype and shape), numbers, text, bytes, None, and containers
    of them: lists and tuples, mappings and sets in any order of their own, dataclasses.

    Args:
        named: the samples have ids; an object of one's own counts by what pickle would keep of it, and what cannot be
            pickled by its type alone.

    Raises:
        ValueError: a leaf that has no fingerprint that stays, such as an object of one's own.
    """
    try:
        return _Print(named).of(batch, "").hex()
    except RecursionError:
        raise ValueError("batches: a batch contains itself, or is nested too deeply for a fingerprint") from None


class _Print:
    """Fingerprints of values; each is of a tag, which says what it is, and of its parts, whose lengths are fixed."""

    def __init__(self, named: bool) -> None:
        self.named = named
        self.done: dict[int, bytes] = {}  # by id: of objects of their user's
        self.alive: list[Any] = []  # so that no id is another's

    def of(self, value: Any, at: str) -> bytes:
        """Return the fingerprint of a value that stands at `at` in the batch, with what was set on it."""
        found = self._of(value, at)
        fields = {f.name for f in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else set()
        extra = {} if isinstance(value, enum.Enum) else getattr(value, "__dict__", {})
        extra = extra if isinstance(value, Tensor | Mapping | list | tuple | Set | np.ndarray) or fields else {}
        held = value.data if isinstance(value, UserDict | UserList) else None
        rest = {name: x for name, x in extra.items() if name not in fields and x is not held and name[0] != "_"}
        return _digest("with", found, self.of(rest, at)) if rest else found

    def _of(self, value: Any, at: str) -> bytes:
        if isinstance(value, Tensor):
            return self._tensor(value, at)
        if isinstance(value, np.ndarray | np.generic):
            return self._array(np.asanyarray(value), at)
        if value is None or isinstance(value, bool):
            return _digest(f"{type(value).__name__} {value}")
        if isinstance(value, enum.Enum):
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            return _digest(f"enum {kind} {value.name}", self.of(value.value, at))
        if isinstance(value, bytes | bytearray | memoryview):
            return _digest("bytes", bytes(value))
        if isinstance(value, Mapping):
            pairs = (self.of(key, at) + self.of(value[key], f"{at}[{key!r}]") for key in value)
            return _digest(f"mapping {len(value)}", *sorted(pairs))
        if isinstance(value, Set):
            return _digest(f"set {len(value)}", *sorted(self.of(member, at) for member in value))
        if isinstance(value, list | tuple):
            return self._sequence(value, at)
        if isinstance(value, _TEXT):
            return _digest(_tag(value), _text(value))
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = [field.name for field in dataclasses.fields(value)]
            found = (self.of(getattr(value, name), f"{at}.{name}") for name in names)
            return _digest(f"fields {names}", *found)
        return self._opaque(value, at)

    def _sequence(self, value: Sequence[Any], at: str) -> bytes:
        if set(map(type, value)) <= _PLAIN:  # a list of tokens, say, which would take long one by one
            with contextlib.suppress(ValueError):  # a number of thousands of digits
                return _digest(f"values {len(value)}", ascii(list(value)).encode())
        return _digest(f"sequence {len(value)}", *(self.of(member, f"{at}[{i}]") for i, member in enumerate(value)))

    def _tensor(self, x: Tensor, at: str) -> bytes:
        if x.is_nested:
            return _digest("nested", *(self._tensor(part, at) for part in x.unbind()))
        if x.layout != torch.strided:
            sparse = x.detach().to_sparse_coo().coalesce()
            parts = (self._tensor(part, at) for part in (sparse.indices(), sparse.values()))
            return _digest(f"sparse {list(x.shape)}", *parts)
        if x.is_meta:
            raise ValueError(f"batches: a batch has a tensor on the meta device{_place(at)}, which has no values")
        if x.is_quantized:
            return _digest("quantized", self._tensor(x.dequantize(), at))
        if x.dtype in _COMMON and x.is_cpu and x.is_contiguous() and not x.is_neg():  # as most are: without copies
            return _digest(f"tensor {x.dtype} {list(x.shape)}", x.detach().numpy().data)
        plain = x.detach().resolve_conj().resolve_neg().cpu().contiguous()
        tag = f"tensor {plain.dtype} {list(plain.shape)}"
        plain = torch.view_as_real(plain).contiguous() if plain.is_complex() else plain
        return _digest(tag, plain.reshape(-1).view(torch.uint8).numpy().data)

    def _array(self, x: np.ndarray[Any, Any], at: str) -> bytes:
        if isinstance(x, np.ma.MaskedArray):
            # What is masked counts too: a loss may read it.
            parts = (
                self._array(part, at) for part in (np.ma.getmaskarray(x), np.asarray(x.filled()), np.asarray(x.data))
            )
            return _digest("masked", *parts)
        tag = f"array {x.dtype.str} {list(x.shape)}"
        if x.dtype.names:
            return _digest(f"{tag} {x.dtype.names}", *(self._array(x[n], f"{at}[{n!r}]") for n in x.dtype.names))
        if x.dtype.hasobject:
            return _digest(tag, self.of(x.tolist(), at))
        return _digest(tag, np.ascontiguousarray(x).tobytes())

    def _object(self, kind: str, value: Any, at: str) -> bytes:
        """Return the fingerprint of an object of its user's, by what it holds, or by its type if that is unknown."""
        if isinstance(value, type | types.ModuleType) or inspect.isroutine(value):
            return _digest(f"object {kind} {getattr(value, '__qualname__', getattr(value, '__name__', ''))}")
        key = id(value)
        if key not in self.done:  # once, whoever refers to it
            self.alive.append(value)
            self.done[key] = _digest(f"object {kind}")  # what refers back to it finds this
            try:
                held = _held(value)
            except Exception:
                held = ()
            self.alive.append(held)
            if held:
                self.done[key] = _digest(f"object {kind}", *(self.of(part, at) for part in held))
        return self.done[key]

    def _opaque(self, value: Any, at: str) -> bytes:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if self.named:
            return self._object(kind, value, at)
        raise ValueError(
            f"batches: a batch has a {kind}{_place(at)}, which has no fingerprint, so that a later run could not tell "
            "this batch from another; pass ids=, a function that names a batch's samples, or make it a tensor, an "
            "array, text or numbers"
        )


def _held(value: Any) -> tuple[Any, ...]:
    """Return what an object of its user's is made of, as pickle has it: how it is made, and what it holds.

    What `functools.cached_property` keeps is left out: it is there once somebody asked for it.

    Raises:
        Exception: whatever the object says of being taken apart, as a lock or a generator does.
    """
    made = value.__reduce_ex__(4)
    if isinstance(made, str):
        return (made,)
    how, given, state, *more = (*made, None)[: max(3, len(made))]
    parts = [list(part) for part in more if part is not None and not callable(part)]
    cached = {name for kind in type(value).__mro__ for name, x in vars(kind).items() if isinstance(x, cached_property)}
    states = [
        {name: x for name, x in part.items() if name not in cached} if isinstance(part, dict) else part
        for part in (state if isinstance(state, tuple) else (state,))
    ]
    return how, given, states, parts


def _place(at: str) -> str:
    return f" at batch{at}" if at else ""


def _tag(value: Any) -> str:
    """Return what kind of text it is: subclasses count as what they are derived from."""
    return next(kind.__name__ for kind in _TEXT if isinstance(value, kind))


def _text(value: Any) -> bytes:
    if isinstance(value, str):
        return str.__str__(value).encode("utf-8", "surrogatepass")
    if isinstance(value, int):
        return hex(value).encode()
    return repr(value).encode() if isinstance(value, float | complex) else f"{value!s}".encode("utf-8", "surrogatepass")


def _digest(tag: str, *parts: bytes | memoryview) -> bytes:
    """Return the digest of a tag and parts: digests, or the bytes of one value."""
    found = xxhash.xxh3_128()
    found.update(tag.encode("utf-8", "backslashreplace") + b"\0")
    for part in parts:
        found.update(part)
    return found.digest()
