"""Sketched gradients of a parameter straight from the rows of the op that used it, whole gradients never formed.

It works where each stored value is one entry of the gradient, and the op used the parameter itself or a view of it (an
expert of a fused tensor, a transpose, a chunk): the kept entries are looked up in the view. Rows may be of any layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

import dropinf_kernels as ops

from .layer import Layer
from .samples import Grid, Rows, Samples

SUMS = {
    torch.add: 1, Tensor.add: 1, Tensor.__add__: 1, Tensor.__radd__: 1,
    torch.sub: -1, Tensor.sub: -1, Tensor.__sub__: -1,
}  # fmt: skip
# Choices -> the places of their condition, of what is taken where it holds, and of what is taken elsewhere.
CHOICES = {torch.where: (0, 1, 2), Tensor.where: (1, 0, 2)}
PRODUCTS = {torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}
MATMULS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}
# Normalisations -> their arguments in order.
NORMS = {
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
    F.rms_norm: ("input", "normalized_shape", "weight", "eps"),
}
CHANNEL_NORMS = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
}
MOST_PRODUCTS = 1 << 21  # that are held at once
ADDED = {torch.baddbmm, Tensor.baddbmm}
BATCHED = MATMULS | ADDED | {torch.bmm, Tensor.bmm}
LOOKUPS = {F.embedding, Tensor.__getitem__}


def direct(
    function: Any, args: Sequence[Any], kwargs: dict[str, Any], d: Tensor, layer: Layer, g: Tensor, samples: Samples
) -> Tensor | None:
    """Return the sketched gradients [N, *stored_shape] of ``layer`` through one op, or None where this cannot tell.

    ``d`` is the tensor, of ``args``, that is the layer's parameter or a view of it; g [*lead, d_out] the op's gradient.
    """
    if not layer.is_gather or not g.ndim:
        return None
    handler = _handler(function, args, kwargs, d)
    if handler is None:
        return None
    places = _known_places(layer.entries.to(d.device), d)
    if places is None:
        return None
    stored, index = places
    if not len(stored):
        return g.new_zeros(samples.n, *layer.stored_shape, dtype=torch.promote_types(g.dtype, torch.float32))
    values = handler(args, kwargs, d, g, samples, index)
    if values is None:
        return None
    out = values.new_zeros(samples.n, layer.entries.numel())
    out[:, stored] = values
    return out.view(samples.n, *layer.stored_shape)


_found: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _known_places(entries: Tensor, d: Tensor) -> tuple[Tensor, list[Tensor]] | None:
    """Return `_places`, computed once for each view: a GPU would be waited for, and the kernels check new tables."""
    base = d if d._base is None else d._base
    shift = d.storage_offset() - base.storage_offset()
    view = base.is_contiguous(), shift, d.shape, d.stride()
    views = _found.setdefault(entries, {})
    if view not in views:
        views[view] = _places(entries, d)
    return views[view]  # type: ignore[no-any-return]


def _places(entries: Tensor, d: Tensor) -> tuple[Tensor, list[Tensor]] | None:
    """Return which of the stored entries lie in a view of a contiguous parameter, and where: an index for each dim."""
    base = d if d._base is None else d._base
    if not base.is_contiguous():
        return None
    reach: list[tuple[int, int]] = []
    rest = entries - (d.storage_offset() - base.storage_offset())  # type: ignore[operator]
    inside, index = rest >= 0, [torch.zeros_like(rest)] * d.ndim
    for dim in sorted(range(d.ndim), key=d.stride, reverse=True):
        size, stride = d.shape[dim], d.stride(dim)
        if size == 1:
            continue
        if stride == 0:
            return None
        index[dim] = rest // stride
        inside &= index[dim] < size
        rest = rest % stride
        reach.append((stride, stride * size))
    # Views that overlap hold an entry more than once.
    if any(stride < below for (stride, _), (_, below) in pairwise(reach)):
        return None
    inside &= rest == 0
    stored = inside.nonzero().flatten()
    return stored, [i[stored].to(torch.int32) for i in index]


Handler = Callable[[Sequence[Any], dict[str, Any], Tensor, Tensor, Samples, list[Tensor]], Tensor | None]


def is_plain_call(function: Any, args: Sequence[Any]) -> bool:
    """Return whether a sum or product has no factor among its arguments, as old signatures have: ``add(x, 2, y)``."""
    given = 3 if function in ADDED else 2
    return len(args) == given and (given == 2 or all(isinstance(x, Tensor) for x in args))


def _handler(function: Any, args: Sequence[Any], kwargs: dict[str, Any], d: Tensor) -> Handler | None:
    if (function in BATCHED or function in SUMS or function in PRODUCTS) and not is_plain_call(function, args):
        return None
    if function is F.linear and len(args) > 1:
        return _linear if args[1] is d else _bias
    if function in MATMULS and not kwargs and args[1] is d and d.ndim == 2:
        return _matmul
    if function in BATCHED and not kwargs and d.ndim == 3:
        if args[0] is not d:
            return _batched(args, d)
        return _batched_bias if function in ADDED else None
    if function in LOOKUPS and d.ndim == 2:
        return _lookup
    if function in SUMS or function in PRODUCTS:
        return None if kwargs else _elementwise(function)
    if function in CHOICES and not kwargs and len(args) == 3:
        return _chosen(function)
    if function is torch.einsum and not kwargs:
        return _einsum(args, d)
    if function in NORMS and d.ndim == 1:
        return _normalised(function)
    if function in CHANNEL_NORMS and d.ndim == 1:
        return _normalised_channels(function)
    return _grouped if "grouped_mm" in getattr(function, "__name__", "") and d.ndim == 3 else None


def _linear(
    args: Sequence[Any], _kw: dict[str, Any], _d: Tensor, g: Tensor, samples: Samples, index: list[Tensor]
) -> Tensor | None:
    return _entries(args[0].detach(), g, samples, index[0], index[1], kept=True)


def _entries(a: Tensor, g: Tensor, samples: Samples, rows: Tensor, columns: Tensor, *, kept: bool = False) -> Tensor:
    """Return entries [N, k] of the sum over each sample's rows of g_t a_t^T.

    ``kept``: these rows and columns come again in each call, so that it pays to look how they lie.
    """
    if isinstance(samples.layout, Rows) and a.ndim == 2 and len(a) * len(rows) <= MOST_PRODUCTS:
        # A few rows of each sample, in any order: one sum for all samples.
        wide = torch.promote_types(g.dtype, torch.float32)
        values = g.index_select(1, rows).to(wide) * a.index_select(1, columns).to(wide)
        return values.new_zeros(samples.n, len(rows)).index_add_(0, samples.layout.owner, values)
    (a, cu), (g, _) = samples.tie(a), samples.tie(g)
    grid = _grid(rows, columns) if kept else None
    if grid is None:
        return ops.compress_flat(a, g, rows, columns, cu)
    lines, inputs, places = grid
    return ops.compress_linear(a, g, inputs, None, lines, None, 1, cu).flatten(1).index_select(1, places)


_grids: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _grid(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the kept rows [1, r] and columns [1, c], if entries are all where these cross, and each entry's place
    in [r * c]; computed once for a view's places."""
    if rows not in _grids:
        (r, down), (c, across) = (x.unique(return_inverse=True) for x in (rows, columns))
        crosses = min(len(r), len(c)) > 1 and len(r) * len(c) == len(rows)
        _grids[rows] = (r[None], c[None], down * len(c) + across) if crosses else None
    return _grids[rows]  # type: ignore[no-any-return]


