"""What a loss function, and the classes of a model, are known by: their source, and the constants they compute with."""

from __future__ import annotations

import argparse
import collections
import decimal
import dis
import enum
import fractions
import functools
import inspect
import re
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .files import checksum
from .workload import tensor_bytes

HELD = ", does "
_EARLIER = re.compile(r", (holding|with|binds) ")  # of versions that looked at less
_LARGEST_HELD = 1 << 24  # bytes
_MOST_NUMBERS = 1 << 12  # of a list: longer ones are data, or a record
_WRAPPERS = {
    "__func__": (staticmethod, classmethod, types.MethodType),
    "fget": (property,),
    "func": (functools.cached_property, functools.partialmethod, functools.partial),
}
_OF_CLASSES = ("__module__", "__qualname__", "__doc__", "__firstlineno__", "__static_attributes__")
_MAKING = ("__init__", "__new__", "__post_init__", "__setstate__")
_CONTAINERS = (dict, list, set)
_MAPPINGS = collections.UserDict, collections.ChainMap, types.MappingProxyType
_PLAIN = (bool, int, float, complex, str, bytes)
_VALUES = (fractions.Fraction, decimal.Decimal, range, slice, enum.Enum)
_FIXED = (tuple, np.generic, torch.dtype, torch.device)
_MUTATING = {
    "append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "clear", "remove", "discard",
}  # fmt: skip
_STANDARD = sysconfig.get_paths()["stdlib"]
_INSTALLED = re.compile(rf"[/\\](site|dist)-packages[/\\]|^<frozen|^{re.escape(_STANDARD)}[/\\]")
_PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"


def name_of_loss(loss_fn: object) -> str:
    """Return the qualified name of a loss function, and fingerprints of its source and of what it does, if any.

    It does what its code says, instruction by instruction, and that of its decorators, of the methods that it names of
    its class and of the functions of its user's that it calls; with constants: numbers, text, tensors, arrays and lists
    of numbers that a closure, a partial, defaults, attributes or global names bind.
    """
    try:
        does = _done_by(loss_fn, {})
    except Exception:  # of an object of its user's that cannot be asked
        does = b""
    return f"{_plain_name(loss_fn)}{HELD}{_PYTHON}:{checksum(does)[:8]}" if does else _plain_name(loss_fn)


def is_same_loss(before: str, now: str) -> bool:
    """Return whether two names are of losses that do the same, as far as both tell; wherever they are defined.

    Of two versions of Python their sources are compared.
    """
    (old, _, its), (new, _, does) = before.partition(HELD), now.partition(HELD)
    if its and does and its.partition(":")[0] == does.partition(":")[0]:
        return its == does
    return not before or _source(_EARLIER.split(old)[0]) == _source(new)


def _done_by(loss_fn: Any, seen: dict[int, Any]) -> bytes:
    """Return what a loss does, with its constants."""
    if isinstance(loss_fn, functools.partial):
        return _done_by(loss_fn.func, seen) + b"(" + _constants((loss_fn.args, loss_fn.keywords), seen)
    if inspect.isfunction(loss_fn):
        return b"".join(_does(function, seen) for function in _functions(loss_fn))
    owner = getattr(loss_fn, "__self__", loss_fn)
    kind = owner if isinstance(owner, type) else type(owner)
    begins = {loss_fn.__name__} if inspect.ismethod(loss_fn) else {"forward", "__call__"}
    return (b"" if is_of_a_library(kind) else _done([kind], begins)) + _held(loss_fn, seen)


def functions_of(kinds: Iterable[type]) -> str:
    """Return a checksum of what classes of their users do in ``forward``, and in what that names of any of them, with
    the constants that these read; behind the version of Python, as only within one do they compare.

    It is of the code that runs: comments, docstrings and layout count for nothing. What is installed is left out.
    """
    try:
        return f"{_PYTHON}:{checksum(_done(kinds, {'forward', '__call__', '__getattr__'}))}"
    except Exception:  # of an object of its user's that cannot be asked: it is compared with none
        return ""


def _done(kinds: Iterable[type], begins: set[str]) -> bytes:
    """Return what classes of their users do in some methods, and in what these name of any of the classes."""
    bases = {base for kind in kinds for base in kind.__mro__ if not is_of_a_library(base)}
    found: dict[tuple[type, str], bytes] = {}
    reads, sets, more = begins, set[str](), True
    while more:
        more = False
        for base in bases:
            for name in reads & vars(base).keys() - {name for kind, name in found if kind is base}:
                functions = list(_functions(vars(base)[name]))
                found[base, name] = b"".join(_does(f, {}) for f in functions)
                for function in functions:
                    reads = reads | _attributes(function.__code__, "LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR")
                    sets |= _attributes(function.__code__, "STORE_ATTR")
                more = True
    for base, name in found:
        if not callable(vars(base)[name]) and name not in sets and isinstance(vars(base)[name], (*_PLAIN, *_FIXED)):
            found[base, name] += _constant(vars(base)[name], {})
    lines = sorted(f"{base.__qualname__}.{name}=".encode() + does for (base, name), does in found.items() if does)
    return b";".join(lines)


