"""A Fisher matrix on disk: its sums, in one safetensors file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ._solvers import Block, DenseBlock, DiagonalBlock, KroneckerBlock
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
            try:
                return _read(header, file.get_tensor, empty)
            except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
                raise ValueError(f"{path}: its header is damaged ({error}); save it again") from error
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or damaged ({error}); save it again") from error


def _read(header: Mapping[str, Any], tensor: Callable[[str], Tensor], empty: type[Fisher]) -> Fisher:
    if isinstance(header["damping"], bool) or not isinstance(header["absolute"], bool):
        raise ValueError(f"damping is {header['damping']!r}, absolute {header['absolute']!r}")
    fisher = empty(header["kind"], header["damping"], header["absolute"])
    shapes, digest = {}, {}
    for name, shape, found in header["layers"]:
        if not (isinstance(name, str) and isinstance(found, str)) or name in shapes or len(shape) not in (1, 2):
            raise ValueError(f"a layer is {name!r}, {shape!r}, {found!r}")
        shapes[name], digest[name] = tuple(_whole(size, "a size", 1) for size in shape), found
    fisher._lay_out(shapes, digest)
    fisher._count = _whole(header["count"], "count", 0)
    for i, ((_, block), plain) in enumerate(zip(fisher._blocks, header["blocks"], strict=True)):
        _fill(block, plain, fisher.count, lambda key, i=i: tensor(f"{i}.{key}"))  # type: ignore[misc]
    return fisher


def _fill(block: Block, plain: Mapping[str, Any], count: int, tensor: Callable[[str], Tensor]) -> None:
    """Give a block of `count` samples its sums, each of the shape that it must have."""
    kronecker = isinstance(block, KroneckerBlock)
    if set(plain) != {"count", "fourths", *block.saved} | ({"corrected"} if kronecker else set()):
        raise ValueError(f"a block has {sorted(plain)}")
    if _whole(plain["count"], "a block's count", 0) != count:
        raise ValueError(f"a block's count is {plain['count']} of {count}")
    if type(plain["fourths"]) not in (int, float) or not math.isfinite(plain["fourths"]):
        raise ValueError(f"fourths is {plain['fourths']!r}")
    block.count, block.fourths = count, float(plain["fourths"])
    if isinstance(block, KroneckerBlock):
        block.corrected = _whole(plain["corrected"], "corrected", 0)
    for name, sizes in _sizes(block).items():
        if type(plain[name]) not in (bool, int) or plain[name] not in (0, len(sizes)):
            raise ValueError(f"{name} is {plain[name]!r}")
        parts = [tensor(f"{name}.{j}") for j in range(plain[name])]
        for part, size in zip(parts, sizes, strict=bool(parts)):
            if part.shape != size or not part.is_floating_point() or not bool(part.isfinite().all()):
                raise ValueError(f"{name} is {part.dtype} {list(part.shape)} or not finite; it must be {list(size)}")
        if name == "rows":
            setattr(block, name, parts)
        else:
            setattr(block, name, None if not parts else parts[0] if len(sizes) == 1 else tuple(parts))
    if count and not _has_sums(block):
        raise ValueError(f"a block of {count} samples lacks some of {', '.join(block.saved)}, or has too many")


def _sizes(block: Block) -> dict[str, list[tuple[int, ...]]]:
    """Return the shapes of what a block saves under each name, where it has it."""
    if isinstance(block, DenseBlock):
        return {"rows": [(block.count, block.width)], "gram": [(block.width, block.width)]}
    if isinstance(block, DiagonalBlock):
        return {"squares": [(block.width,)]}
    assert isinstance(block, KroneckerBlock)
    left, right = ((size, size) for size in block.shape)
    return {"left": [left], "right": [right], "moments": [block.shape], "_basis": [left, right, block.shape]}


def _has_sums(block: Block) -> bool:
    if isinstance(block, DenseBlock):
        return bool(block.rows) != (block.gram is not None)
    if isinstance(block, DiagonalBlock):
        return block.squares is not None
    assert isinstance(block, KroneckerBlock)
    corrected = block.moments is None or (block._basis is not None and block.corrected > 0)
    return block.left is not None and block.right is not None and corrected


def _whole(value: object, what: str, least: int) -> int:
    if type(value) is not int or not least <= value < 1 << 48:
        raise ValueError(f"{what} is {value!r}")
    return value
