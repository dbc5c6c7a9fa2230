"""What ranks must agree on that share a run: what they compress, and with what."""

from __future__ import annotations

import os
import time
import uuid
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files import TEMPORARY, checksum
from ..fisher.fisher import Fisher
from ..loss_name import HELD
from ..ranks import Ranks
from ..workload import count_of
from .codec import BITS
from .probe import rows_of
from .rows_alike import apart
from .source import RowSource

_SHOWS = 10.0  # seconds until a file that one rank wrote shows on others

_CHECKSUMS = ("model", "code", "sketch", "first batch", "order")  # facts whose values say nothing to a reader
_WAY_OUT = "every rank must make the same call: the same model, sketch and options, and all batches in the same order"


def facts_of(
    source: RowSource,
    batches: Iterable[Any],
    first: str,
    dtype: str | None,
    fisher: Fisher | None,
    names: object,
    append: bool,
    places: Tensor | None,
    folder: Path,
) -> dict[str, object]:
    """Return what must be the same on all ranks, by name. ``names``: the ids of the first batch, or None."""
    return {
        "model": None if source.is_sharded else source.fingerprint(),  # each rank has its own shards
        "dtype": dtype,
        "code": dict(source.digest()) if dtype in BITS else None,
        "sketch": dict(source.digest()),
        "number of batches": count_of(batches),
        "first batch": first,
        "loss": source.loss_name().partition(HELD)[0],  # ranks may hold their own numbers
        "order": None if places is None else checksum(places.numpy().tobytes()),
        "folder": os.path.realpath(folder),
        "fisher": None if fisher is None else (fisher.kind, fisher.damping, fisher.absolute),
        "choice of ids": names,
        "append": append,
    }


def check_one_folder(ranks: Ranks, folder: Path) -> None:
    """Raise ValueError where a rank has another folder of the same name, as on a disk of its own."""
    if ranks.world == 1:
        return
    name = ranks.first(lambda: _left_in(folder))
    there = ranks.everyone(_appears(folder / name))
    ranks.first(lambda: (folder / name).unlink(missing_ok=True))
    if not all(there):
        raise ValueError(
            f"out: {folder} is another folder on rank {there.index(False)} than on rank 0; ranks need one file system, "
            "that all of them write to"
        )


def _left_in(folder: Path) -> str:
    name = f".rank0.{uuid.uuid4().hex}{TEMPORARY}"
    (folder / name).touch()
    return name


def _appears(path: Path) -> bool:
    until = time.monotonic() + _SHOWS
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def agree(ranks: Ranks, facts: Mapping[str, object]) -> None:
    """Compare what every rank is about to do.

    Raises:
        ValueError: it names what is different, and on which rank.
    """
    every = ranks.everyone({name: str(value) for name, value in facts.items()})
    first = every[0]
    for rank, theirs in enumerate(every):
        for name, value in first.items():
            if theirs[name] != value:
                values = "" if name in _CHECKSUMS else f" ({_short(theirs[name])}, not {_short(value)})"
                raise ValueError(
                    f"group: rank {rank} has another {name} than rank 0{values}; {_WAY_OUT}{_sampler(name)}"
                )


def agree_on_rows(ranks: Ranks, source: RowSource, first: Any) -> None:
    """Compare the rows that every rank makes of the first batch, where they are not random.

    Raises:
        ValueError: it names a rank whose model or loss gives other rows.
    """
    constants = ranks.everyone((source.loss_name(), sorted(source.code().items())))
    odd = [rank for rank, held in enumerate(constants) if held != constants[0]]
    if odd:
        warnings.warn(
            f"group: rank {odd[0]} holds other constants than rank 0, in loss_fn or in attributes of the model: where "
            "they are more than its device or its number, rows of two losses or models would stand in one index",
            stacklevel=3,
        )
    settled = source.is_sharded or bool(source.losses(first))  # shards run the batch together
    rows = rows_of(source, first) if settled else None
    expected = ranks.first(lambda: rows)
    what = None
    if rows is not None and expected is not None:
        what = apart(source.shapes, rows, expected, rows.dtype)
    for rank, found in enumerate(ranks.everyone(what)):
        if found is not None:
            raise ValueError(
                f"group: rank {rank} has other gradients of the first batch than rank 0 "
                f"({found.replace('had', 'not')}): its model, its modes and settings, or its loss_fn is another; "
                f"{_WAY_OUT}"
            )


def compare_batches(ranks: Ranks, prints: Mapping[int, str]) -> None:
    """Compare the fingerprints of the batches that more than one rank has looked at.

    Raises:
        ValueError: a batch that is not the same on two ranks.
    """
    known: dict[int, tuple[int, str]] = {}
    for rank, theirs in enumerate(ranks.everyone(dict(prints))):
        for b, found in sorted(theirs.items()):
            other, expected = known.setdefault(b, (rank, found))
            if found != expected:
                raise ValueError(
                    f"batches: batch {b} is another one on rank {rank} than on rank {other}; {_WAY_OUT}"
                    f"{_sampler('first batch')}"
                )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _sampler(name: str) -> str:
    shares = " (no DistributedSampler: the ranks share the work themselves)"
    return shares if name in ("first batch", "number of batches") else ""
