"""Hooks that take per-sample gradients as they are formed.

The forward hook keeps only the compressed input; a hook on the output's gradient compresses that and multiplies.
Weights need no gradient, and none is computed.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .modules import Use
from .passes import Call, Pass, tap
from .taps import MARK, Signature, of_a_user, per_sample, signature_of


class Capture:
    """Hooks on the tracked modules of one model. They do nothing outside :meth:`running`."""

    def __init__(self, model: nn.Module, uses: Mapping[str, Use]) -> None:
        self.model, self.uses = model, dict(uses)
        self.names = {id(x): i for i, x in enumerate((*model.parameters(), *model.buffers()))}  # numbers
        self.active: Counter[nn.Module] = Counter()
        self.own = 0  # how many of them are norms of a class of their own
        self._unwatched: set[str] = set()  # such norms that were called without a graph, as a checkpoint calls them
        self.shared: set[Signature] = set()  # calls whose output has no sample dimension
        self.changed: dict[int, tuple[nn.Parameter, Tensor]] = {}  # weights that a forward changes, as they were
        self._handles: dict[str, tuple[RemovableHandle, ...]] = {}
        self._pass: Pass | None = None
        self._thread = threading.get_ident()
        self.hides = False

    def __deepcopy__(self, _memo: Any) -> Capture:
        return self  # of a model that is copied while it is hooked: its hooks do nothing for the copy

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Hook the modules inside."""
        try:
            self._attach()
            yield
        finally:
            self._detach(self.uses)
            self._pass = None
            with torch.no_grad():
                for parameter, before in self.changed.values():
                    parameter.copy_(before)

    @contextlib.contextmanager
    def removed(self) -> Iterator[None]:
        """Have no hook on the modules inside, as the user has them."""
        self._detach(self.uses)
        try:
            yield
        finally:
            self._attach()

    def refresh(self) -> None:
        """Take the hooks off modules of which nothing is captured."""
        self._detach([name for name, use in self.uses.items() if not use.plans])

    def _attach(self) -> None:
        for name, use in self.uses.items():
            if use.plans:
                # First of all hooks: what a user's hook makes of the output comes after the layer.
                leave = partial(self._leave, use)
                self._handles[name] = (
                    use.module.register_forward_pre_hook(partial(self._enter, use)),
                    use.module.register_forward_hook(leave, with_kwargs=True, always_call=True, prepend=True),
                )

    def _detach(self, names: Iterable[str]) -> None:
        for name in list(names):
            for handle in self._handles.pop(name, ()):
                handle.remove()

    @contextlib.contextmanager
    def running(self, current: Pass, *, hides: bool = False) -> Iterator[None]:
        """Have the hooks feed ``current`` inside. ``hides``: forwards use what is tracked without a graph to it."""
        self.hides = hides
        for use in self.uses.values():
            use.refresh()
        self.begin(current)
        try:
            yield
        finally:
            self._pass = None
            for use in self.uses.values():
                use.unhide()

    def begin(self, current: Pass) -> None:
        """Have the hooks feed ``current`` from now on."""
        self.active.clear()
        self.own = 0
        self._unwatched.clear()
        for use in self.uses.values():
            use.doubts.clear()
        self._pass = current

    def _enter(self, use: Use, module: nn.Module, _: Any) -> None:
        # A backward of ours runs checkpoints in threads of autograd.
        if self._thread != threading.get_ident() and not (self._pass is not None and self._pass.running):
            raise RuntimeError(
                "model: a Compressor is using it in another thread, and would take this thread's batch for its own; "
                "wait for that call, or give each thread its own copy.deepcopy(model)"
            )
        if module is not use.module:
            return
        if self.hides and self._pass is not None and not self.active[module]:
            use.hide()
        self.active[module] += 1
        self.own += use.is_summed
        if use.is_summed and not torch.is_grad_enabled():
            self._unwatched.add(use.name)
        if next(reversed(module._forward_pre_hooks)) != self._handles[use.name][0].id and self._pass is not None:
            self._pass.failed[use.name] = "a hook stands behind what captures its input"

    def _leave(
        self, use: Use, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor | None
    ) -> Tensor | None:
        if module is not use.module:
            return None
        self.active[module] -= 1
        self.own -= use.is_summed
        if not self.active[module]:
            use.unhide()
        current = self._pass
        if out is None or current is None or not torch.is_grad_enabled():
            return None  # no output where the module raised an error
        if use.weight is None and use.bias is None:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        if not self._is_first(use):
            current.failed[use.name] = "a hook stands before what captures its output"
            return None
        if not isinstance(x, Tensor) or not isinstance(out, Tensor):
            current.failed[use.name] = f"it maps {type(x).__name__} to {type(out).__name__}, not a tensor to a tensor"
            return None
        with torch._C.DisableTorchFunction():  # the guard watches the model, not us
            again = current.running and use.name in self._unwatched
            if use.is_summed and (again or (of_a_user(out.grad_fn) and _is_of_more(out, x))):
                current.unforeseen = current.unforeseen or "a norm of its own does what nobody sees"
            return self._tap(use, current, x, out)

    def _is_first(self, use: Use) -> bool:
        """Return whether the hook on a module's output stands before all others."""
        first = next(iter(use.module._forward_hooks), None)
        return first == self._handles[use.name][1].id and not nn.modules.module._global_forward_hooks

    def _tap(self, use: Use, current: Pass, x: Tensor, out: Tensor) -> Tensor | None:
        """Have the output's gradient compressed in backward. Return what takes the output's place, if anything."""
        n = current.samples.n
        signature = signature_of(use.name, x, out, n)
        saved = current.save(use, x.detach(), out.detach())
        version = None if saved is None or saved.is_inference() else saved._version
        shared = signature in self.shared and n > 1
        if shared:
            saved = saved if saved is None else per_sample(saved, n, one=out.shape[0] == 1)
            out = per_sample(out, n, one=out.shape[0] == 1)
        mark = getattr(out, MARK, None)
        if mark is None and not x.requires_grad and not hasattr(x, MARK):
            mark = use.name  # where ops are followed: its input is of no sample
        tapped = tap(current, Call(current, use, saved, version, signature), out, new=shared or out is x)
        if mark is not None:
            setattr(tapped, MARK, mark)
        return None if tapped is out and not shared else tapped


def _is_of_more(out: Tensor, x: Tensor) -> bool:
    """Return whether the node of an output takes the results of others than the input's and those of leaves."""
    assert out.grad_fn is not None
    nodes = [node for node, _ in out.grad_fn.next_functions if node is not None and node is not x.grad_fn]
    return any(node.name() != "struct torch::autograd::AccumulateGrad" for node in nodes)
