"""A model that runs several times from one state, and afterwards is bit for bit what it was."""

from __future__ import annotations

import contextlib
import operator
import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from . import sharded
from .eager import eager
from .held import LARGEST_BUFFER, Held, is_same

_MODULE_ATTRIBUTES = set(nn.Module().__dict__)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class RandomState:
    """Where the random generators of torch, Python and NumPy stand."""

    def __init__(self, devices: Iterable[int]) -> None:
        self._torch, self._cuda = torch.get_rng_state(), {d: torch.cuda.get_rng_state(d) for d in devices}
        self._python, self._numpy = random.getstate(), np.random.get_state()  # noqa: NPY002

    def restore(self) -> None:
        """Put the generators back."""
        torch.set_rng_state(self._torch)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002

    def moved(self) -> bool:
        """Return whether a random number was drawn since."""
        now: Any = np.random.get_state()  # noqa: NPY002
        before: Any = self._numpy
        same = torch.equal(self._torch, torch.get_rng_state()) and self._python == random.getstate()
        same &= all(torch.equal(state, torch.cuda.get_rng_state(d)) for d, state in self._cuda.items())
        return not same or before[2] != now[2] or not np.array_equal(before[1], now[1])


class Attributes:
    """What the modules of a model hold beside parameters: a cache of something computed from a weight, say.

    ``devices``: the GPUs that the parameters are on.
    """

    def __init__(self, model: nn.Module) -> None:
        training = any(m.training for m in model.modules())
        # In eval mode few models write to their buffers: copies of large ones would not be worth their memory.
        # Of a call, which asks for them in each batch.
        self.parameters = list(model.parameters())
        self.is_sharded = any(map(sharded.is_sharded, self.parameters))
        # Listed once: PEFT's attention makes its frozen weights anew as its modules are listed.
        self._names, modules = zip(*model.named_modules(), strict=True)
        self._modules = [(m.__dict__, dict(m.__dict__)) for m in modules]
        members = (part for m in modules for part in (m._modules, m._parameters))
        self._members = [(part, dict(part)) for part in members if isinstance(part, dict)]  # not in a script
        own = _MODULE_ATTRIBUTES - {"_buffers"} - (set() if self.is_sharded else {"_parameters"})
        self._values = [x for _, attributes in self._modules for name, x in attributes.items() if name not in own]
        hooks = (getattr(m, name, {}) for m in model.modules() for name in _HOOKS)  # which may be objects
        self._values += [hook for each in hooks for hook in each.values()]
        self._mine = {id(x) for x in (*self.parameters, *model.modules())}
        self._compares = training  # what buffers hold, as nothing counts how often they are written to
        self.pending: Start | None = None  # of a batch that is not done: to be put back where it fails
        self._take()
        self.devices = sorted({p.device.index or 0 for p in self.parameters if p.device.type == "cuda"})

    def _take(self) -> None:
        """Take what the model holds as it is now."""
        self._held = Held(self._values, set(self._mine), hidden=True)
        self.held = self._held.tensors
        real = [b for b in self.held if b.layout == torch.strided and not (b.is_meta or b.is_nested)]
        kept = [b for b in real if self._compares or b.numel() * b.element_size() <= LARGEST_BUFFER]
        self._buffers = kept
        small = {id(b) for b in kept}
        self._large = [b for b in real if id(b) not in small]

    def refresh(self) -> None:
        """Take what containers hold as it is now, where their user changed it since it was put back."""
        if self._held.moved():
            self._take()

    def distrust(self) -> None:
        """Compare buffers from now on: something may write to them without a trace."""
        self._compares = True

    def versions(self) -> list[tuple[nn.Parameter, int]]:
        """Return each parameter, and how often something wrote to it."""
        return [] if self.is_sharded else [(parameter, _version(parameter)) for parameter in self.parameters]

    def sums(self) -> list[str]:
        """Return a number of each parameter that changes with what it holds, however that was written."""
        return [] if self.is_sharded else [str(float(p.detach().double().sum())) for p in self.parameters]

    def large(self) -> list[tuple[Tensor, int]]:
        """Return each tensor that is too large to be put back, and how often something wrote to it."""
        return [(b, _version(b)) for b in self._large]

    def buffers(self) -> list[tuple[Tensor, Tensor, int]]:
        """Return each buffer, a copy of what it holds, and its version; -1 where what it holds is to be compared.

        No earlier copy will do: what its user writes through ``.data`` counts nowhere.
        """
        copies = [torch.empty_like(buffer, requires_grad=False) for buffer in self._buffers]
        with torch.no_grad():
            if copies:
                torch._foreach_copy_(copies, self._buffers)  # one launch on a GPU
        versions = [-1 if self._compares else _version(buffer) for buffer in self._buffers]
        return list(zip(self._buffers, copies, versions, strict=True))

    def check_untouched(self) -> None:
        """Raise ValueError where attributes were set between batches, which all start from the same ones."""
        for name, (now, before) in zip(self._names, self._modules, strict=True):
            if now.keys() != before.keys() or not all(map(operator.is_, now.values(), before.values())):
                changed = [n for n in now.keys() | before.keys() if now.get(n) is not before.get(n)]
                raise ValueError(
                    f"model: {min(changed)!r} of {name or 'itself'} was set between two batches of a call, which begin "
                    "alike; set it before the call, and make a call for each setting"
                )

        if any(not is_same(now, before) and not _made_anew(now, before) for now, before in self._members):
            raise ValueError(
                "model: a module or parameter of it was replaced between two batches of a call; make a new Compressor "
                "for each model"
            )

    def restore(self) -> set[str]:
        """Put the attributes, and what containers and objects hold, back. Return the modules and parameters that were
        made since, which are taken out again."""
        made = {name for now, before in self._members for name in now.keys() - before.keys()}
        for now, before in self._members if made else ():
            for name in now.keys() - before.keys():
                del now[name]
        for now, before in self._modules:
            if now.keys() != before.keys() or not all(map(operator.is_, now.values(), before.values())):
                now.clear()
                now.update(before)
        self._held.refill()
        return made


