"""Declare a torch op from its plain-PyTorch body: schema, fake, registration and route to the kernels follow from it.

A call of a declared op runs, in eager mode, the launcher of its kernels where `device.runs_triton` says so and
its plain body elsewhere; under torch.compile it is one node, the registered op. A registered op costs 6 to 60
microseconds a call more than its body, so eager calls go past it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor

from .device import runs_triton

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)
L = TypeVar("L", bound=Callable[..., Any])

# What an annotation is in a schema. Sizes of a layer are plain integers there: they are never symbolic.
_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "torch.dtype": "ScalarType",
    "torch.dtype | None": "ScalarType?",
    "int": "SymInt",
    "Sequence[int]": "int[]",
    "tuple[Tensor, Tensor]": "(Tensor, Tensor)",
    "None": "()",
}
_FIXED = ("group", "groups", "padding_idx", "bits")


class Op(Protocol[P, R_co]):
    """A declared op: a function, with the bodies that it chooses from."""

    __name__: str

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...

    @property
    def plain(self) -> Callable[P, R_co]:
        """Return the body in plain PyTorch."""

    @property
    def triton(self) -> Callable[P, R_co]:
        """Return the body that launches the kernels, on whatever device."""

    @property
    def fake(self) -> Callable[..., R_co]:
        """Return the body that allocates the outputs and computes nothing."""


@contextlib.contextmanager
def _without_autocast(device: str) -> Iterator[None]:
    available = torch.amp.is_autocast_available(device)
    with torch.no_grad(), torch.autocast(device, enabled=False) if available else contextlib.nullcontext():
        yield


def no_autograd(fn: Callable[P, R]) -> Callable[P, R]:
    """Run `fn` without autograd, and without the autocast of its first tensor's device."""

    @functools.wraps(fn)
    def unrecorded(*args: P.args, **kwargs: P.kwargs) -> R:
        # Leaving either costs ten times what asking for it does.
        autocast = torch._C._is_any_autocast_enabled()
        if not autocast and not torch.is_grad_enabled():
            return fn(*args, **kwargs)
        tensors = [v for v in chain(args, kwargs.values()) if isinstance(v, Tensor)]
        if not autocast and not any(v.requires_grad for v in tensors):
            return fn(*args, **kwargs)
        with _without_autocast(tensors[0].device.type) if autocast else torch.no_grad():
            return fn(*args, **kwargs)

    return unrecorded


# Launchers by the name of their op; importing them takes long, as they import triton.
_launchers: dict[str, Callable[..., Any]] = {}
_import_launchers: Callable[[], object] | None = None


def import_launchers_with(load: Callable[[], object]) -> None:
    """Have `load` called before the first launch; it imports what `launches` decorates."""
    global _import_launchers
    _import_launchers = load


def launches(declared: Op[..., Any], int8: Op[..., Any] | None = None) -> Callable[[L], L]:
    """Make a function the launcher of an op: its `triton` calls it, with the arguments of the op.

    With `int8`, the launcher serves that op too: it is called with `quantize=True` for it, and returns
    (out, scale), with scale None unless it quantizes.
    """

    def decorate(launcher: L) -> L:
        if int8 is None:
            _launchers[declared.__name__] = launcher
            return launcher

        @functools.wraps(launcher)
        def values(*args: Any, **kwargs: Any) -> Any:
            return launcher(*args, **kwargs)[0]

        @functools.wraps(launcher)
        def values_and_scale(*args: Any, **kwargs: Any) -> Any:
            return launcher(*args, **kwargs, quantize=True)

        _launchers[declared.__name__], _launchers[int8.__name__] = values, values_and_scale
        return launcher

    return decorate


def launcher_of(declared: Op[P, R]) -> Callable[P, R]:
    """Return the launcher of an op."""
    if declared.__name__ not in _launchers and _import_launchers is not None:
        _import_launchers()
    return _launchers[declared.__name__]


def op(
    fake: Callable[[types.SimpleNamespace], object], writes: str | None = None
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Declare the op `torch.ops.dropinf.<name>` from its body in plain PyTorch, and return what users call.

    `fake` allocates the outputs from the op's arguments, bound to their names with defaults filled in.
    `writes` names the argument that the op writes.
    """

    def declare(body: Callable[P, R]) -> Op[P, R]:
        plain = no_autograd(body)

        @functools.wraps(body)
        def triton(*args: P.args, **kwargs: P.kwargs) -> R:
            return launcher_of(public)(*args, **kwargs)

        @functools.wraps(body)
        def eager(*args: P.args, **kwargs: P.kwargs) -> R:
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            if tensors and runs_triton(tensors):
                if not torch.is_grad_enabled():  # entering no_grad costs more than the question
                    return triton(*args, **kwargs)
                with torch.no_grad():
                    return triton(*args, **kwargs)
            return plain(*args, **kwargs)

        allocate = _bound(fake, body)
        registered = _register(body, eager, allocate, writes)

        @functools.wraps(body)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if not torch.compiler.is_compiling():
                return eager(*args, **kwargs)
            with torch.no_grad():
                return cast(R, registered(*args, **kwargs))

        vars(call).update(plain=plain, triton=triton, fake=allocate)
        public = cast("Op[P, R]", call)
        return public

    return declare


def _bound(fake: Callable[[types.SimpleNamespace], object], body: Callable[..., Any]) -> Callable[..., Any]:
    """Return `fake` as a function of the arguments of `body`."""

    def allocate(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(body).bind(*args, **kwargs)
        bound.apply_defaults()
        return fake(types.SimpleNamespace(**bound.arguments))

    return allocate


def _register(body: Callable[..., Any], eager: Callable[..., Any], fake: Callable[..., Any], writes: str | None) -> Any:
    name = body.__name__
    mutates = () if writes is None else (writes,)
    schema = _schema(body, writes)
    torch.library.custom_op(f"dropinf::{name}", eager, mutates_args=mutates, schema=schema).register_fake(fake)
    return getattr(torch.ops.dropinf, name)


def _schema(body: Callable[..., Any], writes: str | None) -> str:
    signature = inspect.signature(body)
    arguments = (_argument(p, p.name == writes) for p in signature.parameters.values())
    return f"({', '.join(arguments)}) -> {_TYPES[signature.return_annotation]}"


def _argument(parameter: inspect.Parameter, written: bool) -> str:
    name, default = parameter.name, parameter.default
    kind = "int" if name in _FIXED else _TYPES[parameter.annotation]
    if written:
        kind = kind.replace("Tensor", "Tensor(a!)")
    if default is parameter.empty:
        return f"{kind} {name}"
    return f"{kind} {name}={str(default).removeprefix('torch.')}"
