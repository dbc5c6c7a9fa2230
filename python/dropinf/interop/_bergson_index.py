"""bergson's index of gradients on disk, written and read."""

from __future__ import annotations

import hashlib
import json
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ..gradients import Gradients, GradientSource, block_rows
from . import require

_bergson: Any = require("bergson", "bergson", "2.5.1")
_data: Any = import_module("bergson.data")
_utils: Any = import_module("bergson.utils.utils")

LAYOUT = "dropinf.json"  # beside bergson's files: [bergson's name, dropinf's, shape, digest] of each module


def export_index(source: GradientSource, path: str | Path, *, data: Any = None, prefix: str = "") -> None:
    """Write gradients as an index that bergson reads.

    ``data``: its data set, a row for each sample. ``prefix``: what dropinf's names of layers begin with and bergson's
    do not, ``model.base_model_prefix + "."``.
    """
    path, names = Path(path), {name: name.removeprefix(prefix) for name in source.shapes}
    sizes = {names[name]: math.prod(shape) for name, shape in source.shapes.items()}
    buffer = _data.create_index(path, len(source), sizes, _utils.convert_dtype_to_np(source.dtype))
    for offset, part in source.blocks(block_rows(source)):
        buffer[offset : offset + len(part)] = _utils.tensor_to_numpy(part.flat.cpu())
    buffer.flush()
    _bergson.GradientProcessor().save(path)
    layers = [[names[name], name, shape, source.digest[name]] for name, shape in source.shapes.items()]
    (path / LAYOUT).write_text(json.dumps(layers))
    if data is not None:
        data.save_to_disk(str(path / "data.hf"))


def import_index(path: str | Path) -> Gradients:
    """Read an index of bergson's, with a row for each sample.

    What a compressor made has dropinf's names and digests; for bergson's own projections, the digest is of their
    settings.

    Raises:
        FileNotFoundError: no index there.
        ValueError: an index with a row for each token.
    """
    path = Path(path)
    info = json.loads((path / "info.json").read_text())
    if info["attribute_tokens"]:
        raise ValueError(f"{path}: its rows are tokens, not samples; build it with attribute_tokens=False")
    flat = _utils.numpy_to_tensor(np.array(_data.load_gradients(path)))
    if (path / LAYOUT).exists():
        layers = json.loads((path / LAYOUT).read_text())
        return Gradients(
            flat, {n: tuple(shape) for _, n, shape, _ in layers}, {n: digest for _, n, _, digest in layers}
        )
    made = _bergson.GradientProcessor.load_config(path)
    dim = made.projection_dim if made.projection_target == "per_module" else None
    shapes = {name: (dim, dim) if dim else (size,) for name, size in info["grad_sizes"].items()}
    digest = {n: hashlib.blake2b(f"{n} {size} {made}".encode()).hexdigest() for n, size in info["grad_sizes"].items()}
    return Gradients(flat, shapes, digest)
