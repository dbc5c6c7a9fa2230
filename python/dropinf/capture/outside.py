"""Parameters that are used outside their module's forward, captured at the op.

Ops of parameters alone (a slice of a table, 1 + w, a weight that is computed) run as they are. Where such a tensor
meets data, the op's output is tapped: its gradient gives the tensor's whole per-sample gradients, by a product or, for
any other op, by the op's own backward mapped over samples; those go on to the parameters in one mapped backward.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .direct import LOOKUPS, MATMULS, PRODUCTS, SUMS, direct
from .hooks import Call, Pass, tap
from .layer import Layer
from .modules import Use
from .recorders import Recorder
from .samples import Grid, Samples, Untied
from .taps import MARK, signature_of

# Whole gradients of one op that exist at once.
CHUNK_BYTES = 1 << 26
_SEQUENCES = (list, tuple)  # not list | tuple: isinstance would make the union anew each time
_DATA, _DERIVED = 1, 2  # what a tensor depends on: the batch, or tracked parameters alone
_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")  # its arguments that may have no name
_BROADCASTS = {Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to}
_EXPANDS = _BROADCASTS | {Tensor.repeat, torch.tile, Tensor.tile}


def mark_data(x: Tensor) -> None:
    """Say of a tensor that it depends on the batch."""
    setattr(x, MARK, _DATA)


def unmark(x: Tensor) -> None:
    """Forget what a tensor depends on."""
    if hasattr(x, MARK):
        delattr(x, MARK)


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
        for t in tensors:
            kind = _DERIVED if id(t) in self.raw else getattr(t, MARK, 0) or self._unseen(t)
            if kind:
                (derived if kind == _DERIVED else data).append(t)
        if not derived:
            result = function(*args, **kwargs)
            return _marked(result, _DATA) if data else result
        # An expert picked by a number is of parameters alone, whatever the number depends on.
        picked = function is Tensor.__getitem__ and not any(t.ndim for t in data)
        if data and not picked:
            return self._meeting(function, args, kwargs, derived)
        result = function(*args, **kwargs)
        if isinstance(result, Tensor) and result.requires_grad and self._copies(function, tensors, derived[0], result):
            tapped = self._tapped(result, function, args, kwargs, derived, guessed=True)
            if tapped is not result:
                return tapped
        return _marked(result, _DERIVED)

    def _unseen(self, x: Tensor) -> int:
        """Return what a tensor depends on that an autograd Function made, which no mode sees."""
        if not x.requires_grad or x.is_leaf:
            return 0
        kind = _DERIVED if all(id(p) in self.raw for p in _leaves(x)) else _DATA
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
            return _marked(function(*args, **kwargs), _DATA)
        if _is_samples_last(function, args, kwargs, derived):
            turned = args[0].mT  # w x^T, whose columns are samples, as (x w^T)^T
            x = args[1] if function is F.linear else args[1].mT
            mark_data(x)
            return _marked(self._meeting(torch.matmul, (x, turned), {}, [turned]).mT, _DATA)
        if function is F.scaled_dot_product_attention:
            given = dict(zip(_ATTENTION, args, strict=False)) | dict(kwargs)
            if any(t is given.get("attn_mask") for t in derived):
                return self._attention(given, derived)
        name = getattr(function, "__name__", "")
        in_place = name.startswith(("__setitem__", "__i")) or (name.endswith("_") and not name.endswith("__"))
        result = self._run(function, args, kwargs, derived)
        if in_place or "out" in kwargs or not isinstance(result, Tensor) or result.is_complex():
            self.unfit |= {layer.name for t in derived for layer in self.layers_of(t)}
            return _marked(result, _DATA)
        if not result.is_floating_point():
            return _marked(result, _DATA)
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
        return _marked(F.scaled_dot_product_attention(**given), _DATA)

    def _run(self, function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], derived: list[Tensor]) -> Any:
        """Run an op on what is derived from parameters, without a graph to them."""
        ids = {id(t) for t in derived}
        plain = _replaced((tuple(args), dict(kwargs)), lambda t: t.detach() if id(t) in ids else t)
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
        name = f"{'+'.join(sorted(layers))}@{getattr(function, '__name__', 'op')}"
        if guessed and name in self.constant:
            return result
        return self._tap(OpUse(name, layers, self, guessed=guessed), result, function, args, kwargs, derived)

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
        of_rows = "".join("01"[_is_rows(t, len(result), n)] for t in _tensors(args)) if result.ndim else ""
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
        return [self.raw[id(p)] for p in _leaves(x) if id(p) in self.raw]


def _is_samples_last(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], derived: Sequence[Tensor]) -> bool:
    """Return whether an op multiplies a matrix of weights by one of data that may have its samples in columns."""
    if kwargs or len(args) != 2 or not (function in MATMULS or function is F.linear):
        return False
    w, x = args
    return w.ndim == x.ndim == 2 and any(t is w for t in derived) and not any(t is x for t in derived)


def _leaves(x: Tensor) -> list[Tensor]:
    """Return the leaves of a tensor's graph."""
    found, seen, todo = [], set(), [x.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.append(variable)
        todo += [next_node for next_node, _ in node.next_functions]
    return found


class OpUse(Use):
    """The capture of parameters at one op."""

    def __init__(self, name: str, layers: Mapping[str, Layer], outside: Outside, *, guessed: bool) -> None:
        super().__init__(name, nn.Module(), None, None)
        self.layers, self.outside, self.guessed = dict(layers), outside, guessed

    @property
    def plans(self) -> list[Layer]:
        return list(self.layers.values())

    def rows(self, g: Tensor) -> Tensor:
        return g if g.ndim > 1 else g.reshape(-1, 1)

    def scaled(self, g: Tensor, factor: Tensor) -> Tensor:
        return g * factor[..., None] if g.ndim > 1 else g * factor.view(g.shape)


@dataclass
class OpCall(Call):
    """One call of an op, with its arguments, until its output's gradient comes."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    derived: list[Tensor]

    def __post_init__(self) -> None:
        self.versions = [(t, t._version) for t in _tensors((self.args, tuple(self.kwargs.values())))]

    def record(self, into: Recorder, g: Tensor, samples: Samples) -> None:
        """Hand the per-sample gradients of each parameter to a recorder, sketched."""
        if any(t._version != version for t, version in self.versions):
            raise RuntimeError("an input of its op was modified in place afterwards; use an out-of-place operation")
        assert isinstance(self.use, OpUse)
        for d in {id(t): t for t in self.derived}.values():
            layer = self._source(d)
            c = None if layer is None else direct(self.function, self.args, self.kwargs, d, layer, g, samples)
            found = [(layer, c)] if layer is not None and c is not None else self._by_samples(d, g, samples)
            for of, rows in found:
                into.emit_part(of, rows)

    def _source(self, d: Tensor) -> Layer | None:
        """Return the layer whose parameter ``d`` is, or is a view of."""
        assert isinstance(self.use, OpUse)
        return self.use.outside.raw.get(id(d if d._base is None else d._base))

    def _by_samples(self, d: Tensor, g: Tensor, samples: Samples) -> list[tuple[Layer, Tensor]]:
        """Return each layer that ``d`` is derived from, with its gradients, formed whole for some samples at a time."""
        n = samples.n
        if samples.layout not in (None, Grid()) or samples.cu_seqlens is not None or not g.ndim or len(g) % n:
            raise Untied("its op does not have the samples in its leading dimension")
        parts = g.reshape(n, len(g) // n, *g.shape[1:])
        step = max(1, CHUNK_BYTES // max(1, d.numel() * 4))
        pieces: dict[str, list[Tensor]] = {}
        layers: dict[str, Layer] = {}
        for first in range(0, n, step):
            whole = self._whole(d, parts[first : first + step], first, n)
            for layer, rows in self._to_parameters(d, whole):
                layers[layer.name] = layer
                pieces.setdefault(layer.name, []).append(layer.compress_exact(rows))
        return [(layers[name], torch.cat(rows)) for name, rows in pieces.items()]

    def _to_parameters(self, d: Tensor, whole: Tensor) -> Iterator[tuple[Layer, Tensor]]:
        """Yield each layer that ``d`` is derived from, with its per-sample gradients."""
        assert isinstance(self.use, OpUse)
        raw = self.use.outside.raw
        if id(d) in raw:
            yield raw[id(d)], whole
            return
        parameters = [p for p in _leaves(d) if id(p) in raw]
        self.current.chaining = True
        try:
            with torch.enable_grad():
                found = torch.autograd.grad(
                    d, parameters, whole.to(d.dtype), retain_graph=True, allow_unused=True, is_grads_batched=True
                )
        finally:
            self.current.chaining = False
        for parameter, g in zip(parameters, found, strict=True):
            if g is not None:
                yield raw[id(parameter)], g.to(torch.promote_types(g.dtype, torch.float32))

    def _whole(self, d: Tensor, g: Tensor, first: int, n: int) -> Tensor:
        """Return the gradients [len(g), *d.shape] of samples from ``first`` on; g [samples, parts, *out.shape[1:]]."""
        wide = torch.promote_types(g.dtype, torch.float32)
        others = [t for t in _tensors(self.args) if t is not d]
        if self.function in SUMS and not self.kwargs and len(others) <= 1:
            sign = SUMS[self.function] if self.args and len(self.args) > 1 and self.args[1] is d else 1
            return _reduced(g.to(wide) * sign if sign != 1 else g.to(wide), d)
        if self.function in _BROADCASTS:
            return _reduced(g.to(wide), d)
        if self.function in PRODUCTS and len(others) == 1:
            other = others[0]
            same = other.ndim == g.ndim - 1 and other.shape[0] == n * g.shape[1]
            if same:
                other = other.detach().reshape(n, g.shape[1], *other.shape[1:])[first : first + len(g)]
                return _reduced(g.to(wide) * other, d)
        if self.function is F.linear and d.ndim == 2 and self.args[1] is d and self._is_plain_input(0, g, n):
            return self._outer(g, self._input(0, g, first, n), wide)
        if self.function in MATMULS and d.ndim == 2 and self.args[1] is d and self._is_plain_input(0, g, n):
            return self._outer(self._input(0, g, first, n), g, wide)
        return self._mapped(d, g, first, n)

    def _is_plain_input(self, place: int, g: Tensor, n: int) -> bool:
        x = self.args[place]
        return isinstance(x, Tensor) and x.ndim == g.ndim - 1 and x.shape[0] == n * g.shape[1] and g.ndim > 2

    def _input(self, place: int, g: Tensor, first: int, n: int) -> Tensor:
        x: Tensor = self.args[place].detach()
        return x.reshape(n, g.shape[1], *x.shape[1:])[first : first + len(g)]

    def _outer(self, rows: Tensor, columns: Tensor, wide: torch.dtype) -> Tensor:
        """Return sum_t rows_t columns_t^T of each sample; half-precision operands add up in float32."""
        a, b = rows.reshape(len(rows), -1, rows.shape[-1]), columns.reshape(len(columns), -1, columns.shape[-1])
        return torch.bmm(a.to(wide).mT, b.to(wide))

    def _mapped(self, d: Tensor, g: Tensor, first: int, n: int) -> Tensor:
        """Map the op's backward over samples, each with its own rows of every argument that has the batch's."""
        tensors = list(_tensors((self.args, tuple(self.kwargs.values()))))
        rows, derived = n * g.shape[1], {id(t) for t in self.derived}
        own = {id(t) for t in tensors if id(t) not in derived and _is_rows(t, rows, n)}
        moves = any(getattr(t, MARK, 0) == _DATA for t in tensors if id(t) not in derived)
        batched = [t.detach() for t in tensors if id(t) in own]
        places = [id(t) for t in tensors if id(t) in own]
        split = [t.reshape(n, t.shape[0] // n, *t.shape[1:])[first : first + len(g)] for t in batched]

        def one(values: list[Tensor], g_n: Tensor) -> Tensor:
            given = dict(zip(places, values, strict=True))

            def op(x: Tensor) -> Tensor:
                def swap(t: Tensor) -> Tensor:
                    return x if t is d else given[id(t)] if id(t) in given else t.detach()

                args, kwargs = _replaced((self.args, self.kwargs), swap)
                out: Tensor = self.function(*args, **kwargs)
                return out if places or moves else out[: g_n.shape[0]]

            back = torch.func.vjp(op, d.detach())[1]
            gradient: Tensor = back(g_n)[0]
            return gradient

        if not split:
            return torch.func.vmap(lambda g_n: one([], g_n))(_placed(g, first, n) if moves else g)
        return torch.func.vmap(one)(split, g)


def _placed(g: Tensor, first: int, n: int) -> Tensor:
    """Return gradients [len(g), n * parts, ...] of an op's whole output, where only a sample's own rows have any."""
    if g.numel() * n * g.element_size() > CHUNK_BYTES:
        raise Untied("its op does not have the samples in its leading dimension")
    placed = g.new_zeros(len(g), n, *g.shape[1:])
    placed[torch.arange(len(g), device="cpu"), torch.arange(first, first + len(g), device="cpu")] = g
    return placed.flatten(1, 2)


def _is_rows(t: Tensor, rows: int, n: int) -> bool:
    """Return whether an argument has a row for each of the output's, or data a row for each sample."""
    if not t.ndim:
        return False
    return t.shape[0] == rows or (t.shape[0] == n and getattr(t, MARK, 0) == _DATA)


def _reduced(g: Tensor, d: Tensor) -> Tensor:
    """Sum [samples, parts, *out.shape[1:]] to [samples, *d.shape], where d was broadcast against the output."""
    aligned = (1,) * (g.ndim - 1 - d.ndim) + tuple(d.shape)
    if aligned and aligned[0] != 1:
        raise Untied("its op has no sample dimension of its own")
    g = g.sum(1)
    gone = [i for i, size in enumerate(aligned[1:], 1) if size == 1 and g.shape[i] != 1]
    return (g.sum(gone, keepdim=True) if gone else g).reshape(len(g), *d.shape)


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested lists and tuples."""
    for v in values:
        if isinstance(v, Tensor):
            yield v
        elif isinstance(v, _SEQUENCES):
            yield from _tensors(v)


def _replaced(value: Any, swap: Callable[[Tensor], Tensor]) -> Any:
    """Return nested lists, tuples and dicts with their tensors replaced."""
    if isinstance(value, Tensor):
        return swap(value)
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(_replaced(v, swap) for v in value)
    if isinstance(value, dict):
        return {k: _replaced(v, swap) for k, v in value.items()}
    return value


def _marked(result: Any, kind: int) -> Any:
    """Return a result, its tensors marked; of parameters alone only where they have a gradient."""
    if isinstance(result, _SEQUENCES):
        for item in result:
            _marked(item, kind)
    elif (
        isinstance(result, Tensor) and not isinstance(result, nn.Parameter) and (kind == _DATA or result.requires_grad)
    ):
        setattr(result, MARK, kind)
    return result
