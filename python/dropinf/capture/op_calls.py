"""One op that uses parameters outside their modules, and the gradients that it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .direct import MATMULS, PRODUCTS, SUMS, direct, is_plain_call
from .layer import Layer
from .modules import Use
from .passes import Call
from .recorders import Recorder
from .samples import Grid, Samples, Untied
from .taps import MARK, of_a_user

# Whole gradients of one op that exist at once.
CHUNK_BYTES = 1 << 26
_SEQUENCES = (list, tuple)  # not list | tuple: isinstance would make the union anew each time
# What a tensor depends on: the batch, tracked parameters alone, or (a hooked module's name) that module alone.
DATA, DERIVED = 1, 2
BROADCASTS = {Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to}


# Ops each row of whose output depends on that row of their arguments alone, but for parameters.
_BY_ROW = {
    F.layer_norm, F.rms_norm, F.group_norm, F.conv1d, F.conv2d, F.conv3d, F.scaled_dot_product_attention, torch.pow,
    Tensor.pow, torch.maximum, torch.minimum, F.prelu, torch.where, Tensor.where,
}  # fmt: skip
_REPEATS = {Tensor.repeat, torch.tile, Tensor.tile}


def mark_data(x: Tensor) -> None:
    """Say of a tensor that it depends on the batch."""
    setattr(x, MARK, DATA)


def unmark(x: Tensor) -> None:
    """Forget what a tensor depends on."""
    if hasattr(x, MARK):
        delattr(x, MARK)


def _nodes_of(x: Tensor) -> Iterator[Any]:
    """Yield the nodes of a tensor's graph."""
    seen, todo = set(), [x.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        todo += [next_node for next_node, _ in node.next_functions]


def leaves_of(x: Tensor) -> list[Tensor]:
    """Return the leaves of a tensor's graph."""
    found = (getattr(node, "variable", None) for node in _nodes_of(x))
    return [variable for variable in found if variable is not None]


def has_functions(x: Tensor) -> bool:
    """Return whether an autograd Function of its user's is in a tensor's graph."""
    return any(map(of_a_user, _nodes_of(x)))


class OpUse(Use):
    """The capture of parameters at one op."""

    def __init__(self, name: str, layers: Mapping[str, Layer], raw: Mapping[int, Layer], *, guessed: bool) -> None:
        super().__init__(name, nn.Module(), None, None)
        self.layers, self.raw, self.guessed = dict(layers), raw, guessed

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
        self.versions = [(t, t._version) for t in tensors_of((self.args, tuple(self.kwargs.values())))]

    def record(self, into: Recorder, g: Tensor, samples: Samples) -> None:
        """Hand the per-sample gradients of each parameter to a recorder, sketched."""
        if any(t._version != version for t, version in self.versions):
            raise RuntimeError("an input of its op was modified in place afterwards; use an out-of-place operation")
        assert isinstance(self.use, OpUse)
        samples = samples.bound(self.use.rows(g).shape[:-1])
        for d in {id(t): t for t in self.derived}.values():
            layer = self._source(d)
            c = None if layer is None else direct(self.function, self.args, self.kwargs, d, layer, g, samples)
            found = [(layer, c)] if layer is not None and c is not None else self._by_samples(d, g, samples)
            for of, rows in found:
                into.emit_part(of, rows)

    def _source(self, d: Tensor) -> Layer | None:
        """Return the layer whose parameter ``d`` is, or is a view of."""
        assert isinstance(self.use, OpUse)
        if d._base is None:
            return self.use.raw.get(id(d))
        return None if d._backward_hooks or has_functions(d) else self.use.raw.get(id(d._base))

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
        raw = self.use.raw
        if id(d) in raw:
            yield raw[id(d)], whole
            return
        parameters = [p for p in leaves_of(d) if id(p) in raw]
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
        others = [t for t in tensors_of(self.args) if t is not d]
        if self.function in SUMS and not self.kwargs and is_plain_call(self.function, self.args):
            sign = SUMS[self.function] if self.args[1] is d else 1
            return _reduced(g.to(wide) * sign if sign != 1 else g.to(wide), d)
        if self.function in BROADCASTS:
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

    def _is_sure(self, d: Tensor, others: list[Tensor], cut: bool, moves: bool, out: int, rows: int) -> bool:
        """Return whether an op whose output has ``rows`` of ``out`` dimensions takes each sample's from its own rows.

        What is as long as the batch by chance would be ``cut`` up too, and what nobody marked, as NumPy's, is taken for
        shared; what is not cut and ``moves`` runs as a whole.
        """
        if not cut:
            return moves or self.function in _REPEATS
        of_rows = all(isinstance(t, nn.Parameter) or (t.ndim == out and len(t) == rows) for t in others)
        by_row = self.function in _BY_ROW or self.function in PRODUCTS or self.function in SUMS
        return of_rows and (by_row or (self.function in MATMULS and out > 2 and d.ndim == 2))

    def _mapped(self, d: Tensor, g: Tensor, first: int, n: int) -> Tensor:
        """Map the op's backward over samples, each with its own rows of every argument that has the batch's."""
        tensors = list(tensors_of((self.args, tuple(self.kwargs.values()))))
        rows, derived = n * g.shape[1], {id(t) for t in self.derived}
        own = {id(t) for t in tensors if id(t) not in derived and is_rows(t, g.ndim - 1, rows, n)}
        moves = any(getattr(t, MARK, 0) == DATA for t in tensors if id(t) not in derived)
        others = [t for t in tensors if id(t) not in derived]
        if not self._is_sure(d, others, bool(own), moves, g.ndim - 1, rows):
            self.current.unforeseen = self.current.unforeseen or "an op takes samples together"
        batched = [t.detach() for t in tensors if id(t) in own]
        places = [id(t) for t in tensors if id(t) in own]
        split = [t.reshape(n, t.shape[0] // n, *t.shape[1:])[first : first + len(g)] for t in batched]

        def one(values: list[Tensor], g_n: Tensor) -> Tensor:
            given = dict(zip(places, values, strict=True))

            def op(x: Tensor) -> Tensor:
                def swap(t: Tensor) -> Tensor:
                    return x if t is d else given[id(t)] if id(t) in given else t.detach()

                args, kwargs = replaced((self.args, self.kwargs), swap)
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


def is_rows(t: Tensor, out: int, rows: int, n: int) -> bool:
    """Return whether an argument has a row for each of those of an output of ``out`` dimensions: data, or for samples.

    What is no data is lined up with the output from behind.
    """
    if not t.ndim:
        return False
    if getattr(t, MARK, 0) == DATA:
        return t.shape[0] in (rows, n)
    return t.shape[0] == rows and t.ndim >= out


def _reduced(g: Tensor, d: Tensor) -> Tensor:
    """Sum [samples, parts, *out.shape[1:]] to [samples, *d.shape], where d was broadcast against the output."""
    aligned = (1,) * (g.ndim - 1 - d.ndim) + tuple(d.shape)
    if aligned and aligned[0] != 1:
        raise Untied("its op has no sample dimension of its own")
    g = g.sum(1)
    gone = [i for i, size in enumerate(aligned[1:], 1) if size == 1 and g.shape[i] != 1]
    return (g.sum(gone, keepdim=True) if gone else g).reshape(len(g), *d.shape)


def tensors_of(values: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested lists and tuples."""
    for v in values:
        if isinstance(v, Tensor):
            yield v
        elif isinstance(v, _SEQUENCES):
            yield from tensors_of(v)


def replaced(value: Any, swap: Callable[[Tensor], Tensor]) -> Any:
    """Return nested lists, tuples and dicts with their tensors replaced."""
    if isinstance(value, Tensor):
        return swap(value)
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(replaced(v, swap) for v in value)
    if isinstance(value, dict):
        return {k: replaced(v, swap) for k, v in value.items()}
    return value
