"""Parameters that are used outside their module's forward, captured at the op.

Ops of parameters alone (a slice of a table, 1 + w, a weight that is computed) run as they are. Where such a tensor
meets data, the op's output is tapped: its gradient gives the tensor's whole per-sample gradients, by a product or, for
any other op, by the op's own backward mapped over samples; those go on to the parameters in one mapped backward.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .direct import LOOKUPS, MATMULS, PRODUCTS, SUMS
from .layer import Layer
from .op_calls import (
    BROADCASTS,
    DATA,
    DERIVED,
    OpCall,
    OpUse,
    has_functions,
    is_rows,
    leaves_of,
    mark_data,
    replaced,
    tensors_of,
)
from .passes import Pass, tap
from .taps import MARK, in_checkpoint, signature_of

_SEQUENCES = (list, tuple)  # not list | tuple: isinstance would make the union anew each time
_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")  # its arguments that may have no name
# What adds in place -> the op that gives the gradient of what is added.
_ADDS = {Tensor.add_: torch.add, Tensor.sub_: torch.sub}
_EXPANDS = BROADCASTS | {Tensor.repeat, torch.tile, Tensor.tile}


class Outside:
    """The ops of one forward. ``raw``: id of a parameter -> its layer; ``constant``: captures guessed wrong before."""

    def __init__(self, current: Pass, raw: Mapping[int, Layer], constant: Collection[str]) -> None:
        self.current, self.raw, self.constant = current, raw, constant
        self.outputs: dict[str, list[Tensor]] | None = None  # by name, where they are asked for
        self.unfit: set[str] = set()  # layers that are used in a way that no op here covers

    def __call__(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Sequence[Tensor]) -> Any:
        """Run a torch function of the model; ``tensors``: those among its arguments."""
        derived: list[Tensor] = []
        data: list[Tensor] = []
        fixed: list[str] = []  # modules
        for t in tensors:
            kind: Any = DERIVED if id(t) in self.raw else getattr(t, MARK, 0) or self._unseen(t)
            if kind == DERIVED:
                derived.append(t)
            elif kind == DATA:
                data.append(t)
            elif kind:
                fixed.append(kind)
        if not derived:
            result = function(*args, **kwargs)
            return _marked(result, DATA if data else fixed[0]) if data or fixed else result
        self.current.failed |= dict.fromkeys(fixed, "its output is of no sample, and an op makes a weight of it")
        # An expert picked by a number is of parameters alone, whatever the number depends on.
        picked = function is Tensor.__getitem__ and not any(t.ndim for t in data)
        if data and not picked:
            return self._meeting(function, args, kwargs, derived)
        result = function(*args, **kwargs)
        if isinstance(result, Tensor) and result.requires_grad and self._copies(function, tensors, derived[0], result):
            tapped = self._tapped(result, function, args, kwargs, derived, guessed=True)
            if tapped is not result:
                return tapped
        return _marked(result, DERIVED)

    def _unseen(self, x: Tensor) -> int:
        """Return what a tensor depends on that an autograd Function made, which no mode sees."""
        if not x.requires_grad or x.is_leaf:
            return 0
        kind = DERIVED if all(id(p) in self.raw for p in leaves_of(x)) else DATA
        setattr(x, MARK, kind)
        return kind

    def _copies(self, function: Any, tensors: Sequence[Tensor], x: Tensor, result: Tensor) -> bool:
        """Return whether an op of parameters alone seems to make a copy, or look up rows, for each sample."""
        n, rows = self.current.samples.n, result.shape[0] if result.ndim else 1
        if n == 1 or rows == 1 or rows % n:
            return False
        if function in LOOKUPS:
            return any(t.ndim and len(t) == rows for t in tensors if t is not x)
        if function in _EXPANDS and rows == n * (x.shape[0] if x.ndim else 1):
            return True
        elementwise = function in _EXPANDS or function in SUMS or function in PRODUCTS
        return elementwise and (x.ndim < result.ndim or x.shape[0] == 1)

    def _meeting(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], derived: list[Tensor]) -> Any:
        """Run an op of data and of what is derived from parameters, and tap its output."""
        if not torch.is_grad_enabled():
            return _marked(function(*args, **kwargs), DATA)
        if _is_samples_last(function, args, kwargs, derived):
            turned = args[0].mT  # w x^T, whose columns are samples, as (x w^T)^T
            x = args[1] if function is F.linear else args[1].mT
            mark_data(x)
            return _marked(self._meeting(torch.matmul, (x, turned), {}, [turned]).mT, DATA)
        if function is F.scaled_dot_product_attention:
            given = dict(zip(_ATTENTION, args, strict=False)) | dict(kwargs)
            if any(t is given.get("attn_mask") for t in derived):
                return self._attention(given, derived)
        name = getattr(function, "__name__", "")
        in_place = name.startswith(("__setitem__", "__i")) or (name.endswith("_") and not name.endswith("__"))
        written = _written(function, args, kwargs, derived) if in_place else None
        result = self._run(function, args, kwargs, derived)
        if written is not None and args[0].grad_fn is not None:
            self._tapped(args[0], *written, {}, derived)
            return result
        if in_place or "out" in kwargs or not isinstance(result, Tensor) or result.is_complex():
            self.unfit |= {layer.name for t in derived for layer in self.layers_of(t)}
            return _marked(result, DATA)
        if not result.is_floating_point():
            return _marked(result, DATA)
        return self._tapped(result, function, args, kwargs, derived)

    def _attention(self, given: dict[str, Any], derived: list[Tensor]) -> Any:
        """Run attention whose mask is computed from parameters on a copy for each sample, whose gradient it forms."""
        query, mask = given["query"], given["attn_mask"]
        lead = torch.broadcast_shapes(query.shape[:-2], given["key"].shape[:-2])
        nothing = query.new_zeros(*lead, 1, 1, dtype=mask.dtype)
        mark_data(nothing)
        given["attn_mask"] = self._meeting(torch.add, (nothing, mask), {}, [mask])
        others = [t for t in derived if t is not mask]
        if others:
            return self._meeting(F.scaled_dot_product_attention, (), given, others)
        return _marked(F.scaled_dot_product_attention(**given), DATA)

    def _run(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], derived: list[Tensor]) -> Any:
        """Run an op on what is derived from parameters, without a graph to them."""
        ids = {id(t) for t in derived}
        plain = replaced((tuple(args), dict(kwargs)), lambda t: t.detach() if id(t) in ids else t)
        return function(*plain[0], **plain[1])

    def _tapped(
        self,
        result: Tensor,
        function: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        derived: list[Tensor],
        *,
        guessed: bool = False,
    ) -> Tensor:
        layers = {layer.name: layer for t in derived for layer in self.layers_of(t)}
        if not layers:
            return result
        if in_checkpoint():  # which computes it again where nobody follows it
            self.unfit |= layers.keys()
        for t in derived:
            if id(t) not in self.raw and has_functions(t):
                self.current.chains.append(t)  # whose backward may be no linear function
        name = f"{'+'.join(sorted(layers))}@{getattr(function, '__name__', 'op')}"
        if guessed and name in self.constant:
            return result
        return self._tap(OpUse(name, layers, self.raw, guessed=guessed), result, function, args, kwargs, derived)

    def _tap(
        self,
        use: OpUse,
        result: Tensor,
        function: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        derived: list[Tensor],
    ) -> Tensor:
        n, name = self.current.samples.n, use.name
        result = result.detach() if use.guessed else result
        *known, goes, single = signature_of(name, result, result, n)
        given = [*tensors_of(args), *tensors_of(kwargs.values())] if result.ndim else []
        of_rows = "".join("01"[is_rows(t, result.ndim, len(result), n)] for t in given)
        signature = (*known, goes + of_rows, single)
        call = OpCall(self.current, use, None, None, signature, function, tuple(args), dict(kwargs), derived)
        if self.outputs is not None:
            self.outputs.setdefault(name, []).append(result.detach().clone())
        tapped = tap(self.current, call, result)
        mark_data(tapped)
        return tapped

    def layers_of(self, x: Tensor) -> list[Layer]:
        """Return the layers that a tensor is derived from."""
        if id(x) in self.raw:
            return [self.raw[id(x)]]
        return [self.raw[id(p)] for p in leaves_of(x) if id(p) in self.raw]


def _is_samples_last(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], derived: Sequence[Tensor]) -> bool:
    """Return whether an op multiplies a matrix of weights by one of data that may have its samples in columns."""
    if kwargs or len(args) != 2 or not (function in MATMULS or function is F.linear):
        return False
    w, x = args
    return w.ndim == x.ndim == 2 and any(t is w for t in derived) and not any(t is x for t in derived)


def _written(
    function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], derived: Sequence[Tensor]
) -> tuple[Any, tuple[Any, ...]] | None:
    """Return the op, with its arguments, that gives a parameter what an op does that adds it to data, or writes it
    there, in place; None for other ops.

    What was there is no argument: it is gone. Nor is a view written to: its base's history changes.
    """
    target, value = args[0], args[-1]
    if kwargs or len(derived) != 1 or value is not derived[0] or target is value or target._is_view():
        return None
    if function in _ADDS and len(args) == 2:
        return _ADDS[function], (None, value)
    lead = target.ndim - value.ndim
    if function is not Tensor.__setitem__ or lead < 1 or target.shape[lead:] != value.shape:
        return None
    places = args[1] if isinstance(args[1], tuple) else (args[1],)
    if sum(_dims_of(place, lead) for place in places) > lead:
        return None
    there = torch.zeros(target.shape[:lead], dtype=torch.bool, device=target.device)
    there[args[1]] = True
    return torch.where, (there.reshape(*there.shape, *[1] * value.ndim), value, None)


def _dims_of(place: Any, most: int) -> int:
    """Return how many dimensions an index is of, which picks no place twice; more than ``most`` for any other."""
    if isinstance(place, Tensor):
        return place.ndim if place.dtype == torch.bool and place.ndim else most + 1
    return 1 if isinstance(place, int | slice) and not isinstance(place, bool) else most + 1


def _marked(result: Any, kind: int | str) -> Any:
    """Return a result, its tensors marked; of parameters alone only where they have a gradient."""
    if isinstance(result, _SEQUENCES):
        for item in result:
            _marked(item, kind)
    elif (
        isinstance(result, Tensor)
        and not isinstance(result, nn.Parameter)
        and (kind != DERIVED or result.requires_grad)
    ):
        setattr(result, MARK, kind)
    return result
