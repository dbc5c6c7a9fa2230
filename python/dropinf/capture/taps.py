"""Taps on outputs: what takes the gradient of one output of a forward when backward comes to it."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

MARK = "_dropinf_of"  # an attribute of tensors: what they depend on, where parameters are followed outside of modules
Signature = tuple[Any, ...]  # of a call: module, dimensions, how its output's leading dimension goes with the samples
# What the capture of a module may raise where it is not what its class says.
FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError)
Take = Callable[[Tensor], None]


class _Tap(torch.autograd.Function):
    """An output, with ``call`` on its gradient. ``source`` is the output itself, or the anchor where the output needs
    no gradient: backward then reaches the layer and goes no further.

    A tensor hook would be lost where a view is modified in place afterwards (a ReLU behind a Linear on [N, T, d]).
    """

    @staticmethod
    def forward(ctx: Any, source: Tensor, box: list[Tensor], call: Take) -> Tensor:
        ctx.call, ctx.is_anchor = call, source is not box[0]
        # .data: no view of the source, or modifying it in place would fail.
        return box[0].data

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        ctx.call(g)
        return g.new_zeros(()) if ctx.is_anchor else g, None, None


def reason(error: Exception) -> str:
    """Return what to say of an error in the capture of a module."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


def inserted(out: Tensor, anchor: Tensor, call: Take) -> Tensor:
    """Return an output with a node of its own behind it, which hands its gradient to ``call``."""
    tapped: Tensor = _Tap.apply(out if out.requires_grad else anchor, [out], call)
    return tapped


def listen(node: Node, output: int, call: Take) -> None:
    """Have ``call`` take the gradient of one output of a node. A node of its own for that would cost twice as much."""

    def hook(gradients: tuple[Tensor | None, ...]) -> None:
        g = gradients[output]
        if g is not None:
            call(g)

    node.register_prehook(hook)


def signature_of(name: str, x: Tensor, out: Tensor, n: int) -> Signature:
    """Return what tells one call of a module from others: dimensions, dtype, how it goes with ``n`` samples."""
    size = out.shape[0] if out.ndim else 1
    goes = "one" if size == 1 and n > 1 else "samples" if size == n else "multiple" if size % n == 0 else "other"
    return name, x.ndim, out.ndim, str(out.dtype), goes, n == 1


def per_sample(x: Tensor, n: int, *, one: bool) -> Tensor:
    """Return a tensor that all samples share as one (unmaterialised) copy per sample."""
    return x.expand(n, *x.shape[1:]) if one else x.unsqueeze(0).expand(n, *x.shape)


def modes() -> int:
    """Return how many modes functions and ops of torch run in."""
    return int(torch._C._len_torch_function_stack() + torch._C._len_torch_dispatch_stack())


def own_modes() -> bool:
    """Return whether functions and ops of torch run in a mode of its user's."""
    found = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    return any(type(mode).__module__.split(".")[0] != "torch" for mode in found)


def unforeseen(begun_in: int) -> str | None:
    """Return why a forward, begun in so many modes, is to be audited for where it runs, or None: no look shows this."""
    if modes() > begun_in:
        return "it runs in a mode of its own"
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None and not all(map(is_of_torch, hooks)):
        return "what it saves for backward is packed"
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "it runs in a transform of torch.func"
    return None


def in_checkpoint() -> bool:
    """Return whether what runs is computed again in backward, by a checkpoint that is not reentrant."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def overrides(kind: type) -> bool:
    """Return whether a class, not of torch's, says itself what functions of torch do with its tensors."""
    own = getattr(kind, "__torch_function__", None)
    usual = (vars(Tensor)["__torch_function__"].__func__, torch._C._disabled_torch_function_impl)
    return getattr(own, "__func__", own) not in usual and kind.__module__.split(".")[0] not in ("torch", "torchvision")


def is_of(function: Any, package: str, end: str = "") -> bool:
    """Return whether a function of Python is a package's own, and all that it wraps, whatever names they have.

    ``end``: of the name of its file.
    """
    folder, wraps = os.path.dirname(getattr(sys.modules.get(package), "__file__", None) or ""), False
    while function is not None:
        if wraps and isinstance(function, BuiltinFunctionType | MethodDescriptorType):  # as of Tensor.__pow__
            return True
        wraps, code = True, getattr(function, "__code__", None)
        if code is None or not _is_in(code.co_filename, folder) or not code.co_filename.endswith(end):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


@functools.lru_cache(4096)
def _is_in(file: str, folder: str) -> bool:
    return Path(file).is_relative_to(folder)


def is_of_torch(function: Any) -> bool:
    """Return whether a function is torch's own."""
    return isinstance(function, BuiltinFunctionType) or is_of(function, "torch")


def replaced() -> str | None:
    """Return which of the functions that layers call is not torch's own, or None."""
    if _REPLACED_BEFORE is not None:
        return _REPLACED_BEFORE
    for function, place, name in _CALLED:
        if getattr(place, name) is not function:
            return name
    return None


def of_a_user(node: Any) -> bool:
    """Return whether a node of autograd is of a Function of its user's."""
    if not isinstance(node, BackwardCFunction):
        return False
    made_by: Any = getattr(type(node), "_forward_cls")  # noqa: B009  autograd's own, of no stub
    return bool(made_by is not _Tap and not made_by.__module__.startswith("torch."))


_CALLED = [
    (getattr(place, name), place, name)
    for place, names in (
        (F, "linear conv1d conv2d conv3d pad embedding layer_norm rms_norm group_norm batch_norm"),
        (torch, "layer_norm group_norm batch_norm embedding addmm rms_norm"),
    )
    for name in names.split()
]
_REPLACED_BEFORE = next((name for function, _, name in _CALLED if not is_of_torch(function)), None)


def any_true(flags: Iterable[Tensor]) -> bool:
    """Return whether one of some truth values, on any devices, is true; wait for each device once."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for flag in flags:
        by_device.setdefault(flag.device, []).append(flag)
    return any(bool(torch.stack(found).any()) for found in by_device.values())
