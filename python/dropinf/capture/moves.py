"""What ops that move entries make of their labels: exactly where constants say which entry goes where, and with all
that could go there where data says it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .colours import NONE, SEVERAL
from .labels import Piece, joined, unlabelled
from .rules import Run, flat, rule, together


def _full(run: Run, x: Tensor) -> Tensor:
    labels = run.known.of(x)
    return unlabelled(x.shape, x.device) if labels is None else labels


@rule(
    "flip", "roll", "repeat", "constant_pad_nd", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk",
    "split_copy", "split_with_sizes_copy", "slice_scatter", "select_scatter", "diagonal_scatter", "diag_embed",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "rot90", "unbind_copy", "narrow_copy", "slice_copy",
    "select_copy", "view_copy", "expand_copy", "permute_copy", "transpose_copy", "diagonal_copy", "unfold_copy",
)  # fmt: skip
def moved(run: Run) -> Sequence[Tensor]:
    def one(value: Any) -> Any:
        return _full(run, value) if isinstance(value, Tensor) else value

    arguments = {name: one(value) for name, value in run.args.items()}
    if run.name == "constant_pad_nd":
        arguments["value"] = NONE
    return flat(run.function(**arguments))


@rule("cat", "stack", "concat", "concatenate")
def concatenated(run: Run) -> Tensor:
    tensors = flat(run.args["tensors"])
    dim, new = int(run.args.get("dim", 0)), run.name == "stack"
    dim %= tensors[0].ndim + new
    tensors = [x for x in tensors if new or x.ndim > 1 or x.numel()]  # cat takes empty vectors beside any shape
    found = []
    for firm in (True, False):
        labels = [_full(run, x) if run.known.is_firm(x) == firm else unlabelled(x.shape, x.device) for x in tensors]
        labels = [one.unsqueeze(dim) for one in labels] if new else labels
        found.append(Piece(torch.cat(_narrowed(labels, dim), dim), firm))
    return joined(found)


def _narrowed(labels: list[Tensor], dim: int) -> list[Tensor]:
    """Return labels with size one along the dimensions, but one, that all of them repeat."""
    for i in range(labels[0].ndim):
        if i != dim and all(x.stride(i) == 0 and x.shape[i] > 1 for x in labels):
            labels = [x.narrow(i, 0, 1) for x in labels]
    return labels


def _taken(run: Run, x: Tensor, *indices: Any) -> Piece | None:
    """Return what entries bring that indices take; where data says which, a table's rows are of any sample."""
    piece = run.piece(x)
    if run.known.is_firm(x) and not x.is_leaf and any(map(run.moves, indices)):
        labels = _full(run, x) if piece is None else piece.labels
        return Piece(torch.where(labels == NONE, SEVERAL, labels), firm=True)
    return piece


def _loosely(run: Run, index: Any, shape: Sequence[int]) -> list[Piece]:
    """Return what an index brings, as labels of a shape."""
    return [Piece(piece.labels.reshape(shape), firm=False) for piece in run.pieces([index])]


@rule("embedding")
def looked_up(run: Run) -> Tensor:
    weight, index = run.args["weight"], run.args["indices"]
    found = _loosely(run, index, (*index.shape, 1))
    table = _taken(run, weight, index)
    if table is not None:
        found.append(Piece(table.over([0]).labels[0], table.firm))
    return joined(found)


@rule("index_select", "gather")
def gathered(run: Run) -> Tensor:
    x, index = run.args["self"], run.args["index"]
    if not x.ndim:
        return together(run)
    dim = run.dims(x)[0]
    select = run.name == "index_select"
    shape = [-1 if i == dim else 1 for i in range(x.ndim)] if select else index.shape
    found = _loosely(run, index, shape)
    piece = _taken(run, x, index)
    if piece is not None:
        labels = (piece.over([dim]).labels if run.moves(index) else piece.labels).expand(x.shape)
        labels = labels.index_select(dim, index) if select else labels.gather(dim, index)
        found.append(Piece(labels, piece.firm))
    return joined(found)


@rule("index", "_unsafe_index")
def indexed(run: Run) -> Tensor:
    x, indices = run.args["self"], list(run.args["indices"])
    found = _of_indices(run, indices, flat(run.out)[0].ndim)
    piece = _taken(run, x, *indices)
    if piece is not None:
        labels = piece.over(_moving(run, indices)).labels.expand(x.shape)
        found.append(Piece(torch.ops.aten.index(labels, indices), piece.firm))
    return joined(found)


def _moving(run: Run, indices: Sequence[Any]) -> list[int]:
    """Return the dimensions along which data says which entries are taken."""
    dims: list[int] = []
    dim = 0
    for index in indices:
        wide = index.ndim if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) else 1
        if run.moves(index):
            dims += range(dim, dim + wide)
        dim += wide
    return dims


def _of_indices(run: Run, indices: Sequence[Any], ndim: int) -> list[Piece]:
    """Return what indices bring to a result of ``ndim`` dimensions."""
    used = [(i, index) for i, index in enumerate(indices) if isinstance(index, Tensor)]
    if any(index.dtype in (torch.bool, torch.uint8) for _, index in used):
        return [Piece(piece.alone().labels, firm=False) for piece in run.pieces([index for _, index in used])]
    places = [i for i, _ in used]
    adjacent = not places or places == list(range(places[0], places[-1] + 1))
    first = places[0] if adjacent and places else 0
    wide = max((index.ndim for _, index in used), default=0)
    found = []
    for _, index in used:
        # Indices broadcast among each other, and stand where the first of them did.
        found += _loosely(run, index, (*index.shape, *[1] * (ndim - first - wide)))
    return found


@rule("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_fill", "index_reduce")
def scattered(run: Run) -> Tensor:
    x, index = run.args["self"], run.args["index"]
    if not x.ndim:
        return together(run)
    dim = run.dims(x)[0]
    each = index.ndim == x.ndim and not run.name.startswith("index")
    sources = [run.args.get("src"), run.args.get("source"), run.args.get("value"), index if each else None]
    found = [*run.pieces([x]), *([] if each else [piece.alone() for piece in run.pieces([index])])]
    for value in sources:
        for piece in run.pieces([value]):
            fits = all(i == dim or size == x.shape[i] for i, size in enumerate(piece.labels.shape))
            found.append(piece.over([dim]) if fits and piece.labels.ndim == x.ndim else piece.alone())
    return joined(found)


@rule("index_put", "_unsafe_index_put", "_index_put_impl")
def put(run: Run) -> Tensor:
    x, values, indices = run.args["self"], run.args["values"], list(run.args["indices"])
    if _moving(run, indices) or run.args.get("accumulate"):
        rest = [values, *[index for index in indices if isinstance(index, Tensor)]]
        return joined([*run.pieces([x]), *[piece.alone() for piece in run.pieces(rest)]])
    pieces = run.pieces([x, values])
    labels = torch.ops.aten.index_put(_full(run, x).contiguous(), indices, _full(run, values).contiguous())
    return joined([Piece(labels, any(piece.firm for piece in pieces))])


@rule("masked_scatter")
def masked(run: Run) -> Tensor:
    rest = [piece.alone() for piece in run.pieces([run.args["source"]])]
    return joined([*run.pieces([run.args["self"], run.args["mask"]]), *rest])
