"""What to say of a layers= pattern that matches nothing."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import torch
from torch import nn


def no_match(pattern: str | type, modules: Sequence[tuple[str, nn.Module]], parameters: Iterable[str]) -> str:
    """Return the message, with the names that are nearest to the pattern."""
    known = ", ".join(name for name, _ in modules[1:6])
    hint = _type_hint(pattern, modules) if isinstance(pattern, type) else _name_hint(pattern, modules, parameters)
    return f"layers: {pattern!r} matches no module or parameter of this model{hint}; its modules are {known}, ..."


def _type_hint(wanted: type, modules: Sequence[tuple[str, nn.Module]]) -> str:
    for name, module in modules:
        if isinstance(module, torch.jit.ScriptModule) and getattr(module, "original_name", "") == wanted.__name__:
            return f"; {name!r} is one, scripted, and has no type any more: pick it by name"
    present = {type(module).__name__ for name, module in modules if name}
    near = difflib.get_close_matches(wanted.__name__, sorted(present), cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _name_hint(pattern: str, modules: Sequence[tuple[str, nn.Module]], parameters: Iterable[str]) -> str:
    for _, module in modules:
        if type(module).__name__ == pattern:
            return f"; to pick modules by their type, pass the type itself, {type(module).__module__}.{pattern}"
    names = [name for name, _ in modules if name]
    names = list(dict.fromkeys([*names, *parameters]))
    core = pattern.strip("*?.")
    near = [f"*{core}*"] if core and any(core in name for name in names) else nearest(core, names)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def nearest(wanted: str, names: Sequence[str]) -> list[str]:
    """Return up to three names that are like the one that is wanted, or whose last parts are."""
    depth = wanted.count(".") + 1
    ends: dict[str, str] = {}
    for name in names:
        ends.setdefault(".".join(name.split(".")[-depth:]), name)
    found = difflib.get_close_matches(wanted, list(ends), n=3, cutoff=0.7)
    return list(dict.fromkeys(ends[end] for end in found))
