"""The order of an index's samples where their rows are stored in another one, such as that of the batches' lengths.

It is a file of its own, named by its checksum as shards are: what a manifest names stays as it was.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..files import SUFFIX, checksum, serialize
from ..workload import check_order
from .folder import names, remove, write_whole
from .manifest import Manifest

ORDER_NAME = re.compile(r"order-([0-9a-f]{32})" + re.escape(SUFFIX))
_TENSOR = "positions"


def order_path(folder: Path, found: str) -> Path:
    return folder / f"order-{found}{SUFFIX}"


def write_order(folder: Path, positions: Tensor) -> str:
    """Write the position of the sample of each stored row, and return the file's checksum."""
    data = serialize({_TENSOR: positions.to(torch.int64)}, {})
    found = checksum(data)
    write_whole(order_path(folder, found), data)
    return found


def read_order(folder: Path, expected: str, rows: int) -> Tensor:
    """Return the position of the sample of each stored row, int64 [rows].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or not of so many rows.
    """
    path = order_path(folder, expected)
    data = path.read_bytes()
    if checksum(data) != expected:
        raise ValueError(f"{path}: damaged, its bytes do not match their checksum; restore it from a copy")
    try:
        positions = load(data)[_TENSOR]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path}: it is no order of samples ({error})") from None
    if positions.dtype != torch.int64 or positions.shape != (rows,) or not is_order(positions):
        raise ValueError(f"{path}: it is not the order of the {rows} samples that the manifest has")
    return positions


def is_order(positions: Tensor) -> bool:
    """Return whether each of n positions is there once."""
    count = len(positions)
    if count and (int(positions.min()) < 0 or int(positions.max()) >= count):
        return False
    return bool((positions.bincount(minlength=count) == 1).all())


def joined(before: Tensor | None, rows: int, added: Tensor | None, count: int) -> Tensor | None:
    """Return the order of `rows` samples and `count` more that stand after them; None where it is that of the rows."""
    first = torch.arange(rows, device="cpu") if before is None else before
    then = torch.arange(count, device="cpu") if added is None else added
    both = torch.cat([first, rows + then])
    return None if bool((both == torch.arange(rows + count, device="cpu")).all()) else both


def check_kept(folder: Path, manifest: Manifest, first: int, count: int, places: Tensor | None) -> None:
    """Raise ValueError where samples that are in the index, `count` from `first` on, are given in another order."""
    rows = sum(shard.rows for shard in manifest.shards)
    if places is None and manifest.order is None and rows >= first + count:
        return
    given = torch.arange(count, device="cpu") if places is None else places
    check_order(given, count)
    kept = None if manifest.order is None else read_order(folder, manifest.order, rows)
    kept = torch.arange(rows, device="cpu") if kept is None else kept
    if not torch.equal(kept[first : first + count] - first, given):
        raise ValueError(
            f"order: the samples of these batches stand in another order in {folder}; give the order that they were "
            "compressed with, or name another folder"
        )


def runs_of(positions: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield (first position, where its samples stand in `positions`) of each run of neighbouring positions."""
    order = positions.argsort()
    gaps = (positions[order].diff() != 1).nonzero().flatten() + 1
    for part in order.tensor_split(gaps):
        if len(part):
            yield int(positions[part[0]]), part


def windows_of(rows: Tensor, gap: int, most: int) -> Iterator[tuple[Tensor, list[tuple[int, int]], Tensor]]:
    """Yield (where rows stand in `rows`, windows to read, where the rows stand in these), about `most` rows at a time.

    A window is (first row, rows); rows with up to `gap` others between them are read as one.
    """
    order = rows.argsort()
    for part in _split(order, _packed(rows[order], gap) // max(1, most)):
        ascending = rows[part]
        local = _packed(ascending, gap)
        firsts = torch.cat([ascending[:1], ascending[1:][ascending.diff() > gap + 1]])
        lasts = torch.cat([ascending[:-1][ascending.diff() > gap + 1], ascending[-1:]])
        yield part, list(zip(firsts.tolist(), (lasts - firsts + 1).tolist(), strict=True)), local


def _packed(ascending: Tensor, gap: int) -> Tensor:
    """Return where rows stand once what lies between windows is left out."""
    steps = ascending.diff(prepend=ascending[:1])
    return torch.where(steps > gap + 1, 1, steps).cumsum(0)


def _split(x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Cut x where neighbouring labels differ."""
    return x.tensor_split(labels.diff().nonzero().flatten() + 1)


def remove_others(folder: Path, kept: str | None) -> None:
    """Remove the orders of before."""
    for match in names(folder, ORDER_NAME):
        if match[1] != kept:
            remove(folder / match[0])


def opened(folder: Path) -> tuple[Manifest, Tensor | None]:
    """Return the manifest of an index with finished rows, and the order of its samples."""
    while True:
        manifest = Manifest.load(folder)
        if not manifest.shards:
            raise ValueError(
                f"{folder}: the index is not finished; run the same compress again, which goes on where it stopped"
            )
        if manifest.order is None:
            return manifest, None
        try:
            return manifest, read_order(folder, manifest.order, sum(shard.rows for shard in manifest.shards))
        except FileNotFoundError:
            if Manifest.load(folder).order == manifest.order:  # else it was replaced in between
                path = order_path(folder, manifest.order)
                raise ValueError(f"{path}: missing, the order of the samples; restore it from a copy") from None
