"""What a model is known by: gradients of two models that differ in it are not scored together."""

from __future__ import annotations

import dataclasses
import enum
import fractions
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from ..files import checksum
from ..loss_name import function_text, functions_of, instructions, plain_container, written_by
from ..origin import CODE
from ..workload import tensor_bytes
from .digests import digests
from .layer import clean_name
from .sharded import is_sharded

_SETTINGS = (bool, int, float, str, type(None))
_DEVICES = "cpu", "cuda"
_NAMES = (  # in a configuration
    "name_or_path", "transformers_version", "dtype", "torch_dtype", "model_type", "architectures", "use_cache",
)  # fmt: skip
_LEFT_OUT = "training", "gradient_checkpointing", *_NAMES  # settings that change no gradient, or compared elsewhere
_HOOKS = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"
_VALUES = (complex, enum.Enum, fractions.Fraction, np.generic, range, slice, torch.dtype, torch.device)
_MOST, _DEEPEST = 1 << 12, 8  # members of a container, and containers in each other: what has more is data
_LARGEST = 1 << 24  # bytes of a tensor in an attribute: larger ones are data
_COUNTS = (torch.int16, torch.int32, torch.int64)  # what buffers of these hold is a count, more often than not


def identity(model: nn.Module) -> str:
    """Return what a model is known by, as `Origin.model`."""
    weights = fingerprint(model, buffers=False)
    return CODE.join((weights, _constants(model), _functions(model), _buffers(model), _attributes(model)))


def fingerprint(model: nn.Module, *, buffers: bool = True) -> str:
    """Return a checksum of a model's parameters and persistent buffers; of shards, of their names and shapes alone.

    Without buffers it is that of what training changes: some models count their calls in buffers.
    """
    named = []
    for prefix, module in model.named_modules():
        kept = {n: b for n, b in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set}
        for name, x in (*module.named_parameters(recurse=False), *(kept.items() if buffers else ())):
            named.append((f"{prefix}.{name}", x))
    return _summed(named)


def check_weights(model: nn.Module, expected: str, folder: object) -> None:
    """Raise ValueError unless the model has the weights that an index was made with, by their fingerprint."""
    if fingerprint(model) != expected:
        raise ValueError(
            f"model: its weights are not those that {folder} was made with; pass the model of then, in the same dtype"
        )


def code_of(model: nn.Module) -> dict[str, str]:
    """Return checksums of a model's classes and constants (buffers that are not saved), of what the classes' functions
    do, and of its modules' settings.

    Settings are numbers and text in attributes, others functions, containers of settings, hooks and train mode; some
    may be counts that mean nothing to a gradient.
    """
    settings, others = [], []
    for prefix, module in model.named_modules():
        shown = {name: x for name, x in vars(module).items() if name[0] != "_" and name not in _LEFT_OUT}
        plain = {name: x for name, x in shown.items() if isinstance(x, _SETTINGS)}
        settings.append(f"{clean_name(prefix)} {sorted(plain.items())}")
        rest = _texts(vars(module), _setting, lambda name: name[0] == "_")
        others.append(f"{clean_name(prefix)} {module.training} {_hooks(module)} {rest}")
    cast = [device for device in _DEVICES if torch.is_autocast_enabled(device)]
    others += [f"autocast {device} {torch.get_autocast_dtype(device)}" for device in cast]
    return {
        "classes and constants": _constants(model),
        "attributes": checksum("\n".join(settings).encode()),
        "other attributes": checksum("\n".join(others).encode()),
        "functions": _functions(model),
    }


def _functions(model: nn.Module) -> str:
    return functions_of({type(module) for module in model.modules()})


def _constants(model: nn.Module) -> str:
    """Return a checksum of a model's classes, and of the buffers that are not saved, but those that forward sets: a
    table of angles that grows with the longest sequence, say."""
    lines = []
    for prefix, module in model.named_modules():
        stored = _used_by(type(module)).stored
        names = sorted(module._non_persistent_buffers_set - stored)
        kept = {name: module._buffers.get(name) for name in names}
        found = [f"{n} {checksum(tensor_bytes(x))}" for n, x in kept.items() if x is not None and not x.is_meta]
        lines.append(f"{clean_name(prefix)} {type(module).__qualname__} {found}")
    return checksum("\n".join(lines).encode())


def _buffers(model: nn.Module) -> str:
    """Return a checksum of a model's persistent buffers, as running statistics and masks of weights; not of counts."""
    named = []
    for prefix, module in model.named_modules():
        stored = _used_by(type(module)).stored
        for name, x in module.named_buffers(recurse=False):
            if x.dtype in _COUNTS or name in module._non_persistent_buffers_set or name in stored:
                continue
            named.append((f"{prefix}.{name}", x))
    return _summed(named)


def _attributes(model: nn.Module) -> str:
    """Return a checksum of what modules compute with beside parameters and buffers: settings, functions, small tensors,
    hooks. What their forward sets itself, as a count, is left out; of private names, what it does not read.
    """
    lines = []
    for prefix, module in model.named_modules():
        used = _used_by(type(module))
        left = {name for name in vars(module) if name in used.stored or (name[0] == "_" and name not in used.read)}
        left |= {name for name, value in vars(module).items() if _is_cache(name, value, used)}
        held = _texts(vars(module), _held, (left | set(_LEFT_OUT)).__contains__)
        lines.append(f"{clean_name(prefix)} {held} {_hooks(module)}")
    return checksum("\n".join(lines).encode())


