"""A Fisher matrix on disk: its sums, in one safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ._solvers import KroneckerBlock
from .storage import checksum, read_header, serialize, write_whole

if TYPE_CHECKING:
    from .fisher import Fisher

FORMAT = "dropinf.fisher-1"


def save_fisher(fisher: Fisher, path: Path) -> str:
    """Write the file by a temporary name, and return its checksum."""
    tensors: dict[str, Tensor] = {}
    blocks = []
    for i, (_, block) in enumerate(fisher._blocks):
        plain: dict[str, Any] = {"count": block.count, "fourths": block.fourths}
        if isinstance(block, KroneckerBlock):
            plain["corrected"] = block.corrected
        for name in block.saved:
            value = getattr(block, name)
            several = isinstance(value, list | tuple)
            parts = list(value) if several else [] if value is None else [value]
            if name == "rows" and len(parts) > 1:
                parts = [torch.cat(parts)]
            plain[name] = len(parts) if several else bool(parts)
            tensors |= {f"{i}.{name}.{j}": part for j, part in enumerate(parts)}
        blocks.append(plain)
    header = {
        "format": FORMAT,
        "kind": fisher.kind,
        "damping": fisher.damping,
        "absolute": fisher.absolute,
        "count": fisher.count,
        "layers": [[name, shape, fisher.digest[name]] for name, shape in fisher.shapes.items()],
        "blocks": blocks,
    }
    data = serialize(tensors, header)
    write_whole(path, data)
    return checksum(data)


def load_fisher(path: Path, empty: type[Fisher]) -> Fisher:
    """Read a file that `save_fisher` wrote."""
    try:
        with safe_open(path, framework="pt") as file:
            header = read_header(file.metadata(), path, FORMAT)
            fisher = empty(header["kind"], header["damping"], header["absolute"])
            layers = header["layers"]
            fisher._lay_out({n: tuple(shape) for n, shape, _ in layers}, {n: digest for n, _, digest in layers})
            fisher._count = header["count"]
            plain = header["blocks"]
            for i, ((_, block), values) in enumerate(zip(fisher._blocks, plain, strict=True)):
                for name, value in values.items():
                    if name not in block.saved:
                        setattr(block, name, value)
                    elif isinstance(value, bool):
                        setattr(block, name, file.get_tensor(f"{i}.{name}.0") if value else None)
                    else:
                        parts = [file.get_tensor(f"{i}.{name}.{j}") for j in range(value)]
                        setattr(block, name, tuple(parts) or None if name == "_basis" else parts)
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or damaged ({error}); save it again") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its header is damaged ({error}); save it again") from error
    return fisher
