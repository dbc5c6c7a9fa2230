"""What a loss function, and the classes of a model, are known by: their source, and the constants they compute with."""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import re
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from .files import checksum
from .workload import tensor_bytes

HELD = ", binds "
_EARLIER = re.compile(r", (holding|with) ")  # of versions that looked at other constants
_LARGEST_HELD = 1 << 24  # bytes
_MOST_NUMBERS = 1 << 12  # of a list: longer ones are data, or a record
_PLAIN = (bool, int, float, complex, str, bytes)
_INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]|^<")


def name_of_loss(loss_fn: object) -> str:
    """Return the qualified name of a loss function, and fingerprints of its source and of what it holds, if any.

    It holds constants: numbers, text, tensors, arrays and lists of numbers that a closure, a partial, defaults,
    attributes or global names bind, and the functions of its user's that it calls.
    """
    held = _held(loss_fn, frozenset())
    return f"{_plain_name(loss_fn)}{HELD}{checksum(held)[:8]}" if held else _plain_name(loss_fn)


def is_same_loss(before: str, now: str) -> bool:
    """Return whether two names are of the same source and constants, as far as both tell; wherever it is defined."""
    (old, _, its), (new, _, held) = before.partition(HELD), now.partition(HELD)
    known = its != "" and not _EARLIER.search(before)
    return not before or (_source(_EARLIER.split(old)[0]) == _source(new) and (its == held or not known))


def functions_of(kind: type) -> bytes:
    """Return what a class of its user's does in ``forward``, and in what that names of the class, with the constants
    that these read, in bytes. Comments, docstrings and layout count for nothing, and what is installed is left out.
    """
    found: dict[str, bytes] = {}
    todo = ["forward", "__call__", "__getattr__"]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        value = next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)
        given = [getattr(value, part, None) for part in ("__func__", "fget", "func")]
        functions = [f for f in (value, *given) if inspect.isfunction(f) and not _is_installed(f)]
        found[name] = b"".join(_text(f.__code__) + _held(f, frozenset()) for f in functions)
        if not callable(value):
            found[name] += _constant(value, frozenset())
        for function in functions:
            todo += [i.argval for i in _instructions(function.__code__) if i.opname in ("LOAD_ATTR", "LOAD_METHOD")]
    return b";".join(name.encode() + b"=" + found[name] for name in sorted(found) if found[name])


def _is_installed(function: types.FunctionType) -> bool:
    return _INSTALLED.search(function.__code__.co_filename) is not None


@functools.lru_cache(4096)
def _text(code: types.CodeType) -> bytes:
    """Return a function's source without comments, docstrings and layout, as it was when it was first asked for."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):  # made at run time, say
        return code.co_code
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node) is not None
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree).encode()


def _source(name: str) -> str:
    """Return a name without where the function is defined, where a fingerprint of its source follows."""
    return re.sub(r"^\S+(?= [0-9a-f]{8}\b)", "", name)


def _plain_name(loss_fn: object) -> str:
    if isinstance(loss_fn, functools.partial):
        bound = re.sub(r" at 0x[0-9a-f]+", "", repr((loss_fn.args, loss_fn.keywords)))
        return f"{_plain_name(loss_fn.func)}, bound {checksum(bound.encode())[:8]}"
    about: Any = inspect.unwrap(loss_fn) if inspect.isroutine(loss_fn) else type(loss_fn)
    try:
        source = inspect.getsource(about).encode()
    except (OSError, TypeError):
        source = getattr(getattr(about, "__code__", None), "co_code", b"")
    name = f"{getattr(about, '__module__', '')}.{getattr(about, '__qualname__', type(about).__name__)}"
    return f"{name} {checksum(source)[:8]}" if source else name


def _held(loss_fn: Any, seen: frozenset[int]) -> bytes:
    """Return the constants that a loss binds, in bytes. ``seen``: functions that were asked, as one may hold itself."""
    if id(loss_fn) in seen:
        return b""
    seen |= {id(loss_fn)}
    if isinstance(loss_fn, functools.partial):
        return _constants((loss_fn.args, loss_fn.keywords), seen) + _held(loss_fn.func, seen)
    about = inspect.unwrap(loss_fn) if inspect.isroutine(loss_fn) else loss_fn
    return _constants((_bound(about if inspect.isfunction(about) else loss_fn),), seen)


def _bound(loss_fn: Any) -> Mapping[str, Any]:
    """Return what a function or an object binds by name, but for what the function itself binds anew, as a count."""
    if not inspect.isfunction(loss_fn):
        owner = getattr(loss_fn, "__self__", loss_fn)
        called = getattr(loss_fn, "__func__", None) or getattr(type(loss_fn), "__call__", None)  # noqa: B004
        return dict(getattr(owner, "__dict__", {})) | (_globals(called) if inspect.isfunction(called) else {})
    code = loss_fn.__code__
    counts = {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_DEREF"}
    cells = zip(code.co_freevars, loss_fn.__closure__ or (), strict=True)
    found = {name: cell for name, cell in cells if name not in counts}
    held = {name: cell.cell_contents for name, cell in found.items() if cell != types.CellType()}
    return _globals(loss_fn) | held | {"defaults": loss_fn.__defaults__ or ()} | (loss_fn.__kwdefaults__ or {})


def _globals(function: types.FunctionType) -> dict[str, Any]:
    """Return what a function of its user's reads by global names, but for what it binds anew."""
    if _is_installed(function):
        return {}
    names, counts = set(), set()
    for i in _instructions(function.__code__):
        if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.add(i.argval)
        elif i.opname == "STORE_GLOBAL":
            counts.add(i.argval)
    known = function.__globals__
    return {name: known[name] for name in sorted(names - counts) if name in known}


def _instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
    """Yield what a function does, and the functions in it."""
    yield from dis.get_instructions(code)
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from _instructions(part)


def _constants(values: Iterable[Any], seen: frozenset[int]) -> bytes:
    """Return the constants in values, in bytes: nothing for what has none, such as a model, or what is installed."""
    return b";".join(part for value in values if (part := _constant(value, seen)))


def _constant(value: Any, seen: frozenset[int]) -> bytes:
    if isinstance(value, Tensor):
        small = value.numel() * value.element_size() <= _LARGEST_HELD  # weights of classes, not data
        return f"{tuple(value.shape)} {value.dtype}".encode() + (bytes(tensor_bytes(value)) if small else b"")
    if isinstance(value, np.ndarray):
        small = value.nbytes <= _LARGEST_HELD and not value.dtype.hasobject
        return f"{value.shape} {value.dtype}".encode() + (value.tobytes() if small else b"")
    if isinstance(value, _PLAIN):
        return repr(value).encode()
    if isinstance(value, tuple):
        return _constants(value, seen)
    if isinstance(value, list):
        plain = len(value) <= _MOST_NUMBERS and all(isinstance(member, _PLAIN) for member in value)
        return _constants(value, seen) if plain else b""
    if isinstance(value, Mapping):
        parts = [(str(key).encode(), _constants((value[key],), seen)) for key in sorted(value, key=str)]
        return b"".join(key + b"=" + part for key, part in parts if part)
    if isinstance(value, nn.Module):  # a criterion; a model is known by its weights
        mine = {name: x for name, x in vars(value).items() if isinstance(x, _PLAIN)} | dict(value.named_buffers())
        return b"" if any(True for _ in value.parameters()) else type(value).__name__.encode() + _constant(mine, seen)
    if inspect.isfunction(value) and not _is_installed(value):
        return _text(value.__code__) + _held(value, seen)
    return b""