def function_text(value: Any) -> bytes | None:
    """Return what a function of its user's does, and the constants that it reads; None for anything else."""
    functions = list(_functions(value))
    return b"".join(_does(f, {}) for f in functions) if functions else None


def _does(function: types.FunctionType, seen: dict[int, Any]) -> bytes:
    return _text(function.__code__) + _held(function, seen)


def _functions(value: Any) -> Iterator[types.FunctionType]:
    """Yield the functions of their user's behind what a class or module holds: decorated ones, and decorators."""
    todo, seen = [value], set()
    while todo:
        x = todo.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        todo += [getattr(x, part) for part, kinds in _WRAPPERS.items() if isinstance(x, kinds)]
        todo += [x.__wrapped__] if _is_wrapped(x) else []
        if inspect.isfunction(x):
            todo += [cell.cell_contents for cell in x.__closure__ or () if cell != types.CellType()]
            if not _is_installed(x):
                yield x


def _is_wrapped(x: Any) -> bool:
    return "__wrapped__" in getattr(x, "__dict__", ())  # asking for it may be an error, as torch.classes has it


def _attributes(code: types.CodeType, *kinds: str) -> set[str]:
    """Return the names of attributes that a function reads, or sets."""
    return {str(i.argval) for i in instructions(code) if i.opname in kinds}


def _is_installed(function: types.FunctionType) -> bool:
    return _INSTALLED.search(function.__code__.co_filename) is not None


def is_of_a_library(kind: type | types.ModuleType) -> bool:
    """Return whether a class or module is installed, or of Python itself, not its user's."""
    module = kind if isinstance(kind, types.ModuleType) else sys.modules.get(kind.__module__)
    if module is None:  # as of a class that was made in a console
        return False
    root = sys.modules.get(module.__name__.partition(".")[0], module)  # torch.ops, say, has no file
    paths = [getattr(x, "__file__", None) for x in (root, module)]
    return module.__name__ in sys.builtin_module_names or any(_INSTALLED.search(path) for path in paths if path)


@functools.lru_cache(4096)  # a model is asked for its code by each call
def _steps(code: types.CodeType) -> tuple[dis.Instruction, ...]:
    return tuple(dis.get_instructions(code))


@functools.lru_cache(4096)
def _text(code: types.CodeType) -> bytes:
    """Return what a function does, instruction by instruction."""
    parts: list[bytes] = []
    for i in _steps(code):
        value: Any = i.argval
        if isinstance(value, types.CodeType):
            found = _text(value)
        elif isinstance(value, frozenset):  # whose order differs from process to process
            found = repr(sorted(value, key=repr)).encode()
        else:
            found = repr(value).encode()
        parts.append(i.opname.encode() + b" " + found)
    return b"\n".join(parts)


@functools.lru_cache(4096)
def written_by(code: types.CodeType) -> frozenset[str]:
    """Return the names of containers that a function writes to, or may: what these hold is no constant."""
    found: set[str | None] = set()
    steps = _steps(code)
    for at, i in enumerate(steps):
        if i.opname in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            found.add(_pushed(steps[:at], 1))
        elif i.opname in ("LOAD_ATTR", "LOAD_METHOD") and i.argval in _MUTATING:
            found.add(_pushed(steps[:at], 0))
    any_of_them = {*code.co_names, *code.co_freevars} if None in found else set()
    inner = (written_by(part) for part in code.co_consts if isinstance(part, types.CodeType))
    return frozenset(name for name in found if name is not None).union(any_of_them, *inner)


def _pushed(steps: Sequence[dis.Instruction], above: int) -> str | None:
    """Return the name of what lies beneath so many values on the stack, or of what it is a part of; None if unclear."""
    for i in reversed(steps):
        if i.is_jump_target or i.opname in ("COPY", "SWAP", "ROT_THREE", "DUP_TOP_TWO"):
            return None
        if above > 0:
            above -= dis.stack_effect(i.opcode, i.arg, jump=False)
        elif i.opname.startswith("BINARY_"):
            above = 1  # a part: of the first of two
        elif i.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            return str(i.argval) if i.opname.startswith("LOAD_") else None
    return None


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