def _is_cache(name: str, value: Any, used: _Used) -> bool:
    """Return whether a forward may write to a container, of which plain values alone are compared."""
    is_written = used.writes or name in used.written
    return is_written and isinstance(plain_container(value), dict | list) and _setting(value) is None


def _texts(
    values: dict[str, Any], text: Callable[[Any], str | None], is_left_out: Callable[[str], bool]
) -> list[tuple[str, str]]:
    found = ((name, text(value)) for name, value in values.items() if not is_left_out(name))
    return sorted((name, value) for name, value in found if value is not None)


def _hooks(module: nn.Module) -> list[str]:
    """Return the names of a module's hooks but those that are there while gradients are captured."""
    every = (hook for kind in _HOOKS for hook in vars(module)[kind].values())
    return [getattr(hook, "__qualname__", type(hook).__name__) for hook in every if not _is_ours(hook)]


def _is_ours(hook: Any) -> bool:
    return (getattr(getattr(hook, "func", hook), "__module__", None) or "").startswith(f"{__package__}.")


def _summed(named: Sequence[tuple[str, Tensor]]) -> str:
    """Return a checksum of parameters or buffers with their names; of shards, of all but their values."""
    held = [x for _, x in named if not (is_sharded(x) or x.is_meta)]
    found = {id(x): digest for x, digest in zip(held, digests(held), strict=True)}
    lines = [f"{clean_name(name)} {tuple(x.shape)} {x.dtype}{found.get(id(x), '')}".encode() for name, x in named]
    return checksum(b"\n".join(sorted(lines)))


def _held(value: Any, depth: int = 0) -> str | None:
    if isinstance(value, _SETTINGS):
        return repr(value)
    if isinstance(value, Tensor):
        small = value.numel() * value.element_size() <= _LARGEST and not (value.is_meta or value.is_nested)
        return f"{tuple(value.shape)} {value.dtype} {checksum(tensor_bytes(value))}" if small else None
    if isinstance(value, np.ndarray):
        known = value.nbytes <= _LARGEST and not value.dtype.hasobject
        return f"{value.shape} {value.dtype} {checksum(value.tobytes())}" if known else None
    if isinstance(value, _VALUES):
        return repr(value)
    found = _setting(value)
    return found if found is not None else _parts(value, depth)


def _parts(value: Any, depth: int) -> str | None:
    """Return what is known of the members of a container, or of a module that no module has; None if nothing is."""
    if isinstance(value, nn.Module):
        return f"{type(value).__qualname__} {fingerprint(value)}"
    value = plain_container(value)
    if depth == _DEEPEST or not isinstance(value, dict | list | tuple) or len(value) > _MOST:
        return None
    members = value.items() if isinstance(value, dict) else enumerate(value)
    found = [(repr(key), text) for key, x in members if (text := _held(x, depth + 1)) is not None]
    return repr(sorted(found)) if found else None


def _setting(value: Any) -> str | None:
    """Return a function, a configuration, or a container of plain values, as text; None for anything else, as for an
    empty cache."""
    if isinstance(value, functools.partial):
        return f"{_setting(value.func)} {value.args} {sorted(value.keywords.items())}"
    if inspect.isroutine(value):
        does = function_text(value)
        return f"{getattr(value, '__qualname__', '')} {checksum(does)}" if does else getattr(value, "__qualname__", "")
    if isinstance(value, SimpleNamespace) or dataclasses.is_dataclass(value) or hasattr(value, "to_diff_dict"):
        slots = dataclasses.fields(value) if not hasattr(value, "__dict__") else ()
        held = {f.name: getattr(value, f.name, None) for f in slots} | getattr(value, "__dict__", {})
        value = {n: x for n, x in held.items() if n[0] != "_" and n not in _NAMES and _is_plain(x)}
    if not isinstance(value, dict | list | tuple | set | frozenset) or not value or not _is_plain(value):
        return None
    return repr(sorted(value, key=repr) if isinstance(value, set | frozenset) else value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    return isinstance(value, _SETTINGS)


class _Used(NamedTuple):
    """The attributes that a class's forward sets, those that it reads, and names of containers that it writes to.

    With the methods that it calls.
    """

    stored: frozenset[str]
    read: frozenset[str]
    written: frozenset[str]
    writes: bool  # to some, by whatever name


_known: WeakKeyDictionary[type, _Used] = WeakKeyDictionary()


def _used_by(kind: type) -> _Used:
    if kind not in _known:
        _known[kind] = _used_anew(kind)
    return _known[kind]


def _used_anew(kind: type) -> _Used:
    bases = [base for base in kind.__mro__ if base not in (nn.Module, object)]
    todo, seen = ["forward", "__call__"], set[str]()
    stored, read, written, writes = set[str](), set[str](), set[str](), False
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for code in (code for base in bases if name in vars(base) for code in _codes(vars(base)[name])):
            names = written_by(code)
            written |= names
            writes = writes or not names.isdisjoint(code.co_varnames[:1])
            if "register_buffer" in code.co_names:
                stored |= {str(constant) for constant in code.co_consts if isinstance(constant, str)}
            for step in instructions(code):
                if step.opname == "STORE_ATTR":
                    stored.add(str(step.argval))
                elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
                    read.add(str(step.argval))
                    todo.append(str(step.argval))
    return _Used(frozenset(stored), frozenset(read), frozenset(written), writes)


def _codes(value: Any) -> Iterator[types.CodeType]:
    """Yield the code of a method, and of what it wraps."""
    for part in (value, getattr(value, "fget", None), getattr(value, "__func__", None)):
        while part is not None:
            if inspect.isfunction(part):
                yield part.__code__
            part = getattr(part, "__wrapped__", None)
