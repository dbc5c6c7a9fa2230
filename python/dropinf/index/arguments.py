"""What a call that compresses into an index was given: checked, and in the form that is written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..fisher.bits import BitCode
from ..fisher.fisher import Fisher, FisherKind
from ..ranks import Ranks
from ..workload import Ids, check_ids, first_batch, sampler_of_ranks, shuffles
from .codec import BITS, DTYPES, name_of
from .coded import Coded, load_code
from .manifest import Manifest
from .parts import Parts, Share
from .source import RowSource

StoredDtype = torch.dtype | str | BitCode


def first_of(batches: Iterable[Any], ranks: Ranks, places: Tensor | None) -> tuple[Any, Iterable[Any]]:
    """Return the first batch that this rank has, and all of its batches."""
    if isinstance(batches, Parts):
        if places is not None:
            raise ValueError("order: Parts has the order of its sampler; leave order out")
        share = Share(batches, ranks)
        return share.first, share
    sampler = sampler_of_ranks(batches) if ranks.world > 1 else None
    if sampler is not None:
        raise ValueError(
            f"batches: their {sampler} gives each rank a part of the samples, and group= has the ranks share the "
            "batches themselves; pass all batches to every rank, by the same DataLoader without this sampler, or "
            "dropinf.Parts(loader), which takes them as parts"
        )
    return first_batch(batches)


def check_options(
    batches: Iterable[Any],
    path: object,
    dtype: StoredDtype | None,
    fisher: FisherKind | Fisher | None,
    ids: Ids | None,
) -> Fisher | None:
    """Raise ValueError or TypeError for options that no index has. Return the Fisher matrix to build."""
    if not isinstance(path, str | os.PathLike) or "\0" in os.fspath(path):
        raise TypeError(f"out is {path!r}; it must be the path of a folder, text or a pathlib.Path")
    check_ids(ids)
    if isinstance(dtype, str) and dtype in BITS:
        raise ValueError(
            f"dtype is {dtype!r}, which needs to know what whitens the rows: pass dropinf.BitCode.fit(rows, fisher, "
            f"bits={BITS[dtype]}), of rows of some thousand samples, as dtype"
        )
    if dtype is not None and not isinstance(dtype, BitCode) and dtype not in DTYPES.values():
        known = ", ".join(f"torch.{name}" for name in DTYPES)
        raise ValueError(f"dtype is {dtype}; it must be one of {known}, or a dropinf.BitCode")
    if shuffles(batches.loader if isinstance(batches, Parts) else batches):
        raise ValueError(
            "batches: a shuffling DataLoader gives another order each time; make it with shuffle=False, or with a "
            "sampler of a fixed order. Ranks share the work by group=, each with all batches"
        )
    made = Fisher(fisher) if isinstance(fisher, str) else fisher
    if made is not None and made.count:
        raise ValueError(f"fisher has {made.count} samples; pass an empty one, such as dropinf.Fisher('block')")
    return made


def coded(
    source: RowSource, dtype: StoredDtype | None, folder: Path, fisher: Fisher | None
) -> tuple[RowSource, str | None]:
    """Return what gives the rows that are stored, of few bits or as they are, and the name of their dtype if known."""
    if dtype is None:
        with contextlib.suppress(FileNotFoundError):
            dtype = load_code(folder, Manifest.load(folder))
    if isinstance(dtype, BitCode) and fisher is not None:
        raise ValueError("fisher: rows of few bits have the one that whitened them, in their code; leave fisher out")
    if dtype is None or isinstance(dtype, torch.dtype):
        return source, None if dtype is None else name_of(dtype)
    assert isinstance(dtype, BitCode)
    return Coded(source, dtype), f"{dtype.bits}bit"
