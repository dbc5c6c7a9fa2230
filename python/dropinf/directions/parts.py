"""What a direction is on each parameter, and the file of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..capture.layer import Layer, LayerKind
from ..capture.masks import axes_of, checked_axis, layer_digest
from ..files import is_sealed, metadata_of, read_header, sealed, whole_number, write_whole
from ..sketch.axis import Axis

FORMAT = "dropinf-direction-1"
_TABLES = ("index", "weight", "matrix")


@dataclass(frozen=True, eq=False)
class Part:
    """What a direction is on one parameter: ``values`` [Q, *stored_shape] of a sketch, or [Q, *shape] where whole."""

    values: Tensor
    layer: Layer | None  # None: the values are whole

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        return tuple(self.values.shape[1:]) if self.layer is None else self.layer.shape

    def whole(self, q: int) -> Tensor:
        """Return the direction of query ``q`` on the parameter, [*shape]."""
        one = self.values[q : q + 1]
        return (one if self.layer is None else self.layer.spread(one))[0]

    def digest(self) -> str:
        """Return what parts that can be added have in common."""
        return str(self.shape) if self.layer is None else layer_digest(self.layer)

    def of(self, values: Tensor) -> Part:
        """Return the part with other values."""
        return replace(self, values=values)


def save_parts(parts: Mapping[str, Part], model: str, path: str | os.PathLike[str]) -> None:
    """Write parts and the fingerprint of their model, atomically."""
    tensors, plan = {}, {}
    for name, part in parts.items():
        tensors[f"{name}/values"] = part.values
        plan[name] = None if part.layer is None else _plain(part.layer)
        for side, axis in () if part.layer is None else axes_of(part.layer):
            tensors |= {f"{name}/{side}/{field}": table for field, table in axis.tensors().items()}
    write_whole(Path(path), sealed(tensors, {"format": FORMAT, "model": model, "parts": plan, "order": list(parts)}))


def _plain(layer: Layer) -> dict[str, Any]:
    axes = {side: [axis.size, axis.group] for side, axis in axes_of(layer)}
    fields = (layer.name, layer.kind, list(layer.shape), layer.transposed, layer.route)
    return dict(zip(("name", "kind", "shape", "transposed", "route"), fields, strict=True)) | {"axes": axes}


def load_parts(path: str | os.PathLike[str]) -> tuple[dict[str, Part], str]:
    """Return the parts that :func:`save_parts` wrote, and the fingerprint of their model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or a damaged one.
    """
    try:
        data = Path(path).read_bytes()
        tensors, header = load(data), read_header(metadata_of(data), Path(path), FORMAT)
        if not is_sealed(data, tensors, header):
            raise ValueError("its bytes do not match their checksum")
        parts = {name: _part(name, header["parts"][name], tensors) for name in header["order"]}
        if not parts or len({len(part.values) for part in parts.values()}) > 1 or len(parts) < len(header["parts"]):
            raise ValueError("its parts are not of as many queries each")
        return parts, str(header["model"])
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"path: {path} is not a whole file that Direction.save wrote ({error}); save it again"
        ) from error


def _part(name: str, plan: Any, tensors: Mapping[str, Tensor]) -> Part:
    """Return a part that was read. Raise ValueError where it is none."""
    values = tensors[f"{name}/values"]
    layer = None if plan is None else _layer(name, plan, tensors)
    stored = tuple(values.shape[1:]) if layer is None else layer.stored_shape
    if not values.is_floating_point() or values.ndim < 1 or tuple(values.shape[1:]) != stored:
        raise ValueError(f"{name} is {values.dtype} {list(values.shape)}")
    return Part(values, layer)


def _layer(name: str, plan: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Layer:
    axes = {}
    for side, (size, group) in plan["axes"].items():
        place = f"{name}/{side}"
        index, weight, matrix = (tensors.get(f"{place}/{field}") for field in _TABLES)
        axis = Axis(whole_number(size, "a size", 1), index, weight, matrix, whole_number(group, "a group", 1))
        axes[side] = checked_axis(axis, place)
    if plan["kind"] not in get_args(LayerKind) or plan["route"] not in ("hook", "exact"):
        raise ValueError(f"layer {plan['name']!r} is of kind {plan['kind']!r}, by {plan['route']!r}")
    shape = tuple(whole_number(size, "a size", 0) for size in plan["shape"])
    found = Layer(
        str(plan["name"]),
        plan["kind"],
        name,
        shape,
        bool(plan["transposed"]),
        axes["out"],
        axes.get("in"),
        plan["route"],
    )
    rows, columns = found.matrix_shape
    if [axis.size for _, axis in axes_of(found)] not in ([rows, columns], [rows * columns]):
        raise ValueError(f"the axes of layer {found.name!r} do not have the sizes of {list(shape)}")
    return found