def _held(loss_fn: Any, seen: dict[int, Any]) -> bytes:
    """Return the constants that a loss binds, in bytes. ``seen``: functions that were asked, as one may hold itself."""
    if id(loss_fn) in seen:
        return b""
    seen[id(loss_fn)] = loss_fn  # each is asked once: what calls what is no tree
    if isinstance(loss_fn, functools.partial):
        return _constants((loss_fn.args, loss_fn.keywords), seen) + _held(loss_fn.func, seen)
    chain = [loss_fn]
    while inspect.isroutine(chain[-1]) and hasattr(chain[-1], "__wrapped__"):  # decorators
        chain.append(chain[-1].__wrapped__)
    parts = [_constants((_bound(x),), seen) for x in chain if inspect.isfunction(x) or x is loss_fn]
    return b";".join(part for part in parts if part)


def _bound(loss_fn: Any) -> Mapping[str, Any]:
    """Return what a function or an object binds by name, but for what the function itself binds anew, as a count."""
    if not inspect.isfunction(loss_fn):
        owner = getattr(loss_fn, "__self__", loss_fn)
        called = getattr(loss_fn, "__func__", None) or getattr(type(loss_fn), "__call__", None)  # noqa: B004
        counts, writes = _counts(type(owner))
        held = {name: x for name, x in _held_by(owner).items() if name not in counts}
        mine = {name: x for name, x in held.items() if not (writes and isinstance(x, _CONTAINERS))}
        return mine | (_globals(called) if inspect.isfunction(called) else {})
    code = loss_fn.__code__
    counts = {i.argval for i in _steps(code) if i.opname == "STORE_DEREF"}
    cells = zip(code.co_freevars, loss_fn.__closure__ or (), strict=True)
    found = {name: cell for name, cell in cells if name not in counts}
    held = {name: _read_of(cell.cell_contents, code) for name, cell in found.items() if cell != types.CellType()}
    defaults = {f"default {i}": x for i, x in enumerate(loss_fn.__defaults__ or ())} | (loss_fn.__kwdefaults__ or {})
    bound = _globals(loss_fn) | held | defaults
    written = written_by(code)
    return {k: x for k, x in bound.items() if k not in written or not isinstance(x, _CONTAINERS)}


def _held_by(value: Any) -> dict[str, Any]:
    """Return the attributes of an object, those in slots too."""
    slots = [vars(base).get("__slots__", ()) for base in type(value).__mro__]
    names = sorted({name for each in slots for name in ([each] if isinstance(each, str) else each) if name[:2] != "__"})
    return {name: getattr(value, name) for name in names if hasattr(value, name)} | getattr(value, "__dict__", {})


def _counts(kind: type) -> tuple[set[str], bool]:
    """Return the attributes that an object of its user's class sets, once it is made, and whether it writes to others.

    What these hold is no constant.
    """
    own = [vars(base) for base in kind.__mro__ if not is_of_a_library(base)]
    later = [x for members in own for name, x in members.items() if name not in _MAKING]
    codes = [f.__code__ for x in later for f in _functions(x)]
    return {name for code in codes for name in _attributes(code, "STORE_ATTR")}, any(map(written_by, codes))


def _globals(function: types.FunctionType) -> dict[str, Any]:
    """Return what a function of its user's reads by global names, but for what it binds anew."""
    if _is_installed(function):
        return {}
    names, counts = set(), set()
    for i in instructions(function.__code__):
        if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            names.add(i.argval)
        elif i.opname == "STORE_GLOBAL":
            counts.add(i.argval)
    known = {name: function.__globals__[name] for name in sorted(names - counts) if name in function.__globals__}
    return {name: _read_of(value, function.__code__) for name, value in known.items()}


def _read_of(value: Any, code: types.CodeType) -> Any:
    """Return of a module of its user's, or of an object of its user's class, what a function reads of it."""
    module = isinstance(value, types.ModuleType)
    about: Any = value if module else type(value)
    plain = inspect.isroutine(value) or isinstance(value, type | nn.Module | enum.Enum)
    if not module and (plain or is_of_a_library(about)):
        return value
    own = {} if is_of_a_library(about) else _held_by(value)
    names = _attributes(code, "LOAD_ATTR", "LOAD_METHOD") - _attributes(code, "STORE_ATTR")
    read = {part: own[part] for part in sorted(names & own.keys())}
    if module:
        return read
    return about, read or {part: x for part, x in own.items() if part not in _counts(about)[0]}  # handed on as a whole


def instructions(code: types.CodeType) -> Iterator[dis.Instruction]:
    """Yield what a function does, and the functions in it."""
    yield from _steps(code)
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from instructions(part)


