"""Masks on disk: what a compressor drew and what calibration found, in one safetensors file; which model it was."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..files import plain_name, read_header, serialize, whole_number, write_whole
from ..sketch.axis import Axis
from ..sketch.draws import Place
from .layer import Layer

FORMAT = "dropinf-masks-1"
Sums = dict[Place, Tensor]
_SUM = "moments"


def axes_of(layer: Layer) -> Iterator[tuple[str, Axis]]:
    """Yield a plan's axes, each with its side: "out", and "in" if there is one."""
    yield "out", layer.out_axis
    if layer.in_axis is not None:
        yield "in", layer.in_axis


def save_masks(layers: Mapping[str, Layer], path: str | os.PathLike[str], sums: Sums, samples: int) -> None:
    """Write every layer's tables and the sums of its calibration, atomically."""
    tables, plan = {}, {}
    for name, layer in layers.items():
        plan[name] = {side: {"size": axis.size, "group": axis.group} for side, axis in axes_of(layer)}
        for side, axis in axes_of(layer):
            for field, table in axis.tensors().items():
                tables[f"{name}/{side}/{field}"] = table
    tables |= {f"{place}/{_SUM}": total for place, total in sums.items()}
    write_whole(Path(path), serialize(tables, {"format": FORMAT, "plan": plan, "samples": samples}))


def masked_layers(path: str | os.PathLike[str]) -> list[str]:
    """Return the names of the layers in a file of masks.

    Raises FileNotFoundError where there is none, ValueError where it is another kind of file.
    """
    with _opened(path) as (header, _):
        return list(header["plan"])


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[dict[str, Any], Any]]:
    """Open a file of masks, and yield its header and the file."""
    try:
        with plain_name(path) as name, safe_open(name, "pt") as file:
            header = read_header(file.metadata(), Path(path), FORMAT)
            _check_header(header)
            yield header, file
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"path: {path} is not a file of masks that Compressor.save wrote ({error})") from None


def _check_header(header: Mapping[str, Any]) -> None:
    """Raise ValueError where a file's plan is not one of layers with one or two axes."""
    plan = header.get("plan")
    if not isinstance(plan, dict) or not plan:
        raise ValueError(f"its plan is {_shown(plan)}")
    whole_number(header.get("samples"), "its number of samples", 0)
    for name, sides in plan.items():
        if not isinstance(sides, dict) or sides.keys() not in ({"out"}, {"out", "in"}):
            raise ValueError(f"layer {name!r} is {_shown(sides)}")
        for side, axis in sides.items():
            if not isinstance(axis, dict) or axis.keys() != {"size", "group"}:
                raise ValueError(f"the {side} axis of layer {name!r} is {_shown(axis)}")
            for field, number in axis.items():
                whole_number(number, f"the {field} of the {side} axis of layer {name!r}", 1)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def checked_axis(axis: Axis, place: str) -> Axis:
    """Return an axis that was read; raise ValueError where its tables are not those of one."""
    index, weight, matrix, kept = axis.index, axis.weight, axis.matrix, axis.size
    if index is not None:
        if index.dtype != torch.int32 or index.ndim != 2 or not index.numel():
            raise ValueError(f"{place}/index is {index.dtype} {list(index.shape)}; it must be int32 [fan_in, dim]")
        if int(index.min()) < 0 or int(index.max()) >= axis.size:
            raise ValueError(f"{place}/index goes from {index.min()} to {index.max()}, of {axis.size} coordinates")
        kept = index.shape[1]
        if not _aligned(index, axis.group):
            raise ValueError(f"{place}/index does not consist of aligned runs of {axis.group}")
    for field, table in (("weight", weight), ("matrix", matrix)):
        if table is not None and not (table.dtype == torch.float32 and table.ndim == 2 and table.isfinite().all()):
            raise ValueError(f"{place}/{field} is {table.dtype} {list(table.shape)}; it must be finite float32, [n, m]")
    if index is not None and weight is not None and weight.shape != index.shape:
        raise ValueError(f"{place}/weight is {list(weight.shape)}; it must be {list(index.shape)}, as its index")
    if (index is None and matrix is None) or (matrix is not None and (matrix.shape[1] != kept or not len(matrix))):
        raise ValueError(f"{place} has no table of {kept} coordinates")
    return axis


def _aligned(index: Tensor, group: int) -> bool:
    """Return whether an index consists of runs of `group`, each from a multiple of it on."""
    if group == 1:
        return True
    if index.shape[1] % group:
        return False
    runs = index.view(-1, group)
    steps = torch.arange(group, dtype=index.dtype, device="cpu")
    return bool((runs[:, :1] % group == 0).all() and (runs - runs[:, :1] == steps).all())


def load_masks(layers: Mapping[str, Layer], path: str | os.PathLike[str]) -> tuple[dict[str, Layer], Sums, int]:
    """Return ``layers`` with the file's axes, the sums of its calibration, and how many samples these are of.

    Raises ValueError where they belong to another model.
    """
    with _opened(path) as (header, file):
        tables = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    plan = header["plan"]
    _check_model(layers, plan, path)

    def axis(name: str, side: str) -> Axis | None:
        if side not in plan[name]:
            return None
        entry = plan[name][side]
        index, weight, matrix = (tables.get(f"{name}/{side}/{field}") for field in ("index", "weight", "matrix"))
        try:
            return checked_axis(Axis(entry["size"], index, weight, matrix, entry["group"]), f"{name}/{side}")
        except ValueError as error:
            raise ValueError(f"path: the masks in {path} are damaged: {error}; restore the file") from None

    loaded = {}
    for name, layer in layers.items():
        out_axis = axis(name, "out")
        assert out_axis is not None
        loaded[name] = replace(layer, out_axis=out_axis, in_axis=axis(name, "in"))
    sums = {}
    for key, table in tables.items():
        *place, field = key.rsplit("/", 2)
        if field == _SUM and len(place) == 2:
            sums[Place(*place)] = table
    return loaded, sums, header["samples"]


def _check_model(layers: Mapping[str, Layer], plan: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    way_out = "load the masks that this model's own compressor saved, or calibrate again"
    for name in [*layers, *plan]:
        if name not in plan or name not in layers:
            where = "these masks lack it" if name not in plan else "this model does not track it"
            raise ValueError(f"path: the masks in {path} are of another model: layer {name}: {where}; {way_out}")
        rows, columns = layers[name].matrix_shape
        sizes = [plan[name][side]["size"] for side in ("out", "in") if side in plan[name]]
        if sizes not in ([rows, columns], [rows * columns]):
            raise ValueError(
                f"path: the masks in {path} are of another model: layer {name} is {rows} x {columns} here and "
                f"{' x '.join(map(str, sizes))} there; {way_out}"
            )


def layer_digest(layer: Layer) -> str:
    """Return a fingerprint of a layer's tables."""
    h = hashlib.blake2b(repr((layer.name, layer.shape, layer.transposed)).encode(), digest_size=16)
    for axis in (layer.out_axis, layer.in_axis):
        h.update(b"none" if axis is None else axis.digest())
    return h.hexdigest()
