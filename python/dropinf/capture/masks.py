"""Masks on disk: what a compressor drew and what calibration found, in one safetensors file; which model it was."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..files import checksum, read_header, serialize, write_whole
from ..sketch.axis import Axis
from ..sketch.draws import Place
from ..workload import tensor_bytes
from .layer import Layer, clean_name
from .sharded import is_sharded

FORMAT = "dropinf-masks-1"
Sums = dict[Place, Tensor]
_SUM = "moments"


def _axes(layer: Layer) -> Iterator[tuple[str, Axis]]:
    yield "out", layer.out_axis
    if layer.in_axis is not None:
        yield "in", layer.in_axis


def save_masks(layers: Mapping[str, Layer], path: str | os.PathLike[str], sums: Sums, samples: int) -> None:
    """Write every layer's tables and the sums of its calibration, atomically."""
    tables, plan = {}, {}
    for name, layer in layers.items():
        plan[name] = {side: {"size": axis.size, "group": axis.group} for side, axis in _axes(layer)}
        for side, axis in _axes(layer):
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
        with safe_open(os.fspath(path), "pt") as file:
            yield read_header(file.metadata(), Path(path), FORMAT), file
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"path: {path} is not a file of masks that Compressor.save wrote ({error})") from None


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
        return Axis(entry["size"], index, weight, matrix, entry["group"])

    loaded = {}
    for name, layer in layers.items():
        out_axis = axis(name, "out")
        assert out_axis is not None
        loaded[name] = replace(layer, out_axis=out_axis, in_axis=axis(name, "in"))
    sums = {}
    for key, table in tables.items():
        name, side, field = key.rsplit("/", 2)
        if field == _SUM:
            sums[Place(name, side)] = table
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


def fingerprint(model: nn.Module, *, buffers: bool = True) -> str:
    """Return a checksum of a model's parameters and persistent buffers; of shards, of their names and shapes alone.

    Without buffers it is that of what training changes: some models count their calls in buffers.
    """
    parts = []
    for prefix, module in model.named_modules():
        kept = {n: b for n, b in module.named_buffers(recurse=False) if n not in module._non_persistent_buffers_set}
        for name, x in (*module.named_parameters(recurse=False), *(kept.items() if buffers else ())):
            about = f"{clean_name(f'{prefix}.{name}')} {tuple(x.shape)} {x.dtype}".encode()
            parts.append(about + (b"" if is_sharded(x) else checksum(tensor_bytes(x)).encode()))
    return checksum(b"\n".join(sorted(parts)))


def check_weights(model: nn.Module, expected: str, folder: object) -> None:
    """Raise ValueError unless the model has the weights that an index was made with, by their fingerprint."""
    if fingerprint(model) != expected:
        raise ValueError(
            f"model: its weights are not those that {folder} was made with; pass the model of then, in the same dtype"
        )