def _bias(
    _args: Sequence[Any], _kw: dict[str, Any], _d: Tensor, g: Tensor, samples: Samples, index: list[Tensor]
) -> Tensor | None:
    g, cu = samples.tie(g)
    return ops.compress_norm(None, g, index[0][None], cu_seqlens=cu)


def _matmul(
    args: Sequence[Any], _kw: dict[str, Any], _d: Tensor, g: Tensor, samples: Samples, index: list[Tensor]
) -> Tensor | None:
    if args[0].ndim < 2:
        return None
    return _entries(args[0].detach(), g, samples, index[1], index[0], kept=True)


def _contraction(letters_a: str, letters_d: str, letters_g: str, place: int) -> Handler | None:
    """Return the handler of the product g = a d, in einsum's letters; ``place``: of a among the arguments."""
    rows = [c for c in letters_g if c not in letters_d]
    inputs, outputs = [c for c in letters_d if c in letters_a], [c for c in letters_d if c in letters_g]
    unique = all(len(set(term)) == len(term) for term in (letters_a, letters_d, letters_g))
    if not unique or set(letters_a) != {*rows, *inputs} or set(letters_d) != {*inputs, *outputs} or not rows:
        return None

    def handler(
        args: Sequence[Any], _kw: dict[str, Any], d: Tensor, g: Tensor, samples: Samples, index: list[Tensor]
    ) -> Tensor | None:
        size = {**dict(zip(letters_d, d.shape, strict=True)), **dict(zip(letters_g, g.shape, strict=True))}
        of = dict(zip(letters_d, index, strict=True))

        def flat(x: Tensor, letters: str, features: list[str]) -> tuple[Tensor, Tensor]:
            x = x.permute([letters.index(c) for c in (*rows, *features)])
            column = torch.zeros_like(index[0])
            for c in features:
                column = column * size[c] + of[c]
            return x.reshape(*[size[c] for c in rows], -1), column

        a = args[place].detach()
        if any(x.shape != tuple(size[c] for c in letters) for x, letters in ((a, letters_a), (d, letters_d))):
            return None  # broadcast along some letter
        (a, columns), (g, lines) = flat(a, letters_a, inputs), flat(g, letters_g, outputs)
        return _entries(a, g, samples.along([letters_g.index(c) for c in rows]), lines, columns)

    return handler


