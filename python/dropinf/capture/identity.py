"""What a model is known by: gradients of two models that differ in it are not scored together."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..files import checksum
from ..loss_name import instructions
from ..origin import CODE
from ..workload import tensor_bytes
from .layer import clean_name
from .masks import HOOKS, LEFT_OUT, SETTINGS, code_of, fingerprint, line_of, setting_text

_LARGEST = 1 << 24  # bytes of a tensor in an attribute: larger ones are data
_COUNTS = (torch.int16, torch.int32, torch.int64)  # what buffers of these hold is a count, more often than not


def identity(model: nn.Module) -> str:
    """Return what a model is known by, as `Origin.model`."""
    weights, code = fingerprint(model, buffers=False), code_of(model)
    parts = weights, code["classes and constants"], code["functions"], _buffers(model), _attributes(model)
    return CODE.join(parts)


def _buffers(model: nn.Module) -> str:
    """Return a checksum of a model's persistent buffers, as running statistics and masks of weights; not of counts."""
    parts = []
    for prefix, module in model.named_modules():
        stored, _ = _used_by(type(module))
        for name, x in module.named_buffers(recurse=False):
            if x.dtype in _COUNTS or name in module._non_persistent_buffers_set or name in stored:
                continue
            parts.append(line_of(f"{prefix}.{name}", x))
    return checksum(b"\n".join(sorted(parts)))


def _attributes(model: nn.Module) -> str:
    """Return a checksum of what modules compute with beside parameters and buffers: settings, functions, small tensors,
    hooks. What their forward sets itself, as a count, is left out; of private names, what it does not read.
    """
    lines = []
    for prefix, module in model.named_modules():
        stored, read = _used_by(type(module))
        held = {}
        for name, value in vars(module).items():
            if name in LEFT_OUT or name in stored or (name[0] == "_" and name not in read):
                continue
            text = _text(value)
            if text is not None:
                held[name] = text
        hooked = (hook for kind in HOOKS for hook in vars(module)[kind].values())
        hooks = [getattr(hook, "__qualname__", type(hook).__name__) for hook in hooked if not _is_ours(hook)]
        lines.append(f"{clean_name(prefix)} {sorted(held.items())} {hooks}")
    return checksum("\n".join(lines).encode())


def _is_ours(hook: Any) -> bool:
    """Return whether a hook is there while gradients are captured."""
    return (getattr(getattr(hook, "func", hook), "__module__", None) or "").startswith(f"{__package__}.")


def _text(value: Any) -> str | None:
    if isinstance(value, SETTINGS):
        return repr(value)
    if isinstance(value, Tensor):
        small = value.numel() * value.element_size() <= _LARGEST and not (value.is_meta or value.is_nested)
        return f"{tuple(value.shape)} {value.dtype} {checksum(tensor_bytes(value))}" if small else None
    return setting_text(value)


_known: WeakKeyDictionary[type, tuple[frozenset[str], frozenset[str]]] = WeakKeyDictionary()


def _used_by(kind: type) -> tuple[frozenset[str], frozenset[str]]:
    """Return the attributes that a class's forward sets, and those that it reads, with the methods that it calls."""
    if kind not in _known:
        _known[kind] = _used_anew(kind)
    return _known[kind]


def _used_anew(kind: type) -> tuple[frozenset[str], frozenset[str]]:
    bases = [base for base in kind.__mro__ if base not in (nn.Module, object)]
    todo, seen = ["forward", "__call__"], set[str]()
    stored, read = set[str](), set[str]()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        for code in (code for base in bases if name in vars(base) for code in _codes(vars(base)[name])):
            for step in instructions(code):
                if step.opname == "STORE_ATTR":
                    stored.add(str(step.argval))
                elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
                    read.add(str(step.argval))
                    todo.append(str(step.argval))
    return frozenset(stored), frozenset(read)


def _codes(value: Any) -> Iterator[types.CodeType]:
    """Yield the code of a method, and of what it wraps."""
    for part in (value, getattr(value, "fget", None), getattr(value, "__func__", None)):
        while part is not None:
            if inspect.isfunction(part):
                yield part.__code__
            part = getattr(part, "__wrapped__", None)