def _made_anew(now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Return whether members are those of before, but for frozen parameters that are others of the same memory."""

    def same(a: Any, b: Any) -> bool:
        frozen = all(isinstance(x, nn.Parameter) and not x.requires_grad for x in (a, b))
        return a is b or (frozen and a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.dtype == b.dtype)

    return now.keys() == before.keys() and all(same(now[name], before[name]) for name in now)


def _version(x: Tensor) -> int:
    """Return how often something wrote to a tensor; -1 where nothing counts."""
    return -1 if x.is_inference() else x._version


class Start:
    """The state that a forward of a batch starts from: random generators, attributes, buffers that change, and the
    tensors of the batch, which are put back if they were ``copied``.

    ``changed``: weights that a forward renormalises, and what they were.
    """

    def __init__(
        self,
        attributes: Attributes,
        batch: Any = (),
        *,
        copied: bool = False,
        changed: Mapping[int, tuple[nn.Parameter, Tensor]] | None = None,
    ) -> None:
        self._attributes, self._changed = attributes, {} if changed is None else changed
        self._buffers = attributes.buffers()
        self._given = Held([batch], set(), hidden=False)
        self._batch = [(x, _version(x), x.detach().clone() if copied else None) for x in self._given.tensors]
        self._parameters, self._large = attributes.versions(), attributes.large()
        self.was_written = False  # the batch was, and put back
        leaves = [x for x in (*self._given.tensors, *attributes.held) if x.requires_grad and x.is_leaf]
        self._grads = [(x, x.grad, None if x.grad is None else x.grad.detach().clone()) for x in leaves]
        self._sums: list[str] | None = None  # of the parameters, where something may write to them without a trace
        self.random = RandomState(attributes.devices)

    def check_parameters(self, model: nn.Module, but: Collection[int]) -> None:
        """Raise ValueError where a forward wrote to a parameter; nothing puts that back. ``but``: ids that may."""
        for parameter, version in self._parameters:
            if _version(parameter) != version and id(parameter) not in but:
                name = next((n for n, p in model.named_parameters() if p is parameter), "one")
                raise ValueError(
                    f"model: its forward writes to its parameter {name}, and every run of a batch would again, of "
                    "which there are several; take that out of the forward (an average of weights, say), or hold it "
                    "in a buffer, which is put back"
                )

    def distrust(self) -> None:
        """Compare all buffers with what they were: something may have written to them without a trace."""
        self._buffers = [(buffer, before, -1) for buffer, before, _ in self._buffers]
        self._attributes.distrust()
        self._sums = self._attributes.sums()

    def restore(self) -> None:
        """Put all of it back. Raises ValueError where something wrote to what is too large for that."""
        for x, version in self._large:
            if _version(x) != version:
                raise ValueError(
                    f"model: its forward writes to a tensor that it holds, of shape {list(x.shape)} and "
                    f"{x.numel() * x.element_size() >> 20} MiB, and every run of a batch would again, of which there "
                    f"are several; in eval mode those up to {LARGEST_BUFFER >> 20} MiB are put back, in train mode "
                    "(model.train()) all: have a smaller one, or write to a copy"
                )
        if self._sums is not None and self._sums != self._attributes.sums():
            raise ValueError(
                "model: its forward writes to a parameter through .data, and every run of a batch would again, of "
                "which there are several; take that out of the forward (an average of weights, say)"
            )
        self.random.restore()
        made = self._attributes.restore()
        if made:
            raise ValueError(
                f"model: its forward makes {min(made)!r}, a module or parameter, where it is not there yet, and would "
                "make another in every run of a batch; call the model once before, and make the Compressor then"
            )
        self._given.refill()
        torch.clear_autocast_cache()  # which would outlive what its user writes to weights
        with torch.no_grad():
            for leaf, grad, held in self._grads:
                leaf.grad = grad
                if grad is not None and held is not None:
                    grad.copy_(held)
            for weight, before in self._changed.values():
                weight.copy_(before)
            for buffer, before, version in self._buffers:
                if (version < 0 or buffer._version != version) and not torch.equal(buffer, before):
                    buffer.copy_(before)
            self._batch = [self._put_back(*given) for given in self._batch]
        self._parameters = self._attributes.versions()  # which our own runs may have counted up

    def _put_back(self, x: Tensor, version: int, before: Tensor | None) -> tuple[Tensor, int, Tensor | None]:
        if _version(x) == version:
            return x, version, before
        if before is None:
            raise ValueError(
                "loss_fn: it writes to the batch, which it did not with the first batch, so that another run of it "
                "finds other data; have it write to a copy (x = x * 2 in place of x.mul_(2), or batch.clone())"
            )
        self.was_written = True
        if x.grad_fn is not None and not x._is_view():
            x.detach_()  # what wrote to it had a gradient
        x.copy_(before)
        return x, _version(x), before


class Flags:
    """The ``requires_grad`` of a model's parameters, which may run frozen or as its user has them."""

    def __init__(self, model: nn.Module) -> None:
        self._flags = [(p, p.requires_grad) for p in model.parameters()]
        self.given = {id(p): flag for p, flag in self._flags}

    def freeze(self) -> None:
        """Have no parameter require a gradient."""
        for parameter, _ in self._flags:
            parameter.requires_grad_(False)

    def restore(self) -> None:
        """Put the flags back."""
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Have no parameter require a gradient inside, and afterwards the flags of now."""
        self._flags = [(p, p.requires_grad) for p, _ in self._flags]
        self.given = {id(p): flag for p, flag in self._flags}
        self.freeze()
        try:
            yield
        finally:
            self.restore()

    @contextlib.contextmanager
    def own(self, tracked: Iterable[Tensor]) -> Iterator[None]:
        """Have the user's flags inside, and a gradient for what is tracked; frozen afterwards."""
        self.restore()
        with self.only(tracked):
            yield

    @contextlib.contextmanager
    def only(self, tracked: Iterable[Tensor]) -> Iterator[None]:
        """Have a gradient for what is given inside; frozen afterwards."""
        for parameter in tracked:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            self.freeze()


@contextlib.contextmanager
def gradients_taken(parameters: Iterable[Any], take: Mapping[Tensor, Callable[[Tensor], None]]) -> Iterator[None]:
    """Hand each parameter's gradient to its ``take`` as soon as autograd has it, and drop it.

    It is taken behind the parameter's own hooks, and before those on its accumulation, which are no part of it. The
    parameters' ``.grad`` and their hooks on finished gradients (an optimizer's step, say) are put back.
    """

    seen: dict[Tensor, Tensor] = {}  # also what autograd.grad returns, as of a loss that differentiates

    def accumulated(parameter: Tensor) -> None:
        g, parameter.grad = parameter.grad, None
        g = seen.pop(parameter, g)  # FSDP2 calls this for a gradient that no hook saw
        if g is not None and parameter in take:
            take[parameter](g)

    kept = [(p, p.grad, p._post_accumulate_grad_hooks) for p in parameters]
    handles = []
    for parameter, *_ in kept:
        parameter.grad = None
        parameter._post_accumulate_grad_hooks = OrderedDict()
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(accumulated)
            if parameter in take:
                handles.append(parameter.register_hook(partial(seen.__setitem__, parameter)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, g, hooks in kept:
            parameter._post_accumulate_grad_hooks.clear()  # autograd would keep calling them
            parameter.grad, parameter._post_accumulate_grad_hooks = g, hooks


_in_use: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_lock = threading.Lock()


@contextlib.contextmanager
def claimed(model: nn.Module) -> Iterator[None]:
    """Have the model for this thread alone inside. Raises RuntimeError where another Compressor is using it."""
    with _lock:
        if model in _in_use:
            where = "this thread" if _in_use[model] == threading.get_ident() else "another thread"
            raise RuntimeError(
                f"model: another Compressor is using it in {where}, and hooks of the one would see the batches of the "
                "other; finish that call first, or give each its own copy.deepcopy(model)"
            )
        _in_use[model] = threading.get_ident()
    try:
        yield
    finally:
        with _lock:
            _in_use.pop(model, None)  # a recording that is never ended may outlive its model


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[tuple[Flags, Attributes]]:
    """Put buffers, attributes and random state back afterwards."""
    with claimed(model):
        sharded.initialise(model)
        sharded.reshard(model)
        flags, attributes = Flags(model), Attributes(model)
        random = RandomState(attributes.devices)
        fast_path = torch.backends.mha.get_fastpath_enabled()
        with eager():
            try:
                # The fused inference path of nn.TransformerEncoderLayer would call none of its modules.
                torch.backends.mha.set_fastpath_enabled(False)
                yield flags, attributes
                attributes.refresh()  # what its user changed since the last batch, stays
            except BaseException:
                sharded.reset(model)
                raise
            finally:
                sharded.reshard(model)
                torch.backends.mha.set_fastpath_enabled(fast_path)
                try:
                    if attributes.pending is not None:  # other buffers are as their user left them
                        attributes.pending.restore()
                finally:
                    attributes.restore()
                    random.restore()
                    torch.clear_autocast_cache()


def renormalised(model: nn.Module) -> dict[int, tuple[nn.Parameter, Tensor]]:
    """Return the weights that their own modules' forwards shorten, by id, and what they hold."""
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.max_norm]
    return {id(w): (w, w.detach().clone()) for w in tables if isinstance(w, nn.Parameter)}