def _einsum(args: Sequence[Any], d: Tensor) -> Handler | None:
    equation = args[0].replace(" ", "") if isinstance(args[0], str) else ""
    terms = re.fullmatch(r"(\w+),(\w+)->(\w+)", equation)
    if terms is None or len(args) != 3:
        return None
    first, second, out = terms.groups()
    return _contraction(first, second, out, 1) if args[2] is d else _contraction(second, first, out, 2)


def _batched(args: Sequence[Any], d: Tensor) -> Handler | None:
    """Return the handler of x [*lead, B, S, d_in] d [B, d_in, d_out]: matrices of their own for B groups."""
    lead = args[-2].ndim - 3
    if args[-1] is not d or lead < 0:
        return None
    more = "defghjklmnpqrtuvwxyz"[:lead]
    return _contraction(f"{more}bsi", "bio", f"{more}bso", len(args) - 2)


def _batched_bias(
    _args: Sequence[Any], _kw: dict[str, Any], d: Tensor, g: Tensor, samples: Samples, index: list[Tensor]
) -> Tensor | None:
    """Return the kept entries of d [B, 1, d_out], which is added to [B, S, d_out]."""
    if d.shape != (g.shape[0], 1, g.shape[2]):
        return None
    g, cu = samples.along([1]).tie(g.movedim(0, 1).flatten(1))
    return ops.compress_norm(None, g, (index[0] * d.shape[2] + index[2])[None], cu_seqlens=cu)


def _lookup(
    args: Sequence[Any], kwargs: dict[str, Any], d: Tensor, g: Tensor, samples: Samples, index: list[Tensor]
) -> Tensor | None:
    ids = args[1] if args[0] is d else args[0]
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64) or ids.shape != g.shape[:-1]:
        return None
    padding = kwargs.get("padding_idx", args[2] if len(args) > 2 else None)
    if padding is not None:
        g = g.masked_fill((ids == padding % len(d))[..., None], 0)
    if isinstance(samples.layout, Rows) and samples.n * len(d) <= ids.numel():  # few rows of d: one sum for each
        place = samples.layout.owner * len(d) + ids.flatten() % len(d)
        sums = g.new_zeros(samples.n * len(d), g.shape[-1], dtype=torch.promote_types(g.dtype, torch.float32))
        sums.index_add_(0, place, g.flatten(0, -2).to(sums.dtype))
        return sums.view(samples.n, len(d), -1)[:, index[0], index[1]]
    (rows, cu), (g, _) = samples.tie(ids % len(d), 0), samples.tie(g)
    return ops.compress_flat(rows, g, index[1], index[0], cu)