def _constants(values: Iterable[Any], seen: dict[int, Any]) -> bytes:
    """Return the constants in values, in bytes: nothing for what has none, such as a model, or what is installed."""
    return b";".join(part for value in values if (part := _constant(value, seen)))


def _constant(value: Any, seen: dict[int, Any]) -> bytes:
    value = plain_container(value)
    if isinstance(value, list | dict | type):
        if id(value) in seen:
            return b""
        seen[id(value)] = value  # held, so that its id is no other's
    if isinstance(value, Tensor):
        known = value.layout == torch.strided and not (value.is_meta or value.is_nested or value.is_conj())
        small = known and value.numel() * value.element_size() <= _LARGEST_HELD  # weights of classes, not data
        return f"{tuple(value.shape)} {value.dtype}".encode() + (bytes(tensor_bytes(value)) if small else b"")
    if isinstance(value, np.ndarray):
        small = value.nbytes <= _LARGEST_HELD and not value.dtype.hasobject
        return f"{value.shape} {value.dtype}".encode() + (value.tobytes() if small else b"")
    if isinstance(value, tuple):
        return _constants(value, seen)
    if isinstance(value, (*_PLAIN, *_FIXED, *_VALUES)):
        return repr(value).encode()
    if isinstance(value, set | frozenset):  # in any order
        known = len(value) <= _MOST_NUMBERS and all(isinstance(member, (*_PLAIN, *_FIXED)) for member in value)
        return repr(sorted(map(repr, value))).encode() if known else b""
    if isinstance(value, list):
        return _constants(value, seen) if len(value) <= _MOST_NUMBERS else b""
    if isinstance(value, dict):
        named = {str(key): key for key in value if isinstance(key, (*_PLAIN, *_FIXED))}
        parts = [(key.encode(), _constants((value[named[key]],), seen)) for key in sorted(named)]
        return b"".join(key + b"=" + part for key, part in parts if part)
    if isinstance(value, nn.Module):  # a criterion; a model that is trained is known by its weights
        mine = {name: x for name, x in vars(value).items() if isinstance(x, _PLAIN)} | dict(value.named_buffers())
        parameters = dict(value.named_parameters())
        size = sum(p.numel() * p.element_size() for p in parameters.values())
        if size > _LARGEST_HELD or any(p.requires_grad for p in parameters.values()):
            return b""
        return type(value).__name__.encode() + _constant(mine | parameters, seen)
    if isinstance(value, functools.partial):
        return _constants((value.func, value.args, value.keywords), seen)
    if isinstance(value, torch.jit.ScriptFunction):
        return str(value.code).encode()
    if isinstance(value, enum.EnumMeta):
        members: Mapping[str, Any] = value.__members__
        return repr([(name, member.value) for name, member in members.items()]).encode()
    if isinstance(value, type):  # of its user's: an autograd Function, say; modules are known by `functions_of`
        own = {} if is_of_a_library(value) or issubclass(value, nn.Module) else vars(value)
        codes = [f.__code__ for x in own.values() for f in _functions(x)]
        counts = set[str]().union(*(_attributes(code, "STORE_ATTR") for code in codes))
        names = sorted(name for name in own if name not in (*_OF_CLASSES, *counts))
        held = {name: own[name] for name in names if isinstance(own[name], (Tensor, np.ndarray, *_CONTAINERS))}
        return b"".join(_functions_in(own[name], seen) for name in names) + _constant(held, seen)
    if inspect.isbuiltin(value) and isinstance(value.__self__, Tensor | np.ndarray):
        return _constant(value.__self__, seen)
    return _functions_in(value, seen) + (_held(value, seen) if inspect.ismethod(value) else b"")


def plain_container(value: Any) -> Any:
    """Return a container of the standard library, or a namespace, as a list or dict; anything else as it is."""
    if isinstance(value, collections.deque | collections.UserList):
        return list(value)
    if isinstance(value, argparse.Namespace | types.SimpleNamespace):
        return vars(value)
    return dict(value) if isinstance(value, _MAPPINGS) else value


def _functions_in(value: Any, seen: dict[int, Any]) -> bytes:
    """Return what the functions of their user's behind a value do; of a member of a class, its constants too."""
    if isinstance(value, (*_PLAIN, *_FIXED)):
        return _constant(value, seen)
    known = _is_wrapped(value) or inspect.isfunction(value) or isinstance(value, staticmethod | classmethod | property)
    functions = [f for f in _functions(value) if id(f) not in seen] if known else []
    return b"".join(_does(f, seen) for f in functions)