def _elementwise(function: Any) -> Handler:
    def handler(
        args: Sequence[Any], _kw: dict[str, Any], d: Tensor, g: Tensor, samples: Samples, index: list[Tensor]
    ) -> Tensor | None:
        first = next((i for i, size in enumerate(d.shape) if size != 1), d.ndim)
        features = d.ndim - first  # d is broadcast along all other dimensions of the output
        if not features or g.ndim <= features or g.shape[g.ndim - features :] != d.shape[first:]:
            return None
        column = index[first].long()
        for i in range(first + 1, d.ndim):
            column = column * d.shape[i] + index[i]
        other = args[0] if args[1] is d else args[1]
        a = None
        if function in PRODUCTS:
            if not isinstance(other, Tensor) or other.shape != g.shape:
                return None
            a = samples.tie(other.detach().flatten(g.ndim - features))[0]
        g, cu = samples.tie(g.flatten(g.ndim - features))
        values = ops.compress_norm(a, g, column[None].to(torch.int32), cu_seqlens=cu)
        return -values if SUMS.get(function) == -1 and args[1] is d else values

    return handler


def _chosen(function: Any) -> Handler:
    added = _elementwise(torch.add)

    def handler(
        args: Sequence[Any], _kw: dict[str, Any], d: Tensor, g: Tensor, samples: Samples, index: list[Tensor]
    ) -> Tensor | None:
        condition, there, elsewhere = (args[place] for place in CHOICES[function])
        nothing = g.new_zeros(())
        if there is not elsewhere:
            g = torch.where(condition, g, nothing) if there is d else torch.where(condition, nothing, g)
        return added((d, g), {}, d, g, samples, index)

    return handler


def _normalised(function: Any) -> Handler:
    def handler(
        args: Sequence[Any], kwargs: dict[str, Any], d: Tensor, g: Tensor, samples: Samples, index: list[Tensor]
    ) -> Tensor | None:
        given = dict(zip(NORMS[function], args, strict=False)) | kwargs
        weight, bias = given.pop("weight", None), given.pop("bias", None)
        if weight is bias or (weight is not d and bias is not d):
            return None
        (g, cu), a = samples.tie(g), None
        if weight is d:
            a = samples.tie(function(**(given | {"input": given["input"].detach()})))[0]
        return ops.compress_norm(a, g, index[0][None], cu_seqlens=cu)

    return handler


def _normalised_channels(function: Any) -> Handler:
    def handler(
        args: Sequence[Any], kwargs: dict[str, Any], d: Tensor, g: Tensor, samples: Samples, index: list[Tensor]
    ) -> Tensor | None:
        given = dict(zip(CHANNEL_NORMS[function], args, strict=False)) | kwargs
        weight, bias = given.pop("weight", None), given.pop("bias", None)
        if weight is bias or (weight is not d and bias is not d) or given.pop("training", False):
            return None
        if samples.layout not in (None, Grid()) or samples.cu_seqlens is not None or len(g) % samples.n:
            return None

        def rows(x: Tensor) -> Tensor:
            """Return [B, kept, *positions] as [N, T, kept]."""
            return x.reshape(samples.n, len(x) // samples.n, len(index[0]), -1).mT.flatten(1, 2)

        a = None
        if weight is d:
            x = given.pop("input").detach()
            if function is F.batch_norm:  # each channel for itself
                x, mean, var = (
                    y.index_select(dim, index[0])
                    for y, dim in ((x, 1), (given.pop("running_mean"), 0), (given.pop("running_var"), 0))
                )
                a = F.batch_norm(x, mean, var, **given)
            else:
                a = function(x, **given).index_select(1, index[0])
        return ops.compress_norm(None if a is None else rows(a), rows(g.index_select(1, index[0])))

    return handler


def _grouped(
    args: Sequence[Any], kwargs: dict[str, Any], _d: Tensor, g: Tensor, samples: Samples, index: list[Tensor]
) -> Tensor | None:
    """Return the kept entries through x [S, d_in] in groups of rows, each with its own matrix d[e] [d_in, d_out]."""
    offsets = kwargs.get("offs", args[2] if len(args) > 2 else None)
    if args[0].ndim != 2 or offsets is None or not (isinstance(samples.layout, Rows) or samples.n == 1):
        return None
    out = g.new_zeros(samples.n, len(index[0]), dtype=torch.promote_types(g.dtype, torch.float32))
    first = 0
    for e, last in enumerate(offsets.tolist()):
        kept = (index[0] == e).nonzero().flatten()
        if last > first and len(kept):
            layout = Rows(samples.layout.sample[first:last]) if isinstance(samples.layout, Rows) else None
            group, a = Samples(samples.n, None, layout), args[0][first:last].detach()
            out[:, kept] = _entries(a, g[first:last], group, index[2][kept], index[1][kept])
        first = last
    return out
